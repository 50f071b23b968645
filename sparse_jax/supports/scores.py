"""Scores: what makes an entry worth training."""

import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.params.fields import require_new

__all__ = ["SCORES", "Score", "leaf_key", "register_score", "score_named"]

# Keeps a weight of exactly zero from an infinite score, which would never be chosen.
_SMALLEST_WEIGHT = 1e-8


@dataclass(frozen=True, eq=False)
class Score:
    """What ranks the entries of an array: those of the largest magnitudes are trained.

    Equal if the function is the same object, so that any callable can be part of a
    static argument of `jax.jit`.

    Attributes:
      function: (gradient, param[, key]) -> scores of the same shape. It gets a key if
        it has an argument `key`, or three arguments without defaults.
      needs_gradient: whether it looks at the gradient. If not, the compact tier selects
        without a backward pass, and may pass anything for it.
      needs_param: whether it looks at the values of the parameter.

    Raises:
      InputError: if `function` does not take these arguments.

    Example:
      >>> score = Score(lambda gradient, param: gradient * param)
      >>> score(jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]), jax.random.key(0))
      Array([3., 2.], dtype=float32)
    """

    function: Callable[..., jax.Array]
    needs_gradient: bool = True
    needs_param: bool = True

    def __post_init__(self):
        self._arguments(1, 2, 3)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Score) and self.function is other.function

    def __hash__(self) -> int:
        # Callables with a comparison of their own may have no hash.
        return object.__hash__(self.function)

    def __call__(
        self, gradient: jax.Array, param: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Returns the scores of the entries of one array."""
        bound = self._arguments(gradient, param, key)
        scores = self.function(*bound.args, **bound.kwargs)
        if jnp.shape(scores) != param.shape:
            raise InputError(
                f"`score` must return an array of the shape of the gradient, "
                f"{list(param.shape)}, got {list(jnp.shape(scores))}. Return one "
                "number for each entry."
            )
        return scores

    @property
    def needs_key(self) -> bool:
        """Whether it draws at random."""
        return len(self._arguments(1, 2, 3).arguments) == 3

    def _arguments(self, *args: object) -> inspect.BoundArguments:
        """Returns what the function takes of a gradient, a param and a key."""
        takes = "(gradient, param[, key]) -> scores"
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # A callable of C has no signature.
            signature = inspect.signature(lambda gradient, param: None)
        except TypeError:
            raise InputError(
                f"`score` must be a function {takes}, got {self.function!r}."
            ) from None
        named = {"key": args[2]} if "key" in signature.parameters else {}
        required = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind
            in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        given = args if not named and len(required) == 3 else args[:2]
        try:
            return signature.bind(*given, **named)
        except TypeError as error:
            raise InputError(
                f"`score` must be a function {takes}, got one of "
                f"{signature}: {error}. Take these arguments and no other."
            ) from error


def _gradient_over_magnitude(gradient: jax.Array, param: jax.Array) -> jax.Array:
    """Returns |g| / |w|: large gradients on small weights."""
    weight = jnp.abs(param.astype(jnp.float32))
    return gradient.astype(jnp.float32) / jnp.maximum(weight, _SMALLEST_WEIGHT)


def _random(gradient: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
    """Returns uniform numbers: the baseline every other score has to beat."""
    del gradient
    return jax.random.uniform(key, param.shape, jnp.float32)


# By the names that `score` takes; `register_score` adds one.
SCORES: dict[str, Score] = {
    # |g|, as SIFT does (Song et al., 2024; `sift/sift.py`).
    "gradient": Score(lambda gradient, param: gradient, needs_param=False),
    "magnitude": Score(lambda gradient, param: param, needs_gradient=False),
    "gradient/magnitude": Score(_gradient_over_magnitude),
    "random": Score(_random, needs_gradient=False, needs_param=False),
}


def register_score(
    word: str,
    function: Callable[..., jax.Array],
    *,
    needs_gradient: bool = True,
    needs_param: bool = True,
) -> Score:
    """Registers a score under a name, for `sift`, `Sparse` and the command line.

    Args:
      word: its name: lower-case letters, digits, `_`, `-` and `/`.
      function, needs_gradient, needs_param: as of `Score`.

    Raises:
      InputError: if the name is invalid or another score has it, or the function has
        other arguments.

    Example:
      >>> score = register_score("saliency", lambda gradient, param: gradient * param)
      >>> score_named("saliency") is score
      True
      >>> del SCORES["saliency"]
    """
    score = Score(function, needs_gradient, needs_param)
    # The same function may come again, as where a cell of a notebook does.
    require_new(word, [one for one in SCORES if SCORES[one] != score])
    return SCORES.setdefault(word, score)


def score_named(score: str | Score | Callable[..., jax.Array]) -> Score:
    """Returns the score of a name or of a function.

    Raises:
      InputError: if the name is unknown, or the function takes other arguments.

    Example:
      >>> score_named("gradient").needs_param
      False
    """
    if isinstance(score, Score):
        return score
    if callable(score):
        return Score(score)
    if not isinstance(score, str) or score not in SCORES:
        raise InputError(
            f"`score` must be one of {', '.join(map(repr, SCORES))} or a function "
            f"(gradient, param[, key]) -> scores, got {score!r}."
        )
    return SCORES[score]


def leaf_key(key: jax.Array, name: str) -> jax.Array:
    """Returns the key of a leaf, which depends on its name and on nothing else."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)

"""Scores: what makes an entry worth training. The table is in docs/scores.md."""

import functools
import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.params.fields import require_new
from sparse_jax.supports.low_rank import LowRank

__all__ = [
    "SCORES",
    "Score",
    "leaf_key",
    "low_rank",
    "register_score",
    "reversed_order",
    "score_named",
]

# Keeps a weight of exactly zero from an infinite score, which would never be chosen.
_SMALLEST_WEIGHT = 1e-8


@dataclass(frozen=True, eq=False)
class Score:
    """What ranks the entries of an array: those of the largest magnitudes are trained.

    Equal if the function is the same object, so that any callable can be part of a
    static argument of `jax.jit`.

    Attributes:
      function: (gradient, param[, key]) -> scores of the same shape. It gets a key if
        it has an argument `key`, or three arguments without defaults, and the number
        of entries to choose if it has an argument `k`.
      needs_gradient: whether it looks at the gradient. If not, the compact tier selects
        without a backward pass, and the gradient is None.
      needs_param: whether it looks at the values of the parameter.
      lowest: whether the smallest magnitudes are trained instead.
      of_each: what is added up, where several gradients decide, and passed as the
        gradient: a function of one of them, float32. None adds the gradients.

    Raises:
      InputError: if `function` does not take these arguments.

    Example:
      >>> score = Score(lambda gradient, param: gradient * param)
      >>> score(jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]), jax.random.key(0), k=1)
      Array([3., 2.], dtype=float32)
    """

    function: Callable[..., jax.Array]
    needs_gradient: bool = True
    needs_param: bool = True
    lowest: bool = False
    of_each: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        self._arguments(1, 2, 3, 4)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Score)
            and self.function is other.function
            and (self.lowest, self.of_each) == (other.lowest, other.of_each)
        )

    def __hash__(self) -> int:
        # Callables with a comparison of their own may have no hash.
        return object.__hash__(self.function)

    def __call__(
        self, gradient: jax.Array | None, param: jax.Array, key: jax.Array, k: int
    ) -> jax.Array:
        """Returns the scores of the entries of one array, k of which will be chosen."""
        bound = self._arguments(
            gradient if self.needs_gradient else None, param, key, k
        )
        try:
            scores = self.function(*bound.args, **bound.kwargs)
        except (TypeError, AttributeError) as error:
            if self.needs_gradient:
                raise
            raise InputError(
                "`score` must not look at the gradient with `needs_gradient=False`, "
                f"got one that fails on None: {error}. Leave `needs_gradient` out."
            ) from error
        if jnp.shape(scores) != param.shape:
            raise InputError(
                f"`score` must return an array of the shape of the gradient, "
                f"{list(param.shape)}, got {list(jnp.shape(scores))}. Return one "
                "number for each entry."
            )
        return scores

    def added(self, gradient: jax.Array, stacked: bool = False) -> jax.Array:
        """Returns what one gradient, of each layer if stacked, adds to the sum."""
        if self.of_each is None:
            return gradient
        of_each = jax.vmap(self.of_each) if stacked else self.of_each
        return of_each(gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32)))

    def require(self, name: str, shape: Sequence[int]) -> None:
        """Raises `InputError` unless it can rank an array of some shape."""
        if isinstance(self.function, LowRank):
            self.function.require(name, shape)

    @property
    def has_rank(self) -> bool:
        """Whether it is one of `low_rank`."""
        return isinstance(self.function, LowRank)

    @property
    def needs_key(self) -> bool:
        """Whether it draws at random."""
        bound = self._arguments(1, 2, 3, 4).arguments
        return 3 in bound.values()

    def _arguments(self, *args: object) -> inspect.BoundArguments:
        """Returns what the function takes of a gradient, a param, a key and k."""
        takes = "(gradient, param[, key]) -> scores"
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # A callable of C has no signature.
            signature = inspect.signature(lambda gradient, param: None)
        except TypeError:
            raise InputError(
                f"`score` must be a function {takes}, got {self.function!r}."
            ) from None
        offered = {"key": args[2], "k": args[3]}
        named = {k: v for k, v in offered.items() if k in signature.parameters}
        required = [
            parameter
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty
            and name not in named
            and parameter.kind
            in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        with_key = "key" not in named and len(required) == 3
        try:
            return signature.bind(*args[: 2 + with_key], **named)
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


def _gradient(gradient: jax.Array, param: jax.Array) -> jax.Array:
    """Returns g, or what was added up in its place."""
    del param
    return gradient


def _magnitude(gradient: None, param: jax.Array) -> jax.Array:
    """Returns w."""
    del gradient
    return param


def _snip(gradient: jax.Array, param: jax.Array) -> jax.Array:
    """Returns g * w, the change of the loss if the weight were removed."""
    return gradient.astype(jnp.float32) * param.astype(jnp.float32)


def low_rank(rank: int | None = None, *, lowest: bool = False) -> Score:
    """Returns the score of LIFT with some rank: |W_r|, W_r the best of rank r of W.

    Args:
      rank: r; None is that of the LoRA which trains as many numbers as are chosen, or
        the most that an array has.
      lowest: whether the entries of smallest |W_r| are trained.

    Raises:
      InputError: if `rank` is not positive.

    Example:
      >>> low_rank() is SCORES["lift"], low_rank(rank=64).needs_gradient
      (True, False)

    References:
      Liu et al., 2025, https://arxiv.org/abs/2506.00772
    """
    return _low_rank(rank, lowest)


# The same object for the same rank: compiled programs are found by it.
@functools.cache
def _low_rank(rank: int | None, lowest: bool) -> Score:
    """Returns the score of a rank."""
    return Score(LowRank(rank), needs_gradient=False, lowest=lowest)


def _normalized(gradient: jax.Array) -> jax.Array:
    """Returns g / ||g||; zero if all of it is."""
    # Compilers divide by reciprocals, and that of 2e38 is zero.
    largest = jnp.max(jnp.abs(gradient), initial=0)
    gradient = gradient * jnp.where(largest > 1, 2.0**-32, 1)
    # By the largest first: squares of small numbers are zero, of large ones infinite.
    for size in (partial(jnp.max, initial=0), jnp.linalg.norm):
        found = size(jnp.abs(gradient.reshape(-1)))
        gradient = gradient / jnp.where(found > 0, found, 1)
    return gradient


# By the names that `score` takes; `register_score` adds one.
SCORES: dict[str, Score] = {
    # |g|, as SIFT does (Song et al., 2024; `sift/sift.py`).
    "gradient": Score(_gradient, needs_param=False),
    # Of several gradients none outweighs the others.
    "normalized": Score(_gradient, needs_param=False, of_each=_normalized),
    "magnitude": Score(_magnitude, needs_gradient=False),
    "gradient/magnitude": Score(_gradient_over_magnitude),
    "random": Score(_random, needs_gradient=False, needs_param=False),
    # Principal weights (Liu et al., 2025, arXiv 2506.00772).
    "lift": low_rank(),
    # Where reinforcement learning moves weights (Zhu et al., 2025, arXiv 2511.08567).
    "off-principal": low_rank(lowest=True),
    "smallest-magnitude": Score(_magnitude, needs_gradient=False, lowest=True),
    # Lee et al., 2019, arXiv 1810.02340.
    "snip": Score(_snip),
    # The diagonal of the Fisher information (FISH: Sung et al., 2021, 2111.09839).
    "fisher": Score(_gradient, needs_param=False, of_each=jnp.square),
    "smallest-fisher": Score(
        _gradient, needs_param=False, lowest=True, of_each=jnp.square
    ),
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


def reversed_order(scores: jax.Array) -> jax.Array:
    """Returns float32 numbers whose magnitudes are in the reverse order of |scores|.

    NaN stays for what is not finite, so that it is still chosen last.

    Example:
      >>> order = jnp.abs(reversed_order(jnp.array([0.0, -3.0, 2.0])))
      >>> jnp.argsort(order).tolist()
      [1, 2, 0]
    """
    # One less for every float32 one more: a reciprocal would make ties.
    largest = jnp.float32(jnp.finfo(jnp.float32).max)
    bits = lambda x: lax.bitcast_convert_type(x, jnp.int32)
    left = bits(largest) - bits(jnp.abs(scores.astype(jnp.float32)))
    return jnp.where(left < 0, jnp.nan, lax.bitcast_convert_type(left, jnp.float32))


def leaf_key(key: jax.Array, name: str) -> jax.Array:
    """Returns the key of a leaf, which depends on its name and on nothing else."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)

"""How the next token is chosen: the likeliest one or at random, in a compiled loop."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.generation.ends import ends_here
from sparse_jax.generation.prompts import AdaptedModel, Prompts
from sparse_jax.models.causal_lm import Cache
from sparse_jax.params.positive import require_positive

__all__ = ["Choice", "Greedy", "Sample"]


class Choice(Protocol):
    """A way to choose tokens; hashable, because a program is compiled for each."""

    is_random: ClassVar[bool]  # whether it needs a key

    def decode(
        self,
        model: AdaptedModel,
        prompts: Prompts,
        keys: jax.Array,
        stop: jax.Array,
        max_new_tokens: int,
    ) -> jax.Array:
        """Writes after every prompt until all rows have met an end.

        Args:
          model: the decoder, with its parameters.
          prompts: padded on the left.
          keys: one for each row, `[B]`; what a row draws depends on nothing else.
          stop: what ends a text, of `end_table`.
          max_new_tokens: most tokens to write.

        Returns:
          New tokens, int32 `[B, max_new_tokens]`, without meaning after an end.
        """
        ...


class _Rows(NamedTuple):
    """What has been written so far; S new tokens at most."""

    tokens: jax.Array  # shape=(B, S), int32
    last: jax.Array  # shape=(B,), int32: the token that has not been read yet
    is_done: jax.Array  # shape=(B,), bool
    count: jax.Array  # shape=(), int32: new tokens
    cache: Cache


class _TokenByToken(Protocol):
    """A choice that looks at the scores of the next token only."""

    def choose(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns tokens, int32 `[B]`, for logits `[B, V]` and keys `[B]`."""
        ...

    def decode(
        self,
        model: AdaptedModel,
        prompts: Prompts,
        keys: jax.Array,
        stop: jax.Array,
        max_new_tokens: int,
    ) -> jax.Array:
        """Writes after every prompt, as `Choice.decode` does."""

        def write(rows: _Rows, logits: jax.Array, cache: Cache) -> _Rows:
            here = jax.vmap(jax.random.fold_in, (0, None))(keys, rows.count)
            token = self.choose(logits, here)
            tokens = rows.tokens.at[:, rows.count].set(token)
            is_done = rows.is_done | ends_here(tokens, rows.count, stop)
            return _Rows(tokens, token, is_done, rows.count + 1, cache)

        def is_open(rows: _Rows) -> jax.Array:
            return (rows.count < max_new_tokens) & ~jnp.all(rows.is_done)

        logits, cache = model.start(prompts, max_new_tokens - 1)
        num_rows = logits.shape[0]
        empty = _Rows(
            tokens=jnp.zeros((num_rows, max_new_tokens), jnp.int32),
            last=jnp.zeros(num_rows, jnp.int32),
            is_done=~jnp.any(jnp.asarray(prompts.attention_mask, bool), axis=1),
            count=jnp.zeros([], jnp.int32),
            cache=cache,
        )
        step = lambda rows: write(rows, *model.read(rows.last, rows.cache))
        return jax.lax.while_loop(is_open, step, write(empty, logits, cache)).tokens


@dataclass(frozen=True)
class Greedy(_TokenByToken):
    """Always takes the most likely token.

    Example:
      >>> Greedy().choose(jnp.array([[0.0, 2.0, 1.0]]), jax.random.key(0))
      Array([1], dtype=int32)
    """

    is_random: ClassVar[bool] = False

    def choose(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns the tokens of the largest logits, the first of equal ones."""
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Sample(_TokenByToken):
    """Samples a token at random.

        p = softmax(logits / temperature), restricted and scaled to sum to one

    Restricted first to the `top_k` likeliest tokens, then to the fewest likeliest whose
    p, after the first restriction, add up to `top_p`, each time with all that are as
    likely as the last of them. `transformers` does the same, but for `top_p` it leaves
    to chance which of several equal ones are kept.

    Args:
      temperature: positive; below 1 prefers likely tokens.
      top_k: at least 1; None keeps all.
      top_p: in (0, 1]; None keeps all.

    Raises:
      InputError: if a number is out of range.

    Example:
      >>> logits = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
      >>> jax.nn.softmax(Sample(top_p=0.4).restricted(logits))
      Array([[0., 1., 0.]], dtype=float32)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    is_random: ClassVar[bool] = True

    def __post_init__(self):
        require_positive(
            "temperature",
            self.temperature,
            "Greedy decoding, without `temperature`, `top_k` and `top_p`, takes the "
            "likeliest token.",
        )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(
                f"`top_k` must be at least 1, got {self.top_k}. Leave it out to keep "
                "all tokens."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(
                f"`top_p` must be in (0, 1], got {self.top_p}. Leave it out to keep "
                "all tokens."
            )

    def restricted(self, logits: jax.Array) -> jax.Array:
        """Returns the logits that are drawn from, -inf for tokens that are not kept."""
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = _keep_top_k(logits, min(self.top_k, logits.shape[-1]))
        if self.top_p is not None and self.top_p < 1:
            logits = _keep_top_p(logits, self.top_p)
        return logits

    def choose(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns tokens drawn from what is kept."""
        draw = jax.vmap(jax.random.categorical)
        return draw(keys, self.restricted(logits)).astype(jnp.int32)


def _keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Removes all below the k-th largest of every row."""
    least = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def _keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Removes the least likely tokens that together have at most 1 - p."""
    ascending = jnp.sort(logits, axis=-1)
    is_kept = jnp.cumsum(jax.nn.softmax(ascending), axis=-1) > 1 - p
    # Rounding must not remove the likeliest one.
    is_kept = is_kept.at[..., -1].set(True)
    # Sorting values with their places, twice, made sampling take 1.7 times as long.
    least = jnp.min(jnp.where(is_kept, ascending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)

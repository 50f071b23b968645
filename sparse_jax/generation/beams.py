"""Beam search: the likeliest text as a whole, not one token after another."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.generation.ends import ends_here
from sparse_jax.generation.prompts import AdaptedModel, Prompts
from sparse_jax.models.causal_lm import Cache

__all__ = ["Beams"]

# The score of what must not be taken. It is finite, because infinities would give NaN.
_NEVER = -1e9


class _Texts(NamedTuple):
    """N texts of each prompt, those of the best scores first."""

    tokens: jax.Array  # shape=(B, N, S), int32
    scores: jax.Array  # shape=(B, N), float32


class _Search(NamedTuple):
    """What has been found so far."""

    open: _Texts  # that go on; scores are sums of log-probabilities
    parents: jax.Array  # shape=(B, N), int32: the texts before that these continue
    ended: _Texts  # scores are divided by the length
    is_ended: jax.Array  # shape=(B, N), bool: False in places not taken yet
    can_improve: jax.Array  # shape=(B,), bool: of the ended texts
    count: jax.Array  # shape=(), int32: new tokens
    cache: Cache  # of B * N rows, in the order before the last tokens


@dataclass(frozen=True)
class Beams:
    """Beam search: the text of the best score among those that are found.

        score = log p(text) / length ** length_penalty

    The length counts new tokens, the stop token among them. Of each prompt the
    `num_beams` best open texts are continued. The search of a prompt ends with as many
    ended ones: at once with `early_stopping`, and otherwise when the best open text,
    were it to end where it is, could not displace the worst of them. That is what
    `transformers` 5 does with `early_stopping` True and False; its "never" is left
    out.

    Args:
      num_beams: texts that are continued, at least 2.
      length_penalty: exponent of the length; above zero it favors long texts.
      early_stopping: whether to stop at the first `num_beams` texts.

    Raises:
      InputError: if a number is out of range.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False
    is_random: ClassVar[bool] = False

    def __post_init__(self):
        if self.num_beams < 2:
            raise InputError(
                f"`num_beams` must be at least 2, got {self.num_beams}. Use "
                "`Greedy()` for one."
            )
        if not math.isfinite(self.length_penalty):
            raise InputError(
                f"`length_penalty` must be a finite number, got {self.length_penalty}."
            )

    def decode(
        self,
        model: AdaptedModel,
        prompts: Prompts,
        keys: jax.Array,
        stop: jax.Array,
        max_new_tokens: int,
    ) -> jax.Array:
        """Writes after every prompt, as `Choice.decode` does."""
        del keys
        logits, cache = model.start(prompts, max_new_tokens - 1)
        is_prompt = jnp.any(jnp.asarray(prompts.attention_mask, bool), axis=1)
        search = self._begin(is_prompt, cache, max_new_tokens)
        logits = jnp.repeat(logits, self.num_beams, axis=0)

        def step(search: _Search) -> _Search:
            cache = _reordered(search.cache, search.parents)
            last = search.open.tokens[:, :, search.count - 1]
            logits, cache = model.read(last.reshape(-1), cache)
            return self._advance(search, logits, cache, stop)

        search = self._advance(search, logits, search.cache, stop)
        search = jax.lax.while_loop(self._is_open, step, search)
        return search.ended.tokens[:, 0]

    def _begin(
        self, is_prompt: jax.Array, cache: Cache, max_new_tokens: int
    ) -> _Search:
        """Returns the search before the first token; padding has ended already."""
        shape = (len(is_prompt), self.num_beams)
        empty = jnp.zeros((*shape, max_new_tokens), jnp.int32)
        # Otherwise all would continue alike.
        first = jnp.full(shape, _NEVER).at[:, 0].set(0.0)
        return _Search(
            open=_Texts(empty, first),
            parents=jnp.zeros(shape, jnp.int32),
            ended=_Texts(empty, jnp.full(shape, _NEVER)),
            is_ended=jnp.broadcast_to(~is_prompt[:, None], shape),
            can_improve=is_prompt,
            count=jnp.zeros([], jnp.int32),
            cache=_repeated(cache, self.num_beams),
        )

    def _is_open(self, search: _Search) -> jax.Array:
        """Returns whether any prompt needs more tokens."""
        is_open = jnp.any(search.can_improve)
        if self.early_stopping:
            is_open &= ~jnp.all(search.is_ended)
        return is_open & (search.count < search.open.tokens.shape[-1])

    def _advance(
        self, search: _Search, logits: jax.Array, cache: Cache, stop: jax.Array
    ) -> _Search:
        """Continues every open text by a token, and keeps the best."""
        found, parents = self._continued(search, logits, len(stop))
        max_new_tokens = found.tokens.shape[-1]
        is_last = search.count + 1 == max_new_tokens
        ends = ends_here(found.tokens, search.count, stop) | is_last
        scores, best = jax.lax.top_k(
            jnp.where(ends, _NEVER, found.scores), self.num_beams
        )
        # NumPy rounds like PyTorch, and the lengths are known.
        lengths = np.arange(1.0, max_new_tokens + 1) ** self.length_penalty
        length = jnp.asarray(lengths, jnp.float32)[search.count]
        ended, is_ended = self._ended(search, found, ends, length)
        worst = jnp.where(is_ended, ended.scores[:, -1:], _NEVER)
        can_improve = jnp.any(scores[:, :1] / length > worst, axis=1)
        return _Search(
            open=_Texts(_take(found.tokens, best), scores),
            parents=_take(parents, best),
            ended=ended,
            is_ended=is_ended,
            can_improve=search.can_improve & can_improve,
            count=search.count + 1,
            cache=cache,
        )

    def _continued(
        self, search: _Search, logits: jax.Array, num_stops: int
    ) -> tuple[_Texts, jax.Array]:
        """Returns the best continuations, enough for some to stay open; their parents.

        Each text has at most `num_stops` continuations that end it.
        """
        num_found = max(2, 1 + num_stops) * self.num_beams
        size = logits.shape[-1]
        more = jax.nn.log_softmax(logits).reshape(-1, self.num_beams, size)
        scores = (search.open.scores[:, :, None] + more).reshape(len(more), -1)
        scores, place = jax.lax.top_k(scores, min(num_found, scores.shape[1]))
        parents = place // size
        tokens = _take(search.open.tokens, parents)
        tokens = tokens.at[:, :, search.count].set(place % size)
        return _Texts(tokens, scores), parents

    def _ended(
        self, search: _Search, found: _Texts, ends: jax.Array, length: jax.Array
    ) -> tuple[_Texts, jax.Array]:
        """Returns the best of the texts that had ended and those that end now."""
        is_new = ends & (jnp.arange(ends.shape[1]) < self.num_beams)[None]
        is_taken = is_new & search.can_improve[:, None]
        if self.early_stopping:
            is_taken &= ~jnp.all(search.is_ended, axis=1, keepdims=True)
        new = jnp.where(is_taken, found.scores / length, _NEVER)
        join = lambda old, new: jnp.concatenate([old, new], axis=1)
        scores, best = jax.lax.top_k(join(search.ended.scores, new), self.num_beams)
        tokens = _take(join(search.ended.tokens, found.tokens), best)
        return _Texts(tokens, scores), _take(join(search.is_ended, is_taken), best)


def _take(values: jax.Array, best: jax.Array) -> jax.Array:
    """Returns some of the texts of every prompt, `[B, N, ...]` for `best` `[B, N]`."""
    best = best.reshape(*best.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, best, axis=1)


def _repeated(cache: Cache, num_beams: int) -> Cache:
    """Returns a cache with the rows of each prompt next to each other."""
    return cache._replace(
        kept=jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=-4), cache.kept),
        is_token=jnp.repeat(cache.is_token, num_beams, axis=0),
        positions=jnp.repeat(cache.positions, num_beams, axis=0),
    )


def _reordered(cache: Cache, parents: jax.Array) -> Cache:
    """Returns a cache whose rows are those of the texts that are continued."""
    # The rows of a prompt differ in nothing but keys and values.
    first = jnp.arange(parents.shape[0])[:, None] * parents.shape[1]
    rows = (first + parents).reshape(-1)
    pick = lambda x: x[..., rows, :, :, :]
    return cache._replace(kept=jax.tree.map(pick, cache.kept))

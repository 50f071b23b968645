"""Windows of a token stream, with words to restore, drawn on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Windows", "draw_windows"]

PAD, CLS, SEP, MASK = 0, 2, 3, 4
FIRST_WORD = 5  # the ids below are special
FEWEST_TOKENS = 16
MASKED_SHARE = 0.15


class Windows(NamedTuple):
    """`B` sequences of `T` tokens; row `i + B / 2` goes on where row `i` ends."""

    input_ids: jax.Array  # int32 [B, T], words hidden
    attention_mask: jax.Array  # int32 [B, T], 1 at tokens
    positions: jax.Array  # int32 [B, M] of the words to restore
    targets: jax.Array  # int32 [B, M], the words
    weights: jax.Array  # float32 [B, M], 1 at words and 0 at the places left over


def draw_windows(
    key: jax.Array, stream: jax.Array, batch_size: int, length: int
) -> Windows:
    """Draws sequences of random lengths from a stream, uniformly.

    Args:
      key: source of the places, the lengths and the hidden words.
      stream: ids `[N]`, with a [SEP] after each document.
      batch_size: sequences, an even number.
      length: most tokens of a sequence, [CLS] and [SEP] included.
    """
    start_key, length_key, mask_key = jax.random.split(key, 3)
    pairs, most = batch_size // 2, length - 2
    first = jax.random.randint(start_key, (pairs,), 0, stream.size - 2 * most)
    sizes = jax.random.randint(length_key, (2, pairs), FEWEST_TOKENS, most + 1)
    starts = jnp.concatenate([first, first + sizes[0]])
    ids = _cut(stream, starts, sizes.reshape(-1), length)
    return _hide(mask_key, ids, round(MASKED_SHARE * length))


def _cut(
    stream: jax.Array, starts: jax.Array, sizes: jax.Array, length: int
) -> jax.Array:
    """Returns `[CLS] words [SEP] [PAD]...` at each start: int32 `[B, T]`."""
    columns = jnp.arange(length)[None]
    ids = stream[starts[:, None] + columns - 1].astype(jnp.int32)
    end = sizes[:, None] + 1
    ids = jnp.where(columns == 0, CLS, jnp.where(columns < end, ids, PAD))
    return jnp.where(columns == end, SEP, ids)


def _hide(key: jax.Array, ids: jax.Array, most: int) -> Windows:
    """Hides words as BERT does: 80 % by [MASK], 10 % by another word, 10 % not."""
    place_key, kind_key, word_key = jax.random.split(key, 3)
    is_word = ids >= FIRST_WORD
    noise = jnp.where(is_word, jax.random.uniform(place_key, ids.shape), -1.0)
    positions = jax.lax.top_k(noise, most)[1]
    counts = jnp.ceil(MASKED_SHARE * is_word.sum(1, keepdims=True))
    weights = (jnp.arange(most)[None] < counts).astype(jnp.float32)
    targets = jnp.take_along_axis(ids, positions, axis=1)
    kind = jax.random.uniform(kind_key, targets.shape)
    # Another word is one of the batch, so that it is as frequent as words are.
    others = jax.random.permutation(word_key, targets.ravel()).reshape(targets.shape)
    shown = jnp.where(kind < 0.9, others, targets)
    shown = jnp.where(kind < 0.8, MASK, shown)
    shown = jnp.where(weights > 0, shown, targets)
    rows = jnp.arange(ids.shape[0])[:, None]
    return Windows(
        input_ids=ids.at[rows, positions].set(shown, unique_indices=True),
        attention_mask=(ids != PAD).astype(jnp.int32),
        positions=positions,
        targets=targets,
        weights=weights,
    )

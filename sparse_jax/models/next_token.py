"""The loss of the next token, without all logits at once."""

import jax
import jax.numpy as jnp

from sparse_jax.models.functional import Model, Params
from sparse_jax.params.axes import parts_of_tokens, rows_here

__all__ = ["summed_token_loss"]

# Logits held at a time, in entries: 64 MiB of float32. At 32,000 words and 4,096
# tokens all of them are 500 MiB, more than everything else of a small batch.
_MOST_LOGITS = 2**24


def summed_token_loss(
    model: Model,
    params: Params,
    hidden: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    *,
    smoothing: float = 0.0,
    most_logits: int = _MOST_LOGITS,
) -> jax.Array:
    """Returns the weighted sum of the losses of all tokens but the first.

        sum over b and t > 0 of -weights[b, t] log softmax(logits[b, t - 1])[ids[b, t]]

    With `smoothing` s, log softmax of the token counts 1 - s, its mean over all
    tokens s. Logits are computed for a few columns at a time, and again for
    the gradient.

    Args:
      model: the decoder.
      params: its parameters.
      hidden: normed hidden states `[B, T, D]`.
      ids: int32 `[B, T]`.
      weights: float32 `[B, T]`.
      smoothing: share of the target that is spread over all tokens.
      most_logits: entries of logits to hold at a time, on one device.
    """
    # The state at t scores the token at t + 1; the last state scores nothing.
    targets = jnp.roll(ids, -1, axis=1)
    weights = jnp.roll(weights, -1, axis=1).at[:, -1].set(0.0)

    def part(hidden: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        logits = model.logits(params, hidden)
        # A comparison instead of a gather: words that are cut over a mesh stay where
        # they are, and XLA has no gather from them beside manual axes (it aborts).
        words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        chosen = jnp.sum(jnp.where(words == ids[..., None], logits, 0.0), axis=-1)
        if smoothing:
            mean = jnp.mean(logits, axis=-1)
            chosen = (1 - smoothing) * chosen + smoothing * mean
        losses = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jnp.sum(weights * losses)

    rows, columns = ids.shape
    shards = parts_of_tokens(columns)
    columns //= shards
    # A sharded weight is gathered for every part: the fewer the better.
    size = max(1, most_logits // (rows_here(rows) * model.config.vocab_size))
    if size >= columns:
        return part(hidden, targets, weights)
    count = -(-columns // size)
    # Parts of equal size, with little padding.
    size = -(-columns // count)
    parts = [
        _cut(array, shards, count, size) for array in (hidden, targets, weights)
    ]  # [count, B, shards * size, ...]
    sums = jax.lax.map(lambda parts: jax.checkpoint(part)(*parts), tuple(parts))
    return jnp.sum(sums)


def _cut(array: jax.Array, shards: int, count: int, size: int) -> jax.Array:
    """Returns `[B, T, ...]` as `[count, B, shards * size, ...]`, zeros in the room.

    A part has columns of every shard, so that all devices work on each.
    """
    rows, length, *rest = array.shape
    own = array.reshape(rows, shards, length // shards, *rest)
    padding = [(0, 0)] * own.ndim
    padding[2] = (0, count * size - own.shape[2])
    padded = jnp.pad(own, padding).reshape(rows, shards, count, size, *rest)
    parts = jnp.moveaxis(padded, 2, 0)
    return parts.reshape(count, rows, shards * size, *rest)

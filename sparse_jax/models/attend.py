"""Attention: queries meet keys, those of a cache too, in groups or not."""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.models.dropout import dropout

__all__ = ["attend", "split_heads"]

# Scores of one example held at a time, in entries: 64 MiB of float32. At 2,048 tokens
# and 32 heads all of them are 512 MiB, several times over in the backward pass.
_MOST_SCORES = 2**24
# Fewer queries at a time would leave a matrix unit idle.
_FEWEST_QUERIES = 128


def split_heads(x: jax.Array, head_size: int) -> jax.Array:
    """Returns `[B, T, H * K]` as `[B, T, H, K]`.

    The barrier keeps the layout that attention wants from reaching the weights: the
    compiler of TPUs would hold transposed copies of all layers of a stack (measured:
    3 of the 5.3 GiB of temporaries of a LoRA step of Llama-7B).
    """
    x = jax.lax.optimization_barrier(x)
    return x.reshape(*x.shape[:-1], -1, head_size)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    rate: float,
    key: jax.Array | None,
) -> jax.Array:
    """Mixes values by how well their keys meet the queries.

        y = softmax(q k^T / sqrt(K) + bias) v

    The softmax is taken in float32. Long sequences are taken some queries at a time,
    and scores computed again for the gradient.

    Args:
      q: queries, shape=(B, T, H, K).
      k: keys, shape=(B, S, G, K), where G divides H.
      v: values, shape=(B, S, G, K).
      bias: of the scores, broadcast to (B, H, T, S); None is zero.
      mask: True where a key is seen, bool, broadcast to (B, H, T, S).
      rate: fraction of the weights that dropout takes.
      key: source of the dropout; None turns it off.

    Example:
      >>> q, mask = jnp.ones((1, 2, 1, 4)), jnp.tri(2, dtype=bool)[None, None]
      >>> v = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1) * q
      >>> attend(q, q, v, None, mask, 0.0, None)[0, :, 0, 0]
      Array([1., 2.], dtype=float32)
    """
    if key is None or rate == 0:
        return _attend_in_parts(q, k, v, bias, mask)
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores), rate, key).astype(v.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights, v)


def _attend_in_parts(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, mask: jax.Array
) -> jax.Array:
    """Attends without dropout, some queries at a time where there are many."""
    length, heads = q.shape[1:3]
    size = max(_FEWEST_QUERIES, _MOST_SCORES // (heads * k.shape[1]))
    if size >= length:
        return jax.nn.dot_product_attention(q, k, v, bias, mask=mask)
    count = -(-length // size)
    # Parts of equal size, with little padding.
    size = -(-length // count)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        """Returns the parts of the queries' axis, one for each round of the loop."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * size - length)
        # Padded queries see every key: none is left without a finite score.
        x = jnp.pad(x, padding, constant_values=x.dtype == jnp.bool)
        axis %= x.ndim
        parts = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(parts, axis, 0)

    varying: dict[str, jax.Array] = {"q": cut(q, 1)}
    fixed: dict[str, Any] = {}
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None and array.shape[-2] > 1:
            varying[name] = cut(array, -2)
        else:
            fixed[name] = array

    @jax.checkpoint
    def part(varying: dict[str, jax.Array], k: jax.Array, v: jax.Array) -> jax.Array:
        options = {**fixed, **varying}
        q = options.pop("q")
        return jax.nn.dot_product_attention(q, k, v, **options)

    mixed = jax.lax.map(lambda varying: part(varying, k, v), varying)
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(q.shape[0], count * size, *q.shape[2:])
    return mixed[:, :length]

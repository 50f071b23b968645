"""The attention of decoders: queries meet the keys of a cache, in groups or not."""

import jax
import jax.numpy as jnp

from sparse_jax.models.dropout import dropout

__all__ = ["attend"]


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

    The softmax is taken in float32.

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
        return jax.nn.dot_product_attention(q, k, v, bias, mask=mask)
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores), rate, key).astype(v.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights, v)

"""Attention: queries meet keys, in groups or not, those of a cache and a prefix too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from sparse_jax.models.attachment import MEMORY, Memory, Respond
from sparse_jax.models.attend_tpu import Reach, attend_in_blocks, has_kernel
from sparse_jax.models.modules import dropout
from sparse_jax.params.axes import HeadAxes, axes_of_heads

__all__ = [
    "Attended",
    "Mask",
    "Reach",
    "attend",
    "keys_first",
    "memory_of",
    "remember",
    "recompute_scores",
    "split_heads",
]


Mix = Callable[..., jax.Array]  # (q, k, v, bias, mask) -> y


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("seen", "segments", "reach"),
    meta_fields=("reaches",),
)
@dataclass(frozen=True)
class Mask:
    """Which keys the queries see: one by one, and by the rule that kernels know.

    Attributes:
      seen: True where a key is seen, bool, broadcast to (B, H, T, S).
      segments: shape=(B, T), int32; tokens of one number see each other as far as they
        reach. None if that does not say it all.
      reach: which of the reaches holds, shape=(), int32.
      reaches: those of all layers.
    """

    seen: jax.Array
    segments: jax.Array | None = None
    reach: jax.Array | None = None
    reaches: tuple[Reach, ...] = ()


class Attended(NamedTuple):
    """What the queries of an attention meet; S is T, or P + T with a memory."""

    k: jax.Array  # shape=(B, S, H, K)
    v: jax.Array  # shape=(B, S, H, K)
    mask: Mask
    bias: jax.Array | None  # of the scores, float32, shape=(1, 1, 1, S); None is zero


def memory_of(respond: Respond, x: jax.Array) -> Memory | None:
    """Returns what a method puts in front of the tokens of a layer, if anything."""
    nothing = lambda x: cast(jax.Array, None)
    return cast(Memory | None, respond(MEMORY, nothing, x))


def remember(memory: Memory | None, k: jax.Array, v: jax.Array, mask: Mask) -> Attended:
    """Puts a memory in front of the keys and values of a batch.

    Every token sees all of the memory, which has no position: call this after keys
    have been rotated.

    Args:
      memory: what `memory_of` returned.
      k: keys, shape=(B, T, H, K); with grouped queries H counts the groups.
      v: values, in the shape of the keys.
      mask: of these keys.

    Example:
      >>> k = jnp.ones((2, 3, 1, 4))
      >>> mask = Mask(jnp.ones((2, 1, 1, 3), bool))
      >>> memory = Memory(jnp.zeros((5, 4)), jnp.zeros((5, 4)), jnp.float32(0))
      >>> seen = remember(memory, k, k, mask)
      >>> seen.k.shape, seen.mask.seen.shape, seen.bias.shape
      ((2, 8, 1, 4), (2, 1, 1, 8), (1, 1, 1, 8))
    """
    if memory is None:
        return Attended(k, v, mask, None)
    length, num_tokens = memory.keys.shape[0], k.shape[1]
    front = lambda rows, x: jnp.concatenate(
        [
            jnp.broadcast_to(
                rows.astype(x.dtype).reshape(1, length, *x.shape[2:]),
                (x.shape[0], length, *x.shape[2:]),
            ),
            x,
        ],
        axis=1,
    )
    seen = jnp.pad(mask.seen, ((0, 0),) * 3 + ((length, 0),), constant_values=True)
    bias = jnp.concatenate([jnp.full(length, memory.bias), jnp.zeros(num_tokens)])
    bias = bias.reshape(1, 1, 1, -1)
    return Attended(front(memory.keys, k), front(memory.values, v), Mask(seen), bias)


# Scores of one example held at a time, in entries: 64 MiB of float32. At 2,048 tokens
# and 32 heads all of them are 512 MiB, several times over in the backward pass.
_MOST_SCORES = 2**24
# Fewer queries at a time would leave a matrix unit idle.
_FEWEST_QUERIES = 128
# Keys for each number of a head from which on scores are recomputed: there are four
# times as many numbers in them as in the queries then. With SmolLM2-135M, 256 tokens
# and float32 on a CPU, they are 289 of 2,676 MiB at the peak of LoRA, and recomputing
# them takes no time that could be told from noise.
_MANY_KEYS = 4

# Whether what is traced recomputes scores in its backward pass.
_RECOMPUTES: ContextVar[bool] = ContextVar("recomputes", default=False)


@contextmanager
def recompute_scores(recomputes: bool) -> Iterator[None]:
    """Lets `attend` recompute scores in the backward pass of what is traced here."""
    token = _RECOMPUTES.set(recomputes)
    try:
        yield
    finally:
        _RECOMPUTES.reset(token)


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
    mask: Mask,
    rate: float,
    key: jax.Array | None,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Mixes values by how well their keys meet the queries.

        y = softmax(cap tanh(scale q k^T / cap) + bias) v

    Without `cap` the scores are `scale q k^T`. The softmax is taken in float32. Long
    sequences are taken some queries at a time, and scores recomputed for the gradient;
    on a TPU in bfloat16 by a kernel, where there is neither a bias nor dropout. What a
    token that sees no key mixes is then another number. Inside `recompute_scores`,
    scores of many keys are recomputed for the gradient too, without dropout.

    Args:
      q: queries, shape=(B, T, H, K).
      k: keys, shape=(B, S, G, K), where G divides H.
      v: values, shape=(B, S, G, K).
      bias: of the scores, broadcast to (B, H, T, S); None is zero.
      mask: which keys are seen.
      rate: fraction of the weights that dropout takes.
      key: source of the dropout; None turns it off.
      scale: of the scores; None is 1 / sqrt(K).
      cap: bound of the scores; None has none.

    Example:
      >>> q, mask = jnp.ones((1, 2, 1, 4)), Mask(jnp.tri(2, dtype=bool)[None, None])
      >>> v = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1) * q
      >>> attend(q, q, v, None, mask, 0.0, None)[0, :, 0, 0]
      Array([1., 2.], dtype=float32)
    """
    drops = key is not None and rate > 0
    if mask.segments is not None and bias is None and not drops and has_kernel(q):
        rule = (mask.segments, cast(jax.Array, mask.reach))
        options = {"reaches": mask.reaches, "scale": scale, "cap": cap}
        return attend_in_blocks(q, k, v, *rule, **options)
    if q.shape[1] == 1 and not drops:
        return _mixed_one(q, k, v, bias, mask.seen, scale=scale, cap=cap)
    if cap is None and not drops:
        mix: Mix = partial(jax.nn.dot_product_attention, scale=scale)
    else:
        mix = partial(_mixed, scale=scale, cap=cap, rate=rate, key=key)
    if drops:
        return mix(q, k, v, bias, mask.seen)
    axes = axes_of_heads(q.shape[0], k.shape[2], q.shape[1])
    if axes is None or axes.tokens is None:
        return _attend_in_parts(mix, q, k, v, bias, mask.seen)
    return _attend_to_all(mix, q, k, v, bias, mask.seen, axes)


def _attend_to_all(
    mix: Mix,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    axes: HeadAxes,
) -> jax.Array:
    """Attends where tokens are sharded: every device has its queries and all keys."""

    def spec(x: jax.Array) -> jax.P:
        """Returns how a mask or a bias, broadcast to (B, H, T, S), is sharded."""
        own = (axes.rows, axes.heads, axes.tokens)
        return jax.P(
            *(
                axis if size > 1 else None
                for axis, size in zip(own, x.shape, strict=False)
            )
        )

    more = {"mask": mask} if bias is None else {"mask": mask, "bias": bias}
    queries, keys = (
        jax.P(axes.rows, axes.tokens, axes.heads),
        jax.P(axes.rows, None, axes.heads),
    )

    def here(q: jax.Array, k: jax.Array, v: jax.Array, more: dict) -> jax.Array:
        return _attend_in_parts(mix, q, k, v, more.get("bias"), more["mask"])

    # The compiler would take the queries apart that a loop takes together.
    local = jax.shard_map(
        here,
        in_specs=(queries, keys, keys, {name: spec(x) for name, x in more.items()}),
        out_specs=queries,
        check_vma=False,
    )
    return local(q, k, v, more)


def _mixed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    *,
    scale: float | None,
    cap: float | None,
    rate: float,
    key: jax.Array | None,
) -> jax.Array:
    """Attends with dropout or a bound, which the attention of JAX has not."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    scores = scores if bias is None else scores + bias
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores), rate, key).astype(v.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights, v)


def keys_first(keys: jax.Array, queries: jax.Array) -> jax.Array:
    """Returns the float32 products of few queries and many keys, queries @ keys^T.

    As a product of few rows with a matrix that is to be transposed XLA:CPU takes 250 ms
    for 8 rows and 49,152 of 576 numbers, and 30 with that matrix first. The barrier
    keeps it from exchanging the two again.

    Args:
      keys: shape=(..., S, K).
      queries: shape=(..., R, K).

    Example:
      >>> keys_first(jnp.array([[1.0], [2.0]]), jnp.array([[3.0]])).tolist()
      [[3.0, 6.0]]
    """
    turned = jnp.swapaxes(queries, -1, -2)
    scores = jnp.matmul(keys, turned, preferred_element_type=jnp.float32)
    return jnp.swapaxes(jax.lax.optimization_barrier(scores), -1, -2)


def _mixed_one(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    *,
    scale: float | None,
    cap: float | None,
) -> jax.Array:
    """Attends with one query a row."""
    rows, _, heads, size = q.shape
    q = q.reshape(rows, k.shape[2], -1, size)
    scores = keys_first(jnp.swapaxes(k, 1, 2), q).reshape(rows, heads, 1, -1)
    scores = scores * (size**-0.5 if scale is None else scale)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    scores = scores if bias is None else scores + bias
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    weights = weights.reshape(*q.shape[:-1], -1)
    mixed = jnp.einsum("BGRS,BSGK->BGRK", weights, v)
    return mixed.reshape(rows, 1, heads, size)


def _attend_in_parts(
    mix: Mix,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
) -> jax.Array:
    """Attends without dropout, some queries at a time where there are many."""
    length, heads = q.shape[1:3]
    size = max(_FEWEST_QUERIES, _MOST_SCORES // (heads * k.shape[1]))
    if size >= length:
        recomputes = _RECOMPUTES.get() and k.shape[1] >= _MANY_KEYS * q.shape[-1]
        # The compiler cannot merge the two passes, which are loops of their own; where
        # a layer runs forward again anyway, its scores should be computed once.
        mix = jax.checkpoint(mix, prevent_cse=False) if recomputes else mix
        return mix(q, k, v, bias, mask)
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
    fixed: dict[str, jax.Array | None] = {}
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None and array.shape[-2] > 1:
            varying[name] = cut(array, -2)
        else:
            fixed[name] = array

    @jax.checkpoint
    def part(varying: dict[str, jax.Array], k: jax.Array, v: jax.Array) -> jax.Array:
        options = {**fixed, **varying}
        q = options.pop("q")
        return mix(q, k, v, **options)

    mixed = jax.lax.map(lambda varying: part(varying, k, v), varying)
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(q.shape[0], count * size, *q.shape[2:])
    return mixed[:, :length]

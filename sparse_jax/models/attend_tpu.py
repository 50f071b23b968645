"""Attention in blocks on TPUs, by the kernel that JAX ships.

Scores live in the memory of a core, block by block, in both passes, and blocks that no
query sees are left out. At 2,048 tokens that takes a quarter of the time of XLA's
softmax by the compiler's schedule (experiments/benchmarks/attention.py).

References:
  Dao, 2023. https://arxiv.org/abs/2307.08691
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from sparse_jax.params.axes import axes_of_heads, parts_of_tokens, platform

__all__ = ["Reach", "attend_in_blocks", "has_kernel"]

# Short rows have few scores, and would fill no block.
_FEWEST_TOKENS = 256
# Blocks of 512 take half of the instructions of those of 256; those of 1,024 a fifth
# less than 512, and three times as long to compile.
_BLOCKS = (256, 512)
# One backward kernel takes a quarter less time than two, and keeps a gradient of the
# queries for every block of keys.
_MOST_FUSED = 4


class Reach(NamedTuple):
    """How far a token sees in its segment; None is to the end of it."""

    back: int | None = None
    ahead: int | None = None


def has_kernel(q: jax.Array) -> bool:
    """Returns whether the kernel can mix for queries `[B, T, H, K]`.

    Float32 keeps the products that it has everywhere else.
    """
    is_long = q.shape[1] >= _FEWEST_TOKENS
    return platform() == "tpu" and q.dtype == jnp.bfloat16 and is_long


def attend_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    reach: jax.Array,
    *,
    reaches: Sequence[Reach],
    scale: float | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns what `attend` returns, without a score in memory.

    Args:
      q: queries, shape=(B, T, H, K), bfloat16.
      k: keys, shape=(B, T, G, K), where G divides H.
      v: values, in the shape of the keys.
      segments: shape=(B, T), int32; a token sees those of its own number.
      reach: which of `reaches` holds, shape=(), int32.
      reaches: what there is to choose from.
      scale, cap: as for `attend`.
      interpret: whether to run on any device, slowly.
    """
    length, width = q.shape[1], q.shape[-1]
    parts = parts_of_tokens(length)
    block = _BLOCKS[length > parts * _BLOCKS[0]]
    # What is added is a segment of its own, of which nothing is kept.
    short = -length % (parts * block)
    rows = lambda x: jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0)))
    segments = jnp.pad(segments, ((0, 0), (0, short)), constant_values=-1)
    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)
    q, k, v = (jnp.swapaxes(rows(x), 1, 2) for x in (q, k, v))
    axes, heads = axes_of_heads(q.shape[0], k.shape[1], length), q.shape[1]
    if axes is not None and axes.heads is not None:
        heads //= jax.sharding.get_abstract_mesh().shape[axes.heads]
    options = {"block": block, "cap": cap, "interpret": interpret, "parts": parts}
    shape = heads, q.shape[2]
    made = [_kernel(one, *shape, **options) for one in reaches]
    # On a mesh always: the compiler of TPUs shards no kernel by itself.
    mix = _mix
    if axes is not None:
        mesh = jax.sharding.get_abstract_mesh()
        by_part = jax.NamedSharding(mesh, jax.P(None, axes.tokens))
        whole = jax.NamedSharding(mesh, jax.P(None, None))
        places = [whole if one == Reach() else by_part for one in reaches]
        specs = (
            jax.P(axes.rows, axes.heads, axes.tokens),
            *2 * [jax.P(axes.rows, axes.heads)],
            jax.P(axes.rows, axes.tokens),
            jax.P(axes.rows),
            jax.P(),
            *(
                kernel.manual_sharding_spec(place)
                for kernel, place in zip(made, places, strict=True)
            ),
        )
        # Kernels do not say over which axes their results vary.
        mix = jax.shard_map(mix, in_specs=specs, out_specs=specs[0], check_vma=False)
    y = mix(q, k, v, segments, segments, reach, *made)
    return jnp.swapaxes(y, 1, 2)[:, :length]


def _mix(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    own: jax.Array,
    segments: jax.Array,
    reach: jax.Array,
    *made: kernels.SplashAttentionKernel,
) -> jax.Array:
    """Calls the kernel of a reach for heads `[B, H, T, K]` that lie on one device."""

    def branch(kernel: kernels.SplashAttentionKernel) -> jax.Array:
        each = lambda q, k, v, own, segments: kernel(
            q, k, v, kernels.SegmentIds(q=own, kv=segments)
        )
        return cast(jax.Array, jax.vmap(each)(q, k, v, own, segments))

    if len(made) == 1:
        return branch(made[0])
    return jax.lax.switch(reach, [partial(branch, kernel) for kernel in made])


def _kernel(
    reach: Reach,
    heads: int,
    length: int,
    *,
    parts: int,
    block: int,
    cap: float | None,
    interpret: bool,
) -> kernels.SplashAttentionKernel:
    """Returns the kernel for rows of some length, whose queries are in equal parts."""
    sizes = ("block_q", "block_kv", "block_kv_compute")
    sizes += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    is_fused = length // block <= _MOST_FUSED
    sizes += () if is_fused else ("block_q_dq", "block_kv_dq")
    # The mask of a block follows from where it is: nothing of the size of all scores
    # is made.
    square, shards = (length, length), parts
    if reach == Reach():
        # The same for every part; JAX 0.10 has no table of several without a mask.
        mask, shards = masks.FullMask((length // parts, length)), 1
    elif reach == Reach(ahead=0):
        mask = masks.CausalMask(square, shard_count=parts)
    else:
        mask = masks.LocalMask(square, reach, 0, shard_count=parts)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            **dict.fromkeys(sizes, block), use_fused_bwd_kernel=is_fused
        ),
        attn_logits_soft_cap=cap,
        head_shards=1,
        q_seq_shards=shards,
        interpret=interpret,
    )

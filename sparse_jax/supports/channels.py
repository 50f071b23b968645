"""Channels: the gradient of a product at chosen rows or columns of its kernel alone.

The gradient of the kernel of y = x @ w is x^T dy. Its rows R need the inputs R alone,
x[:, R]^T dy, and its columns C the outputs C alone, x^T dy[:, C]: the product shrinks
with the density, and no dense gradient is ever made.
"""

from collections.abc import Sequence

import jax
from jax import lax

from sparse_jax.params.axes import BATCH_AXES, is_one_cpu
from sparse_jax.supports.blocks import Blocks
from sparse_jax.supports.layout import Layout
from sparse_jax.supports.stacks import GetOptions

__all__ = ["are_channels", "gradient_of_channels", "kept_of_input", "taken_channels"]

_DISTINCT: GetOptions = {
    "mode": "promise_in_bounds",
    "unique_indices": True,
    "indices_are_sorted": True,
}
# Rows of the supports of shards end with numbers past the end.
_IN_SHARDS: GetOptions = {**_DISTINCT, "mode": "fill", "fill_value": 0}


def are_channels(layout: Layout, shape: Sequence[int]) -> bool:
    """Returns whether what is chosen in a kernel are rows, or are columns.

    Example:
      >>> are_channels(Blocks(rows=1), (4, 8))
      True
      >>> are_channels(Blocks(rows=4, columns=4), (4, 8))
      False
    """
    is_whole = isinstance(layout, Blocks) and (
        layout.rows is None,
        layout.columns is None,
    )
    return len(shape) == 2 and is_whole in [(True, False), (False, True)]


def kept_of_input(layout: Blocks, x: jax.Array, support: jax.Array) -> jax.Array:
    """Returns what of the input [..., D] of a product the backward pass needs."""
    return taken_channels(layout, x, support) if layout.columns is None else x


def gradient_of_channels(
    layout: Blocks, kept: jax.Array, dy: jax.Array, support: jax.Array
) -> jax.Array:
    """Returns the gradient of the kernel of a product at a support.

    Args:
      layout: of rows or columns, as `are_channels` says.
      kept: as `kept_of_input` returns it.
      dy: gradient of the output, [..., F].
      support: of the kernel [D, F].

    Returns:
      The gradient in the shape of packed values.

    Example:
      >>> import jax.numpy as jnp
      >>> x, dy = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[10.0, 20.0]])
      >>> rows, support = Blocks(rows=1, columns=None), jnp.array([0, 2])
      >>> kept = kept_of_input(rows, x, support)
      >>> gradient_of_channels(rows, kept, dy, support)
      Array([[10., 20.],
             [30., 60.]], dtype=float32)
    """
    if layout.columns is None:
        packed = _kernel_gradient(kept, dy)
    else:
        packed = _kernel_gradient(taken_channels(layout, dy, support), kept)
        # The entries of several columns lie row by row.
        runs = packed.reshape(-1, layout.columns, packed.shape[-1])
        packed = runs.swapaxes(1, 2)
    packed = packed.reshape(*support.shape, -1)
    if layout.shards is None:
        return packed
    return lax.with_sharding_constraint(packed, layout.packed_spec(False))


def taken_channels(layout: Blocks, x: jax.Array, support: jax.Array) -> jax.Array:
    """Returns the chosen channels of an array [..., channels].

    Example:
      >>> import jax.numpy as jnp
      >>> x, support = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([0, 2])
      >>> taken_channels(Blocks(rows=1, columns=None), x, support)
      Array([[1., 3.]], dtype=float32)
    """
    width, axis = (layout.rows, 0) if layout.columns is None else (layout.columns, 1)
    assert width is not None
    lead = x.shape[:-1]
    # The compiler of TPUs turns the array and takes whole rows of it. A product with
    # ones takes six tenths of the time there, but would round float32.
    if support.ndim == 1:
        runs = x.reshape(*lead, -1, width)
        runs = runs.at[..., support, :].get(**_DISTINCT)
        return runs.reshape(*lead, -1)
    assert layout.shards is not None
    if {*layout.shards.names[axis]} & {*BATCH_AXES}:
        # Devices along these axes see different examples, and all channels of them.
        support = lax.with_sharding_constraint(support, jax.P())
    shards = x.reshape(*lead, len(support), -1, width)

    def take(shard: jax.Array, numbers: jax.Array) -> jax.Array:
        return shard.at[..., numbers, :].get(**_IN_SHARDS)

    taken = jax.vmap(take, in_axes=(-3, 0), out_axes=-3)(shards, support)
    return taken.reshape(*lead, -1)


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns x^T dy, [D, F] of [..., D] and [..., F]."""
    # XLA:CPU would write a transposed copy of arrays of rank 3, entry by entry.
    if is_one_cpu():
        x, dy = (array.reshape(-1, array.shape[-1]) for array in (x, dy))
    lead = tuple(range(x.ndim - 1))
    return lax.dot_general(x, dy, ((lead, lead), ((), ())))

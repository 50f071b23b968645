"""Kernels for TPUs that read and write chosen rows of every group of 128.

A register of a TPU has 128 lanes, and moving a number to another lane is slow. Here
every column stays in its lane: the rows of a group are told apart by comparing whole
registers. Numbers are moved as bits, in words of 32, so that they arrive exactly; one
layer at a time, because words of bfloat16 take twice the bytes of what is packed
(1.3 GiB for the stacks of Llama-7B at 5 %).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

__all__ = ["GROUP", "get_rows", "has_kernel", "set_rows"]

GROUP = 128

# A block has the groups that fill a tile of bytes, and 2 MiB.
_GROUPS, _BLOCK = 32, 1 << 21
# Loops over the chosen rows of a group are unrolled, and their tables have to fit.
_MOST_ROWS = 16
_DTYPES = (jnp.float32, jnp.bfloat16)
_UPPER, _LOWER = -(1 << 16), (1 << 16) - 1  # halves of a word


def has_kernel(dtype: DTypeLike, count: int) -> bool:
    """Returns whether the kernels can reach `count` rows of a group of some dtype."""
    return dtype in _DTYPES and count <= _MOST_ROWS


def get_rows(
    stack: jax.Array, layers: jax.Array, rows: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Returns chosen entries of some layers of a stack of matrices.

        out[i, j, g, c] = stack[layers[i], 128 * g + rows[i, j, g, c], c]

    Args:
      stack: shape=(L, R, C), float32 or bfloat16; the last of G = ceil(R / 128)
        groups may have fewer rows.
      layers: numbers of layers, shape=(n,), int32.
      rows: rows within their groups, shape=(n, m, G, C), uint8.
      interpret: whether to run on any device, slowly.

    Returns:
      The entries, in the shape of `rows` and the dtype of `stack`.
    """
    if len(rows) > 1:
        one = lambda layer, rows: get_rows(
            stack, layer[None], rows[None], interpret=interpret
        )[0]
        return lax.map(lambda args: one(*args), (layers, rows))
    plan = _plan(stack, rows.shape)
    words = pl.pallas_call(
        _get_block,
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.int32),
        grid_spec=_specs(plan, [plan.matrix, plan.table], plan.table),
        interpret=interpret,
        name="get_rows",
    )(layers, stack, rows)
    return _from_words(words, stack.dtype)


def set_rows(
    stack: jax.Array,
    layers: jax.Array,
    rows: jax.Array,
    values: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Returns a stack of matrices with chosen entries replaced, in place if donated.

    Args:
      stack, layers, rows, interpret: as for `get_rows`; no layer is there twice.
      values: in the shape of `rows` and the dtype of `stack`.
    """
    if len(rows) > 1:

        def write(i: jax.Array, stack: jax.Array) -> jax.Array:
            own = [lax.dynamic_slice_in_dim(x, i, 1) for x in (layers, rows, values)]
            return set_rows(stack, *own, interpret=interpret)

        return lax.fori_loop(0, len(rows), write, stack)
    plan = _plan(stack, rows.shape)
    return pl.pallas_call(
        _set_block,
        out_shape=jax.ShapeDtypeStruct(stack.shape, stack.dtype),
        grid_spec=_specs(plan, [plan.matrix, plan.table, plan.table], plan.matrix),
        # What no block visits, such as other layers, stays as it is.
        input_output_aliases={1: 0},
        interpret=interpret,
        name="set_rows",
    )(layers, stack, rows, _to_words(values))


class _Plan(NamedTuple):
    """How arrays are split into the blocks of a kernel."""

    grid: tuple[int, int, int]  # layers, blocks of groups, blocks of columns
    matrix: pl.BlockSpec
    table: pl.BlockSpec
    wide: pl.MemoryRef  # room for a table in words


def _plan(stack: jax.Array, tables: tuple[int, ...]) -> _Plan:
    """Returns the blocks of a stack, and of tables of some shape."""
    count, most, num_groups, num_columns = tables
    groups = min(_GROUPS, num_groups)
    columns = min(_BLOCK // (_GROUPS * GROUP * stack.dtype.itemsize), num_columns)
    return _Plan(
        grid=(count, pl.cdiv(num_groups, groups), pl.cdiv(num_columns, columns)),
        matrix=pl.BlockSpec(
            (None, groups * GROUP, columns), lambda i, g, c, layers: (layers[i], g, c)
        ),
        table=pl.BlockSpec(
            (None, most, groups, columns), lambda i, g, c, layers: (i, 0, g, c)
        ),
        wide=pltpu.VMEM((most, groups, columns), jnp.int32),
    )


def _specs(
    plan: _Plan, ins: list[pl.BlockSpec], out: pl.BlockSpec
) -> pltpu.PrefetchScalarGridSpec:
    """Returns the specification of a call whose first argument numbers the layers."""
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=plan.grid,
        in_specs=ins,
        out_specs=out,
        scratch_shapes=[plan.wide],
    )


def _get_block(
    layers: jax.Ref, x: jax.Ref, rows: jax.Ref, out: jax.Ref, wide: jax.Ref
) -> None:
    """Reads the entries of a block."""
    del layers
    # Single rows can be loaded of words only.
    wide[...] = rows[...].astype(jnp.int32)

    def group(g: jax.Array, _: None) -> None:
        words = pltpu.bitcast(x[pl.ds(g * GROUP, GROUP), :], jnp.int32)
        number = lax.broadcasted_iota(jnp.int32, words.shape, 0)
        share = GROUP // words.shape[0]
        for j in range(rows.shape[0]):
            row = wide[j, pl.ds(g, 1), :]
            # One word of a column is not zero.
            hit = jnp.where(number == row >> (share - 1), words, 0)
            word = jnp.sum(hit, axis=0, keepdims=True)
            if share == 2:
                upper = lax.shift_right_logical(word, 16)
                word = jnp.where(row & 1 == 1, upper, word & _LOWER)
            out[j, pl.ds(g, 1), :] = word

    lax.fori_loop(0, rows.shape[1], group, None)


def _set_block(
    layers: jax.Ref,
    x: jax.Ref,
    rows: jax.Ref,
    values: jax.Ref,
    out: jax.Ref,
    wide: jax.Ref,
) -> None:
    """Writes the entries of a block."""
    del layers
    wide[...] = rows[...].astype(jnp.int32)

    def group(g: jax.Array, _: None) -> None:
        words = pltpu.bitcast(x[pl.ds(g * GROUP, GROUP), :], jnp.int32)
        number = lax.broadcasted_iota(jnp.int32, words.shape, 0)
        share = GROUP // words.shape[0]
        for j in range(rows.shape[0]):
            row, value = wide[j, pl.ds(g, 1), :], values[j, pl.ds(g, 1), :]
            new = value
            if share == 2:
                is_upper = row & 1 == 1
                other = words & jnp.where(is_upper, _LOWER, _UPPER)
                new = other | jnp.where(is_upper, value << 16, value)
            words = jnp.where(number == row >> (share - 1), new, words)
        out[pl.ds(g * GROUP, GROUP), :] = pltpu.bitcast(words, out.dtype)

    lax.fori_loop(0, rows.shape[1], group, None)


def _to_words(x: jax.Array) -> jax.Array:
    """Returns the bits of numbers, at the lower end of words."""
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32)


def _from_words(words: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the numbers that have these bits."""
    if dtype == jnp.float32:
        return lax.bitcast_convert_type(words, jnp.float32)
    return lax.bitcast_convert_type(words.astype(jnp.uint16), dtype)

"""The axes of a mesh, and what a model has to know of them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import jax
from jax.sharding import AxisType

__all__ = [
    "BATCH_AXES",
    "DATA",
    "FSDP",
    "SEQUENCE",
    "TENSOR",
    "HeadAxes",
    "axes_of_heads",
    "inside_replicas",
    "is_one_cpu",
    "keep_batch_sharded",
    "keep_rows_whole",
    "platform",
    "rows_here",
]

DATA, FSDP, TENSOR, SEQUENCE = "data", "fsdp", "tensor", "sequence"
# Devices along these axes see different examples.
BATCH_AXES = (DATA, FSDP)

# Axes that an enclosing map over replicas has taken.
_MAPPED: ContextVar[tuple[str, ...]] = ContextVar("mapped", default=())


@contextmanager
def inside_replicas(axes: tuple[str, ...]) -> Iterator[None]:
    """Marks what is traced as mapped over some axes, with `spmd_axis_name`."""
    token = _MAPPED.set((*_MAPPED.get(), *axes))
    try:
        yield
    finally:
        _MAPPED.reset(token)


def keep_batch_sharded(x: jax.Array) -> jax.Array:
    """Constrains `[B, T, ...]` to be sharded along rows and tokens, and nothing else.

    Left alone, the compiler may shard the width of activations like that of the
    weights, and then move activations where it should gather a weight. Without a mesh,
    and for batches that the devices do not divide, there is no constraint.
    """
    sizes = _automatic(BATCH_AXES)
    if not sizes or x.shape[0] % math.prod(sizes.values()):
        return x
    tokens = SEQUENCE if parts_of_tokens(x.shape[1]) > 1 else None
    return jax.lax.with_sharding_constraint(x, jax.P(tuple(sizes), tokens))


def parts_of_tokens(length: int) -> int:
    """Returns into how many parts the tokens of rows are sharded.

    Example:
      >>> parts_of_tokens(8)  # without a mesh
      1
    """
    parts = _automatic((SEQUENCE,)).get(SEQUENCE, 1)
    return parts if length % parts == 0 else 1


def platform() -> str:
    """Returns what a program is for, such as "tpu": where the mesh is, if there is one.

    The devices of a mesh may be absent, as those that a plan is for.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def is_one_cpu() -> bool:
    """Returns whether a program is for the CPU, and for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and math.prod(mesh.shape.values()) == 1


class HeadAxes(NamedTuple):
    """The mesh axes of the rows, the heads and the queries of an attention."""

    rows: tuple[str, ...]
    heads: str | None
    tokens: str | None


def axes_of_heads(rows: int, heads: int, length: int) -> HeadAxes | None:
    """Returns the axes that divide an attention, None where one device does it all.

    Example:
      >>> axes_of_heads(8, 4, 16) is None  # without a mesh
      True
    """
    sizes = _automatic((*BATCH_AXES, TENSOR))
    if not sizes:
        return None
    tensor = sizes.pop(TENSOR, 1)
    batch = tuple(sizes) if rows % math.prod(sizes.values()) == 0 else ()
    by_head = TENSOR if tensor > 1 and heads % tensor == 0 else None
    return HeadAxes(batch, by_head, SEQUENCE if parts_of_tokens(length) > 1 else None)


def rows_here(rows: int) -> int:
    """Returns the examples of a batch that one device sees.

    Example:
      >>> rows_here(8)  # without a mesh
      8
    """
    shards = math.prod(_automatic(BATCH_AXES).values())
    return rows // shards if rows % shards == 0 else rows


def keep_rows_whole(table: jax.Array) -> jax.Array:
    """Gathers a table `[V, D]` along "fsdp"; its rows stay sharded along "tensor".

    A lookup then moves the table along "fsdp" as every other weight moves when it is
    used, instead of moving activations.
    """
    sizes = _automatic((FSDP, TENSOR))
    if not sizes:
        return table
    tensor = sizes.get(TENSOR, 1)
    rows = TENSOR if tensor > 1 and table.shape[0] % tensor == 0 else None
    return jax.lax.with_sharding_constraint(table, jax.P(rows))


def _automatic(axes: tuple[str, ...]) -> dict[str, int]:
    """Returns the sizes of automatic axes; none where a mesh has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if math.prod(mesh.shape.values()) == 1:
        return {}
    return {
        axis: mesh.shape[axis]
        for axis in axes
        if kinds.get(axis) == AxisType.Auto and axis not in _MAPPED.get()
    }

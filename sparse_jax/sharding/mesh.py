"""The mesh: devices in a box with the axes data, fsdp, tensor and sequence."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from sparse_jax.errors import InputError
from sparse_jax.params.axes import SEQUENCE

__all__ = ["MeshShape", "make_mesh", "mesh_of", "parse_mesh"]


class MeshShape(NamedTuple):
    """The number of devices along every axis.

    Replicas along `data` hold the same weights and exchange gradients of what is
    trained. Along `fsdp` every weight is sharded, and gathered when it is used. Along
    `tensor` the heads and the width of the layers are sharded, and never gathered.
    Along `sequence` the tokens of a row are sharded, and keys and values are gathered.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    @property
    def size(self) -> int:
        """Devices in all."""
        return math.prod(self)

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.axes.items())

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of the axes of a mesh, which has "sequence" only if it is used."""
        sizes = self._asdict()
        return {n: size for n, size in sizes.items() if n != SEQUENCE or size > 1}


def parse_mesh(text: str) -> MeshShape:
    """Returns the shape written as `axis=size,...`; axes left out have size 1.

    Raises:
      InputError: if an axis is unknown or named twice, or a size is not positive.

    Example:
      >>> parse_mesh("data=2,fsdp=4")
      MeshShape(data=2, fsdp=4, tensor=1, sequence=1)
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        known = axis in MeshShape._fields and axis not in sizes
        if not known or not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"`mesh` must be sizes of {', '.join(MeshShape._fields)}, such as "
                f"data=2,fsdp=4, got {text!r}."
            )
        sizes[axis] = int(size)
    return MeshShape(**sizes)


def make_mesh(
    shape: MeshShape,
    *,
    devices: Sequence[Any] | None = None,
    axis_type: AxisType = AxisType.Auto,
) -> jax.sharding.Mesh:
    """Returns the mesh of a shape over all devices of all processes.

    Args:
      shape: its size is the number of devices.
      devices: None is `jax.devices()`; others may be those of a topology that is only
        compiled for.
      axis_type: under `Explicit` axes the types of a program's arrays have their
        shardings; the step runs the same either way.

    Raises:
      InputError: if the product of the axes is not the number of devices.

    Example:
      >>> make_mesh(MeshShape(), devices=jax.devices()[:1]).axis_names
      ('data', 'fsdp', 'tensor')
    """
    devices = jax.devices() if devices is None else devices
    if shape.size != len(devices):
        remedy = "Change the sizes"
        if devices[0].platform == "cpu":
            remedy += f", or simulate with --devices {shape.size}"
        raise InputError(
            f"`mesh` must have as many devices as there are, {len(devices)}, got "
            f"{shape}, which is {shape.size}. {remedy}."
        )
    sizes = shape.axes
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(axis_type,) * len(sizes),
        devices=devices,
    )


def mesh_of(text: str | None) -> jax.sharding.Mesh:
    """Returns the mesh that a text describes; None is the device that JAX would take.

    Raises:
      InputError: as `parse_mesh` and `make_mesh`.

    Example:
      >>> mesh_of(None).size
      1
    """
    if text is None:
        return make_mesh(MeshShape(), devices=[*jnp.zeros([]).devices()])
    return make_mesh(parse_mesh(text))

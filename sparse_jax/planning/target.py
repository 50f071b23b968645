"""Targets: the devices that a plan is for, present or not."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_jax.errors import InputError, first_line

__all__ = ["CHIPS", "Chip", "Target", "chip_of_gpu", "find_target"]


class Chip(NamedTuple):
    """A device. Speeds are those of the vendor's data sheet."""

    name: str
    memory: float  # bytes that a program can use
    flops: float  # bfloat16 operations a second, at most
    bandwidth: float  # bytes of its memory a second
    links: float  # bytes a second to other chips, all links together
    clock: float = 0.0  # cycles a second of a TPU; 0 of what counts none


_GIB = 2**30
# The memory is what the compiler of TPUs says is available, less than on the label. The
# clock follows from the FLOP/s: 131,072 a cycle, 262,144 of v5p, 524,288 of v6e.
CHIPS = MappingProxyType(
    {
        "v4": Chip("v4", 15.25 * _GIB, 137.5e12, 614e9, 150e9, 1.05e9),
        "v5e": Chip("v5e", 15.75 * _GIB, 197e12, 819e9, 200e9, 1.5e9),
        "v5p": Chip("v5p", 95.74 * _GIB, 459e12, 2765e9, 600e9, 1.75e9),
        "v6e": Chip("v6e", 31.25 * _GIB, 918e12, 1640e9, 448e9, 1.75e9),
    }
)
# part of the name that the driver gives -> (operations, memory, links)
_GPUS = {
    "H200": (989e12, 4.8e12, 450e9),
    "H100": (989e12, 3.35e12, 450e9),
    "A100": (312e12, 2.0e12, 300e9),
    "L4": (121e12, 0.3e12, 32e9),
    "T4": (65e12, 0.32e12, 16e9),
}


def chip_of_gpu(kind: str, memory: float) -> Chip | None:
    """Returns a GPU by the name that its driver gives, None if it is not known.

    Example:
      >>> chip_of_gpu("NVIDIA H100 80GB HBM3", 8e10).flops
      989000000000000.0
    """
    found = next((speeds for part, speeds in _GPUS.items() if part in kind), None)
    return None if found is None else Chip(kind, memory, *found)


# A compiler for TPUs asks where it is, and waits for an answer, unless told.
_NOWHERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}
_TOPOLOGY = re.compile(r"(?:tpu )?(\w+):(\d+(?:x\d+)*)")


@dataclass(frozen=True, eq=False)
class Target:
    """Devices to compile for.

    Attributes:
      name: such as "v5e:4x4".
      devices: what programs are compiled for; none if their compiler is absent.
      count: how many devices there are.
      chip: what is known of one of them; None of a CPU.
      note: why there are no devices.
    """

    name: str
    devices: Sequence[Any]
    count: int
    chip: Chip | None
    note: str | None = None


def find_target(name: str, count: int = 1) -> Target:
    """Returns the target of a name.

    Args:
      name: "cpu", "gpu", or a topology of TPUs such as "v5e:4x4", with or without
        "tpu " before it.
      count: devices that a run would use; a topology may have more.

    Raises:
      InputError: if the name is not known, or there are fewer devices.

    Example:
      >>> find_target("cpu").count
      1
    """
    if name in ("cpu", "gpu"):
        return _present(name, count)
    found = _TOPOLOGY.fullmatch(name.strip())
    if found is None or found[1] not in CHIPS:
        known = ", ".join(f"{chip}:4x4" for chip in ("v5e", "v6e"))
        raise InputError(
            f"`target` must be cpu, gpu, or a topology of {', '.join(CHIPS)}, such as "
            f"{known}, v4:2x2x1 or v5p:2x2x1, got {name!r}. gpu is the GPU of this "
            "machine, and needs one."
        )
    return _tpu(found[1], f"{found[1]}:{found[2]}", count)


def _present(name: str, count: int) -> Target:
    """Returns devices of this machine."""
    try:
        devices = jax.devices(name)
    except RuntimeError as error:
        raise InputError(
            f"`target` must be a device of this machine, got {name!r}, and there is "
            "none. Plans for a GPU need one; those for cpu and TPUs, such as v5e:4x4, "
            "do not."
        ) from error
    _require_enough(name, len(devices), count)
    chip = None
    if name == "gpu":
        stats = devices[0].memory_stats() or {}
        chip = chip_of_gpu(devices[0].device_kind, stats.get("bytes_limit", 0))
    return Target(name, devices[:count], count, chip)


def _tpu(chip: str, name: str, count: int) -> Target:
    """Returns the devices of a topology, none if their compiler is absent."""
    for variable, value in _NOWHERE.items():
        os.environ.setdefault(variable, value)
    # Loads the compiler, which nothing else needs.
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # the compiler's own, and JAX's if there is none
        reason = first_line(error)
        if find_spec("libtpu") is not None:
            raise InputError(
                f"`target` must be a topology that {chip} has, got {name!r}: {reason}."
            ) from error
        note = (
            "the compiler of TPUs is absent (pip install libtpu): bytes of the state "
            "are exact, what the program needs beside it is not known"
        )
        return Target(name, (), count, CHIPS[chip], note)
    _require_enough(name, len(found.devices), count)
    _require_box(name, found.devices[:count])
    return Target(name, found.devices[:count], count, CHIPS[chip])


def _require_box(name: str, devices: Sequence[Any]) -> None:
    """Raises unless devices fill a box, so that a mesh can be laid on them."""
    corner = np.max([one.coords for one in devices], axis=0)
    if math.prod(corner + 1) != len(devices):
        raise InputError(
            f"`target` must have a box of the {len(devices)} devices of the mesh, got "
            f"{name!r}. Plan for a mesh of all its devices, or another topology."
        )


def _require_enough(name: str, found: int, count: int) -> None:
    """Raises unless there are as many devices as a run needs."""
    if found < count:
        raise InputError(
            f"`target` must have the {count} devices of the mesh, got {name!r}, which "
            f"has {found}."
        )

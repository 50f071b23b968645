"""Chips: what a plan has to know of a device."""

from types import MappingProxyType
from typing import NamedTuple

__all__ = ["CHIPS", "Chip", "chip_of_gpu"]


class Chip(NamedTuple):
    """A device. Speeds are those of the vendor's data sheet."""

    name: str
    memory: float  # bytes that a program can use
    flops: float  # bfloat16 operations a second, at most
    bandwidth: float  # bytes of its memory a second
    links: float  # bytes a second to other chips, all links together


_GIB = 2**30
# The memory is what the compiler of TPUs says is available, less than on the label.
CHIPS = MappingProxyType(
    {
        "v4": Chip("v4", 15.25 * _GIB, 137.5e12, 614e9, 150e9),
        "v5e": Chip("v5e", 15.75 * _GIB, 197e12, 819e9, 200e9),
        "v5p": Chip("v5p", 95.74 * _GIB, 459e12, 2765e9, 600e9),
        "v6e": Chip("v6e", 31.25 * _GIB, 918e12, 1640e9, 448e9),
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

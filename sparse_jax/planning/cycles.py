"""The time of a compiled program: the cycles that the compiler of TPUs expects."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparse_jax.planning.hlo import Instruction, instructions, shapes_of
from sparse_jax.planning.often import ALWAYS, Often
from sparse_jax.planning.operations import Kernel
from sparse_jax.planning.target import Chip

__all__ = ["Seconds", "seconds_of"]

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# What the compiler notes where it does not know, as of a scatter that adds.
_UNKNOWN = str(2**63 - 1)
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_KERNEL = "tpu_custom_call"
_NAME = re.compile(r"\s+(?:ROOT )?%?([\w\-]+)")
_SIZES = re.compile(r"slice_sizes=\{([\d,]*)\}")
# Of an entry that is gathered, and of one that is scattered, as bytes of the memory:
# what the compiler estimates for 839 thousand entries of a 4096 x 4096 matrix in
# bfloat16, by `optimal_seconds`, is 3.03 and 5.72 ns on v5e, 0.95 and 1.79 on v5p.
GATHERED, SCATTERED = 2550, 4800

Shape = tuple[int, ...]


class Seconds(NamedTuple):
    """Where the time of a program goes."""

    cycles: float  # that the compiler gives
    kernels: float
    entries: float  # gathers and scatters, of which it gives none

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def seconds_of(
    text: str,
    chip: Chip,
    kernels: Mapping[tuple[str, Shape], Kernel],
    often: Often = ALWAYS,
) -> Seconds | None:
    """Returns the time of a program on one device, None if it says no cycles.

    The compiler notes cycles beside every fusion, copy and reduction. It notes none
    beside kernels, which take their products at the peak or their blocks at the
    bandwidth of the memory; and none beside gathers and scatters of single entries.
    What is copied or sent while something else runs does not count.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      chip: the device.
      kernels: as from `kernels_of`.
      often: of loops over sampled layers, their branches, and probes.
    """
    found = list(instructions(text, often))
    moved = _moved_by_entries(found)
    cycles = in_kernels = reaching = 0.0
    for one in found:
        noted, call = _CYCLES.search(one.line), _CALLS.search(one.line)
        if noted is not None and noted[1] != _UNKNOWN:
            cycles += one.times * int(noted[1])
        elif _KERNEL in one.line:
            in_kernels += one.times * _in_kernel(one, chip, kernels)
        elif one.operation == "fusion" and call is not None:
            reaching += one.times * moved[call[1]]
    if not cycles:
        return None
    return Seconds(cycles / chip.clock, in_kernels, reaching / chip.bandwidth)


def _in_kernel(
    one: Instruction, chip: Chip, kernels: Mapping[tuple[str, Shape], Kernel]
) -> float:
    """Returns the time of one call of a kernel, 0 of one that is not known."""
    name = _NAME.match(one.line)
    shapes = shapes_of(one.result)
    kernel = kernels.get((name[1], shapes[-1])) if name and shapes else None
    if kernel is None:
        return 0.0
    return max(kernel.flops / chip.flops, kernel.bytes / chip.bandwidth)


def _moved_by_entries(found: Sequence[Instruction]) -> Mapping[str, float]:
    """Returns the bytes that gathers and scatters count as, by computation."""
    shapes: dict[tuple[str, str], Shape] = {}
    moved: dict[str, float] = defaultdict(float)
    for one in found:
        name = one.line.split(" = ")[0].split()[-1].lstrip("%")
        shapes[one.computation, name] = next(iter(shapes_of(one.result)), ())
        if one.operation == "gather":
            sizes = _SIZES.search(one.line)
            row = math.prod(map(int, sizes[1].split(","))) if sizes else 1
            number = math.prod(shapes[one.computation, name]) / row
            moved[one.computation] += GATHERED * number
        if one.operation == "scatter":
            operands = one.line.split(" scatter(")[1].split(")")[0].split(",")
            places = shapes.get((one.computation, operands[1].strip(" %")), ())
            moved[one.computation] += SCATTERED * math.prod(places)
    return moved

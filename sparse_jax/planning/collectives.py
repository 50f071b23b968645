"""Collectives: what the devices of a compiled program send each other."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sparse_jax.planning.hlo import Instruction, instructions

__all__ = ["Traffic", "collectives_of"]

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})")
_GROUPS_OF_AXES = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# The compiler of TPUs writes a reduce-scatter as an all-reduce and a slice, in a
# computation of this name, and sends what a reduce-scatter sends.
_SCATTERED = "all-reduce-scatter"
# It also cuts one collective into several pieces, to run beside other work: they lie in
# computations of these names and have one channel. (So have others, when they were put
# together from several.)
_OF_PIECES = ("fused_computation", "async_collective_fusion")
# In the tuple of an asynchronous start operands come before results.
_PAIRED = ("all-gather-start", "collective-permute-start")


class Traffic(NamedTuple):
    """What is sent by collectives of one kind in one step."""

    count: int  # how often
    bytes: int  # of the larger of input and output, on each device


def collectives_of(text: str) -> Mapping[str, Traffic]:
    """Returns the collectives of a program by kind.

    Args:
      text: of `jax.stages.Compiled.as_text()`.

    Example:
      >>> text = '''
      ... ENTRY %main (x: f32[2]) -> f32[8] {
      ...   ROOT %y = f32[8]{0} all-gather(%x), replica_groups={{0,1,2,3}}
      ... }'''
      >>> collectives_of(text)
      {'all-gather': Traffic(count=1, bytes=32)}
    """
    channels: dict[Any, list[Instruction]] = {}
    for number, one in enumerate(instructions(text)):
        kind = one.operation.removesuffix("-start")
        if kind in _KINDS:
            if kind == "all-reduce" and one.computation.startswith(_SCATTERED):
                kind = "reduce-scatter"
            channel = _CHANNEL.search(one.line)
            place = (kind, -number)
            if channel is not None and one.computation.startswith(_OF_PIECES):
                place = (kind, channel[1])
            channels.setdefault(place, []).append(one)
    found: dict[str, Traffic] = {}
    for (kind, _), pieces in channels.items():
        times = min(piece.times for piece in pieces)
        before = found.get(kind, Traffic(0, 0))
        size = times * _bytes(pieces[0])
        found[kind] = Traffic(before.count + times, before.bytes + size)
    return found


def _bytes(one: Instruction) -> int:
    """Returns the bytes of the larger of input and output."""
    arrays = [_size(*array) for array in _ARRAY.findall(one.result)]
    if one.operation in _PAIRED:
        # Behind the results some have words for their own use.
        arrays = [size for size in arrays if size > 4] or arrays
        arrays = arrays[len(arrays) // 2 :]
    is_part = one.operation.startswith("reduce-scatter")
    return sum(arrays) * (_group(one.line) if is_part else 1)


def _group(line: str) -> int:
    """Returns the devices that take part in a collective."""
    found = _GROUPS.search(line)
    if found is not None:
        return int(found[1]) if found[1] else found[2].count(",") + 1
    axes = _GROUPS_OF_AXES.search(line)
    if axes is None:
        return 1
    sizes = dict(part.split("=") for part in axes[1].split(","))
    return math.prod(int(sizes[axis.strip()]) for axis in axes[2].split(","))


def _size(dtype: str, dimensions: str) -> int:
    """Returns the bytes of an array by its type in the text."""
    count = math.prod(int(n) for n in dimensions.split(",") if n)
    if dtype == "pred":
        return count
    bits = re.search(r"\d+", dtype)
    return 0 if bits is None else int(np.ceil(count * int(bits[0]) / 8))

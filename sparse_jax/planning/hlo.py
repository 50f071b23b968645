"""The text of a compiled program: its instructions, its collectives."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from sparse_jax.models.slots import SAMPLED
from sparse_jax.planning.often import ALWAYS, Often
from sparse_jax.samplers.sampler import PROBE

__all__ = ["Instruction", "Traffic", "collectives_of", "instructions", "shapes_of"]

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SIDES = re.compile(r"(true|false)_computation=%?([\w.\-]+)")
# The names that JAX gave to a loop over sampled layers, the choice in it, and a probe.
_OF_SAMPLED = re.compile(rf'op_name="[^"]*{SAMPLED}\)*/while"')
_IN_SAMPLED = re.compile(
    rf'op_name="[^"]*{SAMPLED}\)*/while/body/(?:closed_call/)?cond"'
)
_OF_PROBE = re.compile(rf'op_name="[^"]*{PROBE}\)*/cond"')
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
# The counter of a loop, where its condition reads it and where its body adds to it.
_READ = re.compile(r"%?([\w.\-]+) = [su]32\[\].* get-tuple-element\(.*\), index=(\d+)")
_ADDED = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* add\(%?([\w.\-]+), %?([\w.\-]+)\)")
_RESULTS = re.compile(r"ROOT .* tuple\((.*?)\)")


class Instruction(NamedTuple):
    """One instruction of a program."""

    operation: str  # such as "all-gather-start"
    result: str  # its type, such as "f32[8,128]{1,0}"
    line: str
    times: float  # how often it runs
    computation: str  # the name of what it is part of


def instructions(text: str, often: Often = ALWAYS) -> Iterator[Instruction]:
    """Yields the instructions of a program that are reached from its entry.

    A loop runs as often as its condition says, by comparing a counter with a constant;
    one whose end depends on the data counts once, and all branches of a choice do.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      often: of loops over sampled layers, their branches, and probes.

    Example:
      >>> text = '''
      ... %body (x: f32[2]) -> f32[2] {
      ...   ROOT %y = f32[2]{0} add(%x, %x)
      ... }
      ... %condition (x: f32[2]) -> pred[] {
      ...   %n = s32[] constant(3)
      ... }
      ... ENTRY %main (x: f32[2]) -> f32[2] {
      ...   ROOT %z = f32[2]{0} while(%x), condition=%condition, body=%body
      ... }'''
      >>> [(one.operation, one.times) for one in instructions(text)]
      [('add', 3), ('while', 1)]
    """
    entry, computations = _computations(text)
    times = _times(entry, computations, often)
    for name, lines in computations.items():
        for line in lines if times[name] else ():
            found = _OPERATION.match(line)
            if found is not None:
                yield Instruction(found[2], found[1], line, times[name], name)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """Returns the name of the entry, and the lines of every computation."""
    entry, lines = "", []
    computations: dict[str, list[str]] = {}
    for line in text.split("\n"):
        found = _COMPUTATION.match(line)
        if found is not None:
            lines = computations[found[2]] = []
            entry = found[2] if found[1] else entry
        else:
            lines.append(line)
    return entry, computations


def _times(
    entry: str, computations: dict[str, list[str]], often: Often
) -> dict[str, float]:
    """Returns how often every computation runs."""
    times: dict[str, float] = defaultdict(int)

    def visit(name: str, count: float) -> None:
        times[name] += count
        for line in computations.get(name, ()):
            for called, rounds in _calls(line, computations, often):
                visit(called, count * rounds)

    visit(entry, 1)
    return times


def _calls(
    line: str, computations: dict[str, list[str]], often: Often
) -> Iterator[tuple[str, float]]:
    """Yields the computations that an instruction runs, and how often."""
    # The end of an asynchronous operation names what its start has run.
    if "-done(" in line or "-update(" in line:
        return
    loop = _LOOP.search(line)
    if loop is not None:
        condition, body = (computations.get(loop[i], []) for i in (1, 2))
        yield loop[2], _rounds(line, condition, body, often)
    for called in _CALLED.findall(line):
        yield called, 1
    yield from _branches(line, often)


def _branches(line: str, often: Often) -> Iterator[tuple[str, float]]:
    """Yields the branches of a choice, and how often each is taken."""
    share = None
    if _IN_SAMPLED.search(line):
        share = often.trained
    elif _OF_PROBE.search(line):
        share = often.probes
    found = _BRANCHES.search(line)
    if found is not None:
        branches = [one.strip(" %") for one in found[1].split(",")]
    else:
        sides = {side: called for side, called in _SIDES.findall(line)}
        branches = [sides[side] for side in ("false", "true") if side in sides]
    for number, called in enumerate(branches):
        yield called, 1 if share is None else (1 - share, share)[number]


def _rounds(line: str, condition: list[str], body: list[str], often: Often) -> float:
    """Returns how often a loop runs, 1 if that depends on the data."""
    if _OF_SAMPLED.search(line):
        return often.layers
    known = _TRIPS.search(line)
    if known is not None:
        return int(known[1])
    limits = _constants(condition)
    step = _step(condition, body)
    return max(1, math.ceil(max(limits.values()) / step)) if limits else 1


def _step(condition: list[str], body: list[str]) -> int:
    """Returns what a body adds to the counter that a condition reads, 1 if unclear.

    Loops that overlap a product with what is sent for it go two steps at a time.
    """
    limited, read = _places(condition).values(), _places(body)
    returned = next((found[1] for found in map(_RESULTS.search, body) if found), "")
    # In front of a name there may be a comment that counts: "/*index=5*/%add.1".
    results = [one.rpartition("/")[2].strip(" %") for one in returned.split(",")]
    constants = _constants(body)
    for found in filter(None, map(_ADDED.search, body)):
        result, counter, added = found.groups()
        is_next = result in results and results.index(result) == read.get(counter)
        if is_next and read[counter] in limited and added in constants:
            return max(1, constants[added])
    return 1


def _places(lines: list[str]) -> dict[str, int]:
    """Returns which integers of its argument a computation reads, by their names."""
    found = (_READ.search(line) for line in lines)
    return {one[1]: int(one[2]) for one in found if one is not None}


def _constants(lines: list[str]) -> dict[str, int]:
    """Returns the integers of a computation by their names."""
    found = (_CONSTANT.search(line) for line in lines)
    return {one[1]: int(one[2]) for one in found if one is not None}


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


def collectives_of(text: str, often: Often = ALWAYS) -> Mapping[str, Traffic]:
    """Returns the collectives of a program by kind.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      often: as of `instructions`.

    Example:
      >>> text = '''
      ... ENTRY %main (x: f32[2]) -> f32[8] {
      ...   ROOT %y = f32[8]{0} all-gather(%x), replica_groups={{0,1,2,3}}
      ... }'''
      >>> collectives_of(text)
      {'all-gather': Traffic(count=1, bytes=32)}
    """
    channels: dict[tuple[str, int | str], list[Instruction]] = {}
    for number, one in enumerate(instructions(text, often)):
        kind = one.operation.removesuffix("-start")
        if kind in _KINDS:
            if kind == "all-reduce" and one.computation.startswith(_SCATTERED):
                kind = "reduce-scatter"
            channel = _CHANNEL.search(one.line)
            place = (kind, -number)
            if channel is not None and one.computation.startswith(_OF_PIECES):
                place = (kind, channel[1])
            channels.setdefault(place, []).append(one)
    counts: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    for (kind, _), pieces in channels.items():
        times = min(piece.times for piece in pieces)
        counts[kind] += times
        sizes[kind] += times * _bytes(pieces[0])
    return {kind: Traffic(round(counts[kind]), round(sizes[kind])) for kind in counts}


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


def shapes_of(result: str) -> list[tuple[int, ...]]:
    """Returns the shapes of the arrays in the type of a result.

    Example:
      >>> shapes_of("(f32[8,128]{1,0}, s32[])")
      [(8, 128), ()]
    """
    found = _ARRAY.findall(re.sub(r"\{[^}]*\}", "", result))
    return [tuple(int(n) for n in sizes.split(",") if n) for _, sizes in found]

"""The text of a compiled program: instructions, collectives, FLOPs."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

__all__ = ["Instruction", "Traffic", "collectives_of", "count_flops", "instructions"]

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
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
    times: int  # how often it runs
    computation: str  # the name of what it is part of


def instructions(text: str) -> Iterator[Instruction]:
    """Yields the instructions of a program that are reached from its entry.

    A loop runs as often as its condition says, by comparing a counter with a constant;
    one whose end depends on the data counts once.

    Args:
      text: of `jax.stages.Compiled.as_text()`.

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
    times = _times(entry, computations)
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


def _times(entry: str, computations: dict[str, list[str]]) -> Counter[str]:
    """Returns how often every computation runs."""
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations.get(name, ()):
            for called, rounds in _calls(line, computations):
                visit(called, count * rounds)

    visit(entry, 1)
    return times


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """Yields the computations that an instruction runs, and how often."""
    # The end of an asynchronous operation names what its start has run.
    if "-done(" in line or "-update(" in line:
        return
    loop = _LOOP.search(line)
    if loop is not None:
        condition, body = (computations.get(loop[i], []) for i in (1, 2))
        yield loop[2], _rounds(line, condition, body)
    for called in _CALLED.findall(line):
        yield called, 1
    branches = _BRANCHES.search(line)
    if branches is not None:
        for called in branches[1].replace("%", "").split(","):
            yield called.strip(), 1


def _rounds(line: str, condition: list[str], body: list[str]) -> int:
    """Returns how often a loop runs, 1 if that depends on the data."""
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
    channels: dict[tuple[str, int | str], list[Instruction]] = {}
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


def count_flops(function: Callable[..., object], *args: object) -> int:
    """Returns the multiplications and additions in the matrix products of a function.

    Loops count as often as they run, which compilers' own counts leave out. A loop
    without a fixed number of rounds counts once, and of branches the largest.

    Args:
      function: any function that JAX can trace.
      *args: arrays or their shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> count_flops(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5)))
      60
    """
    return _in_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _in_jaxpr(jaxpr: Jaxpr) -> int:
    """Returns the operations of a traced function."""
    return sum(_in_equation(equation) for equation in jaxpr.eqns)


def _in_equation(equation: JaxprEqn) -> int:
    """Returns the operations of one equation, and of the functions it calls."""
    if equation.primitive.name == "dot_general":
        return _in_product(equation)
    inner = [
        _in_jaxpr(getattr(value, "jaxpr", value))
        for parameter in equation.params.values()
        for value in (parameter if isinstance(parameter, tuple | list) else [parameter])
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    if equation.primitive.name == "cond":
        return max(inner)
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    if equation.primitive.name == "pallas_call":
        # Every block of a kernel counts, those that its mask leaves out too.
        times = math.prod(equation.params["grid_mapping"].grid)
    if equation.primitive.name == "shard_map":
        mesh = equation.params["mesh"]
        manual = equation.params.get("manual_axes", mesh.axis_names)
        times = math.prod(mesh.shape[axis] for axis in manual)
    return times * sum(inner)


def _in_product(equation: Any) -> int:
    """Returns the operations of a matrix product."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)

"""The text of a compiled program: its instructions, and how often each one runs."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Instruction", "instructions"]

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

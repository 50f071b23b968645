"""The text of a compiled program: its instructions, and how often each one runs."""

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
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


class Instruction(NamedTuple):
    """One instruction of a program."""

    operation: str  # such as "all-gather-start"
    result: str  # its type, such as "f32[8,128]{1,0}"
    line: str
    times: int  # how often it runs


def instructions(text: str) -> Iterator[Instruction]:
    """Yields the instructions of a program that are reached from its entry.

    A loop runs as often as its condition says, by comparing with a constant; one whose
    end depends on the data counts once.

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
                yield Instruction(found[2], found[1], line, times[name])


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
        yield loop[2], _rounds(line, computations.get(loop[1], []))
    for called in _CALLED.findall(line):
        yield called, 1
    branches = _BRANCHES.search(line)
    if branches is not None:
        for called in branches[1].replace("%", "").split(","):
            yield called.strip(), 1


def _rounds(line: str, condition: list[str]) -> int:
    """Returns how often a loop runs, 1 if that depends on the data."""
    known = _TRIPS.search(line)
    if known is not None:
        return int(known[1])
    limits = [int(n) for line in condition for n in _CONSTANT.findall(line)]
    return max(1, *limits) if limits else 1

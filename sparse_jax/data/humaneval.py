"""HumanEval: functions to complete, samples of completions, and pass@k."""

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_jax.data.examples import text_of
from sparse_jax.data.read_rows import read_objects
from sparse_jax.errors import InputError, brief, reason_of

__all__ = ["Problem", "Sample", "load_problems", "load_samples", "pass_at_k"]


@dataclass(frozen=True)
class Problem:
    """A function to complete, and the tests that its completions must pass."""

    task_id: str
    prompt: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """Returns the program that fails unless a completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Sample:
    """A completion of a problem; its fields are those of the official lines."""

    task_id: str
    completion: str


def load_problems(path: str | Path) -> dict[str, Problem]:
    """Returns the problems of `HumanEval.jsonl.gz`, by their ids.

    Raises:
      InputError: if the file cannot be read, a line has not the fields, or one id is
        there twice.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(
            f"`{path}` must be the compressed file of HumanEval: {_reason(error)}."
        ) from error
    found: dict[str, Problem] = {}
    for number, line in enumerate(lines, start=1):
        place = f"`{path}` line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place} must be a JSON object: {error}.") from error
        fields = ("task_id", "prompt", "test", "entry_point")
        problem = Problem(*(text_of(place, record, (field,)) for field in fields))
        if problem.task_id in found:
            raise InputError(
                f"{place} must have an id of its own, got {problem.task_id} again."
            )
        found[problem.task_id] = problem
    return found


def load_samples(path: str | Path, problems: Mapping[str, Problem]) -> list[Sample]:
    """Returns the samples of a file of JSON lines.

    Raises:
      InputError: if the file cannot be read, or a line lacks a field or is of a problem
        that is not known.
    """
    rows = read_objects(path)
    samples = []
    for number, record in rows.numbered:
        place = rows.source.at(number)
        task_id = text_of(place, record, ("task_id",))
        if task_id not in problems:
            raise InputError(
                f"{place} must be of one of the {len(problems)} problems, got "
                f"{brief(task_id)}."
            )
        completion = record.get("completion")
        if not isinstance(completion, str):
            raise InputError(
                f"{place} must have a text as `completion`, got {brief(completion)}."
            )
        samples.append(Sample(task_id, completion))
    if not samples:
        raise InputError(f"{rows.source.name} must have samples, got an empty file.")
    return samples


def pass_at_k(passed: Sequence[tuple[int, int]], k: int) -> float:
    """Returns the unbiased estimate that one of k samples of a problem passes.

        mean over problems of 1 - C(n - c, k) / C(n, k)

    Args:
      passed: for each problem, its samples n and those that pass, c.
      k: at most the fewest samples of a problem.

    Raises:
      InputError: if a problem has fewer samples.

    References:
      Chen et al., 2021, Evaluating large language models trained on code, equation 1.

    Example:
      >>> pass_at_k([(4, 1), (4, 0)], 1), pass_at_k([(4, 1), (4, 3)], 2)
      (0.125, 0.75)
    """
    fewest = min(n for n, _ in passed)
    if not 1 <= k <= fewest:
        raise InputError(
            f"`k` must be in [1, {fewest}], the fewest samples of a problem, got {k}."
        )
    none = [math.comb(n - c, k) / math.comb(n, k) for n, c in passed]
    return float(1 - np.mean(none))


def _reason(error: Exception) -> str:
    return reason_of(error) if isinstance(error, OSError) else str(error)

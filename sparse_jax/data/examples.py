"""Examples: texts with their labels as numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from sparse_jax.data.glue import Task

__all__ = ["Examples", "Splits"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts, or pairs of texts, and their labels.

    Example:
      >>> len(Examples(["Yes.", "No."], None, np.array([1, 0], np.int32)))
      2
    """

    text_a: list[str]
    text_b: list[str] | None  # None if the examples are single texts
    # shape=(N,), int32 classes or float32 values; shape=(N, C), 0 or 1, if multi-label
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.text_a)


@dataclass(frozen=True, eq=False)
class Splits(Mapping[str, Examples]):
    """The training examples of a task and those that predictions are evaluated on.

    A mapping from the names of the splits, of which the first is "train".
    """

    task: Task  # with the names of the labels, also those read from the data
    examples: Mapping[str, Examples]
    notes: tuple[str, ...] = ()  # how the data were read
    warnings: tuple[str, ...] = ()  # what is odd about them

    def __getitem__(self, name: str) -> Examples:
        return self.examples[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def train(self) -> Examples:
        """The training examples."""
        return self.examples["train"]

    @property
    def evaluation(self) -> dict[str, Examples]:
        """The other splits; the first is the one to choose a model by."""
        return {name: self[name] for name in self if name != "train"}

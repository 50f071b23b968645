"""Names of labels: which of a checkpoint's are those of a task."""

import re
from collections.abc import Sequence
from types import MappingProxyType

__all__ = ["are_numbers", "order_of"]

# Other words for the labels of the common tasks.
_ALIASES = MappingProxyType(
    {
        "pos": "positive",
        "neg": "negative",
        "entail": "entailment",
        "entails": "entailment",
        "entailed": "entailment",
        "contradict": "contradiction",
        "contradicts": "contradiction",
        "contradictory": "contradiction",
        "paraphrase": "equivalent",
        "grammatical": "acceptable",
        "not_acceptable": "unacceptable",
        "ungrammatical": "unacceptable",
    }
)
_SEPARATORS = re.compile(r"[\s_-]+")
_NEGATION = re.compile(r"^(non|no|not)_")


def order_of(labels: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """Returns the place of every label among names, None if they are others.

    Case, separators and a few aliases do not matter, unless labels differ by nothing
    else.

    Args:
      labels: of a task.
      names: of a checkpoint, in any order.

    Example:
      >>> order_of(("negative", "positive"), ("POS", "NEG"))
      (1, 0)
      >>> order_of(("entailment", "not_entailment"), ("entailment", "neutral")) is None
      True
    """
    for spelling in (str.strip, _canonical):
        ours, theirs = [*map(spelling, labels)], [*map(spelling, names)]
        if len({*theirs}) == len(names) and sorted(ours) == sorted(theirs):
            return tuple(theirs.index(label) for label in ours)
    return None


def are_numbers(names: Sequence[str]) -> bool:
    """Says whether names are no more than the numbers of the classes, in their order.

    Example:
      >>> are_numbers(("LABEL_0", "LABEL_1")), are_numbers(("no", "yes"))
      (True, False)
    """
    digits = [name.lower().removeprefix("label_") for name in names]
    return digits == [str(i) for i in range(len(names))]


def _canonical(name: str) -> str:
    """Returns the common spelling of a label."""
    word = _SEPARATORS.sub("_", name.strip().casefold())
    stem = _NEGATION.sub("", word)
    word = f"not_{_ALIASES.get(stem, stem)}" if stem != word else word
    return _ALIASES.get(word, word)

"""The head of a classifier: which of its outputs are those of a task's labels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import jax

from sparse_jax.errors import listed
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.functional import Model
from sparse_jax.params.names import leaf_names

__all__ = ["HeadUse", "are_numbers", "label_leaves", "order_of", "use_of_head"]

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


@dataclass(frozen=True)
class HeadUse:
    """What becomes of the head of a checkpoint."""

    order: tuple[int, ...] | None  # its output for every label; None: a new head
    config: EncoderConfig  # with the labels of the task
    remark: str
    is_certain: bool  # whether names say so


def use_of_head(config: EncoderConfig, labels: Sequence[str]) -> HeadUse:
    """Returns what becomes of a checkpoint's head for the labels of a task.

    Outputs belong to labels by their names. Where one side has only numbers, and as
    many, output i belongs to label i, as in PyTorch. Otherwise the head is a new one.

    Args:
      config: of the checkpoint.
      labels: of the task; none for the one number of a regression.

    Example:
      >>> config = EncoderConfig(
      ...     vocab_size=100, hidden_size=32, num_layers=2, num_heads=4,
      ...     intermediate_size=64, label_names=("POS", "NEG"),
      ... )
      >>> use_of_head(config, ("negative", "positive")).order
      (1, 0)
      >>> print(use_of_head(config, ("no", "yes")).remark)
      its head is for POS, NEG: a new one is trained for no, yes
    """
    names = config.label_names or ()
    theirs = listed(names) or _count(config.num_labels)
    ours = listed(labels) or "one number"
    size = len(labels) or 1
    new = f"its head is for {theirs}: a new one is trained for {ours}"
    own = replace(config, num_labels=size, label_names=tuple(labels) or None)
    if config.num_labels != size:
        return HeadUse(None, own, new, is_certain=False)
    as_it_is = tuple(range(size))
    if not labels:
        # The name of a single number says nothing that could be wrong.
        return HeadUse(as_it_is, config, "its head is used", is_certain=True)
    order = order_of(labels, names)
    is_number = are_numbers(names) or are_numbers(labels)
    if not names or (order is None and is_number):
        remark = f"the outputs of its head, for {theirs}, are taken as {ours}"
        named = config if are_numbers(labels) else own
        return HeadUse(as_it_is, named, remark, is_certain=False)
    if order is None:
        return HeadUse(None, own, new, is_certain=False)
    return HeadUse(order, own, f"its head is used for {ours}", is_certain=True)


def label_leaves(model: Model) -> tuple[str, ...]:
    """Returns the names of the leaves that have the labels as their last axis."""
    one_more = replace(
        model.config, num_labels=model.config.num_labels + 1, label_names=None
    )
    shapes = model.abstract(), replace(model, config=one_more).abstract()
    names = jax.tree.leaves(leaf_names(shapes[0]))
    pairs = zip(names, *map(jax.tree.leaves, shapes), strict=True)
    return tuple(name for name, one, other in pairs if one.shape != other.shape)


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


def _count(number: int) -> str:
    """Returns so many labels without names."""
    return "one number" if number == 1 else f"{number} labels without names"


def are_numbers(names: Sequence[str]) -> bool:
    """Says whether names are no more than the numbers of the outputs.

    Example:
      >>> [are_numbers(names) for names in (("0", "1"), ("LABEL_0",), ("no", "yes"))]
      [True, True, False]
    """
    digits = [name.lower().removeprefix("label_") for name in names]
    return digits == [str(i) for i in range(len(names))]


def _canonical(name: str) -> str:
    """Returns the common spelling of a label."""
    word = _SEPARATORS.sub("_", name.strip().casefold())
    stem = _NEGATION.sub("", word)
    word = f"not_{_ALIASES.get(stem, stem)}" if stem != word else word
    return _ALIASES.get(word, word)

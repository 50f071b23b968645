"""The objective of a run: what it minimizes, and how a model is evaluated."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sparse_jax.compact.compact import Loss
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.functional import Model
from sparse_jax.sharding.placement import Placement
from sparse_jax.training.feed import Feed

__all__ = ["Evaluate", "Metrics", "Objective", "flattened"]

Metrics = dict[str, float]
# (parameters, arrays of the attachment) -> metrics of every evaluation split
Evaluate = Callable[[Any, Any], dict[str, Metrics]]


class Objective(Protocol):
    """What distinguishes one kind of task from another."""

    @property
    def name(self) -> str:
        """The task, as on the command line."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, none if there are no classes."""
        ...

    @property
    def primary(self) -> str:
        """The metric that pictures show."""
        ...

    @property
    def loss_name(self) -> str:
        """The loss and its unit."""
        ...

    @property
    def head(self) -> tuple[str, ...]:
        """Subtrees of the parameters that belong to the task, not to the model."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What an adapter has to say for its evaluation to be repeated."""
        ...

    def make_loss(self, model: Model, *, checkpointing: bool) -> Loss:
        """Returns the loss that training minimizes."""
        ...

    def make_evaluate(
        self, model: Model, attachment: Attachment, feed: Feed, placement: Placement
    ) -> Evaluate:
        """Returns the evaluation of a model with an attachment of this structure."""
        ...


def flattened(results: Mapping[str, Metrics]) -> Metrics:
    """Returns metrics under one name each: those of later splits bear the split's.

    Example:
      >>> flattened({"validation": {"f1": 0.5}, "test": {"f1": 0.25}})
      {'f1': 0.5, 'f1_test': 0.25}
    """
    first = next(iter(results))
    return {
        name if split == first else f"{name}_{split}": value
        for split, metrics in results.items()
        for name, value in metrics.items()
    }

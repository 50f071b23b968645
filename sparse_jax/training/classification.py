"""Classes, or one number, for every example."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_jax.compact import Loss
from sparse_jax.models.pure import PureModel
from sparse_jax.sharding.devices import Devices
from sparse_jax.sharding.processes import is_first_process
from sparse_jax.sites import Attachment
from sparse_jax.tasks.glue import Task
from sparse_jax.tasks.metrics import evaluate, one_class_warning
from sparse_jax.training.feed import Feed
from sparse_jax.training.loss import make_loss, make_predict
from sparse_jax.training.objective import Judge

__all__ = ["Classification"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of one class or of every label, or the squared error of a number.

    The members are those of `Objective`.
    """

    task: Task  # with the labels found in the data
    settings: Mapping[str, Any]
    head: tuple[str, ...] = ("classifier",)

    @property
    def name(self) -> str:
        """The task."""
        return self.task.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, none for numbers."""
        return self.task.labels or ()

    @property
    def primary(self) -> str:
        """The metric that tables of results show."""
        return self.task.primary

    @property
    def loss_name(self) -> str:
        """The loss and its unit."""
        if self.task.is_regression:
            return "squared error"
        per = ", nats per label" if self.task.is_multilabel else ", nats"
        return f"cross-entropy{per}"

    def make_loss(self, model: PureModel, *, checkpointing: bool) -> Loss:
        """Returns the loss that training minimises."""
        return make_loss(model, checkpointing=checkpointing)

    def make_judge(
        self, model: PureModel, attachment: Attachment, feed: Feed, devices: Devices
    ) -> Judge:
        """Returns the metrics of the task on every evaluation split."""
        predict = make_predict(model, attachment, devices)

        def judge(params: Any, trained: Any) -> dict[str, dict[str, float]]:
            results = {}
            for split, batches in feed.evaluation.items():
                outputs, labels = [], []
                for batch in batches:
                    is_example = batch["weights"] == 1
                    logits = predict(params, trained, batch)
                    outputs.append(np.asarray(logits)[is_example])
                    labels.append(batch["labels"][is_example])
                found = np.concatenate(outputs), np.concatenate(labels)
                results[split] = evaluate(self.task, *found)
                warning = one_class_warning(self.task, *found)
                if warning is not None and is_first_process():
                    _log.warning("%s: %s", split, warning)
            return results

        return judge

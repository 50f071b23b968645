"""Classification and regression: the loss, and the objective of a run."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.compact.compact import Loss
from sparse_jax.data.glue import Task
from sparse_jax.data.metrics import evaluate, one_class_warning
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.functional import Model
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.processes import is_first_process
from sparse_jax.training.feed import Feed
from sparse_jax.training.objective import Evaluate

__all__ = ["Classification", "Predict", "make_loss", "make_predict", "model_inputs"]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# (params, arrays of the attachment, batch) -> logits [B, num_labels]
Predict = Callable[[Any, Any, Mapping[str, Any]], jax.Array]


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the model sees of a batch."""
    return {name: batch[name] for name in _INPUTS if name in batch}


def make_loss(
    model: Model, *, checkpointing: bool = False, unroll: int | None = None
) -> Loss:
    """Returns the loss of `Compact`.

    That is cross-entropy of classes; squared error of one number; if any number of
    labels fit an example, the mean binary cross-entropy of all labels. Examples count
    by their weight, which is zero for padding rows.

    Args:
      model: a classifier.
      checkpointing: whether layers run again in the backward pass.
      unroll: layers in one pass of the loop; None chooses by backend.
    """

    def loss(
        params: Any, batch: Any, key: jax.Array, attachment: Attachment
    ) -> tuple[jax.Array, jax.Array]:
        # Unrolled code would undo the checkpoint; the loop is what saves memory.
        options = {
            "checkpoint": checkpointing,
            "unroll": 1 if checkpointing else unroll,
        }
        inputs = model_inputs(batch)
        logits = model(params, inputs, key=key, attachment=attachment, **options)
        labels, weights = batch["labels"], batch["weights"]
        return jnp.sum(weights * _losses(logits, labels)), jnp.sum(weights)

    return loss


def make_predict(model: Model, attachment: Attachment, placement: Placement) -> Predict:
    """Returns a compiled function of logits, without dropout.

    The arrays of the attachment are its argument, so that training and a loaded
    adapter run the same program and give the same bits.
    """

    @placement.compiled
    def predict(params: Any, trained: Any, inputs: Mapping[str, Any]) -> jax.Array:
        attached = attachment._replace(trained=trained)
        return model(params, inputs, attachment=attached)

    return lambda params, trained, batch: predict(
        params, trained, placement.put(model_inputs(batch))
    )


def _losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the loss of every example."""
    if labels.ndim == 2:
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)
    if logits.shape[-1] == 1:
        return (logits[:, 0] - labels.astype(jnp.float32)) ** 2
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


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

    def make_loss(self, model: Model, *, checkpointing: bool) -> Loss:
        """Returns the loss that training minimizes."""
        return make_loss(model, checkpointing=checkpointing)

    def make_evaluate(
        self, model: Model, attachment: Attachment, feed: Feed, placement: Placement
    ) -> Evaluate:
        """Returns the metrics of the task on every evaluation split."""
        predict = make_predict(model, attachment, placement)

        def run(params: Any, trained: Any) -> dict[str, dict[str, float]]:
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

        return run

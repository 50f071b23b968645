"""The objective of a run: the loss it minimizes, and how a model is evaluated."""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.compact.compact import Loss
from sparse_jax.data.batches import Batch
from sparse_jax.data.glue import CAUSAL, Task
from sparse_jax.data.metrics import Metric, evaluate, one_class_warning, report
from sparse_jax.models.attachment import Attachment, LayerValues
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.next_token import summed_token_loss
from sparse_jax.params.fields import Json
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.processes import is_first_process
from sparse_jax.training.feed import Feed

__all__ = [
    "Evaluate",
    "Evaluated",
    "Metrics",
    "Objective",
    "Outputs",
    "Results",
    "classification",
    "flattened",
    "head_bias",
    "language_modeling",
    "make_loss",
    "make_outputs",
    "make_token_loss",
    "model_inputs",
    "perplexity",
]

_log = logging.getLogger(__name__)

_INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "segment_ids", "positions",
)  # fmt: skip
# exp of this is infinite in float64.
_LARGEST = 709.0

Metrics = dict[str, float]
Results = dict[str, Metrics]  # by evaluation split
Report = Mapping[str, Json]  # of a split, beside its metrics


class Evaluated(NamedTuple):
    """What an evaluation finds on every split."""

    results: Results
    reports: Mapping[str, Report]  # of classes and values


# (parameters, arrays of the attachment) -> what is found on every evaluation split
Evaluate = Callable[[optax.Params, LayerValues], Evaluated]
# (parameters, arrays of the attachment, batch) -> outputs of its examples
Outputs = Callable[[optax.Params, LayerValues, Batch], np.ndarray]
_Arrays = Mapping[str, jax.Array]
_Array = TypeVar("_Array", np.ndarray, jax.Array)


@dataclass(frozen=True)
class Objective:
    """What distinguishes one kind of task from another."""

    name: str  # the task, as on the command line
    labels: tuple[str, ...]  # names of the classes, none if there are no classes
    metrics: tuple[str, ...]  # the first is the one that pictures show
    loss_name: str  # the loss and its unit
    head: tuple[str, ...]  # subtrees of the parameters that belong to the task
    # What an adapter has to say for its evaluation to be repeated.
    settings: Mapping[str, Any]
    make_loss: Callable[..., Loss]  # (model, checkpointing=) -> what training minimizes
    # Returns the evaluation of a model with an attachment of this structure.
    make_evaluate: Callable[[Model, Attachment, Feed, Placement], Evaluate]

    @property
    def primary(self) -> str:
        """The metric that pictures show, and that models are compared by."""
        return self.metrics[0]


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


def perplexity(loss: float) -> float:
    """Returns the perplexity of a loss in nats per token.

    Example:
      >>> perplexity(0.0), perplexity(1e6)
      (1.0, inf)
    """
    # A comparison with NaN is false, so that NaN stays.
    return math.inf if loss > _LARGEST else math.exp(loss)


def classification(
    task: Task,
    settings: Mapping[str, Any],
    class_weights: Sequence[float] | None = None,
    own: Mapping[str, Metric] = MappingProxyType({}),
) -> Objective:
    """Returns the objective of classes, or of numbers.

    That is the cross-entropy of one class or of every label, or the squared error of a
    number; a model is evaluated by the metrics of the task.

    Args:
      task: with the labels found in the data.
      settings: what an adapter has to say for its evaluation to be repeated.
      class_weights: of the examples of each class, in training; None weighs all alike.
      own: metrics beside those of the task.
    """
    per = ", nats per label" if task.is_multilabel else ", nats"

    def make_evaluate(
        model: Model, attachment: Attachment, feed: Feed, placement: Placement
    ) -> Evaluate:
        outputs_of = make_outputs(model, attachment, placement)

        def run(params: optax.Params, trained: LayerValues) -> Evaluated:
            results, reports = {}, {}
            for split, batches in feed.evaluation.items():
                outputs, labels = [], []
                for batch in batches:
                    outputs.append(outputs_of(params, trained, batch))
                    labels.append(batch["labels"][batch["weights"] == 1])
                found = np.concatenate(outputs), np.concatenate(labels)
                results[split] = evaluate(task, *found, own)
                reports[split] = report(task, *found)
                warning = one_class_warning(task, *found)
                if warning is not None and is_first_process():
                    _log.warning("%s: %s", split, warning)
            return Evaluated(results, reports)

        return run

    return Objective(
        name=task.name,
        labels=task.labels or (),
        metrics=(*task.metrics, "loss", *own),
        loss_name="squared error" if task.is_regression else f"cross-entropy{per}",
        head=("classifier",),
        settings=settings,
        make_loss=functools.partial(make_loss, class_weights=class_weights),
        make_evaluate=make_evaluate,
    )


def language_modeling(settings: Mapping[str, Any]) -> Objective:
    """Returns the objective of texts: the next token, of all tokens that are targets.

    A model without a head for the task has nothing to exclude from counts, so there is
    no head. A model is evaluated by its loss and perplexity.

    Args:
      settings: what an adapter has to say for its evaluation to be repeated.
    """

    def make_evaluate(
        model: Model, attachment: Attachment, feed: Feed, placement: Placement
    ) -> Evaluate:
        loss = make_token_loss(model)

        @placement.compiled
        def sums(
            params: Params, trained: LayerValues, batch: _Arrays
        ) -> tuple[jax.Array, jax.typing.ArrayLike]:
            return loss(params, batch, None, attachment._replace(trained=trained))

        def run(params: optax.Params, trained: LayerValues) -> Evaluated:
            results = {}
            for split, batches in feed.evaluation.items():
                # Python adds in float64: a split may have millions of tokens.
                total = weight = 0.0
                for batch in batches:
                    part, part_weight = sums(params, trained, placement.put(batch))
                    total, weight = total + float(part), weight + float(part_weight)
                mean = total / weight
                results[split] = {"loss": mean, "perplexity": perplexity(mean)}
            return Evaluated(results, {})

        return run

    return Objective(
        name=CAUSAL,
        labels=(),
        metrics=("loss", "perplexity"),
        loss_name="cross-entropy, nats per token",
        head=(),
        settings=settings,
        make_loss=make_token_loss,
        make_evaluate=make_evaluate,
    )


def make_outputs(model: Model, attachment: Attachment, placement: Placement) -> Outputs:
    """Returns what computes the outputs of a classifier, `[N, C]` for N examples.

    Args:
      model: a classifier.
      attachment: of this structure; its arrays are an argument of the result.
      placement: of the parameters.
    """

    # The arrays of the attachment are an argument, so that training and a loaded
    # adapter run the same program and give the same bits.
    @placement.compiled
    def predict(params: Params, trained: LayerValues, inputs: _Arrays) -> jax.Array:
        return model(params, inputs, attachment=attachment._replace(trained=trained))

    def outputs(params: optax.Params, trained: LayerValues, batch: Batch) -> np.ndarray:
        found = predict(params, trained, placement.put(model_inputs(batch)))
        return np.asarray(found)[batch["weights"] == 1]

    return outputs


def make_loss(
    model: Model,
    *,
    checkpointing: bool = False,
    unroll: int | None = None,
    label_smoothing: float = 0.0,
    noise: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Loss:
    """Returns the loss of `Compact` for classes and numbers.

    That is cross-entropy of classes; squared error of one number; if any number of
    labels fit an example, the mean binary cross-entropy of all labels. Examples count
    by their weight, which is zero for padding rows, times that of their class.

    Args:
      model: a classifier.
      checkpointing: whether layers run again in the backward pass.
      unroll: layers in one pass of the loop; None chooses by backend.
      label_smoothing: share of a class that is spread over all.
      noise: alpha of NEFTune.
      class_weights: one for each class; None weighs all alike.
    """
    options = _model_options(checkpointing, unroll, noise)

    def loss(
        params: Params, batch: _Arrays, key: jax.Array | None, attachment: Attachment
    ) -> tuple[jax.Array, jax.Array]:
        inputs = model_inputs(batch)
        logits = model(params, inputs, key=key, attachment=attachment, **options)
        labels, weights = batch["labels"], batch["weights"]
        if class_weights is not None:
            weights = weights * jnp.asarray(class_weights, jnp.float32)[labels]
        losses = _losses(logits, labels, label_smoothing)
        return jnp.sum(weights * losses), jnp.sum(weights)

    return loss


def head_bias(labels: np.ndarray, num_outputs: int) -> np.ndarray:
    """Returns the outputs, the same for all examples, that fit some labels best.

        b = mean(y)                                  of numbers
        b_c = log(n_c + 1), less its mean over c     of classes, n_c examples each
        b_c = log((n_c + 1) / (n - n_c + 1))         if any number of labels fit

    They are the least loss of a head with a kernel of zero, but for the one example
    that every class has more.

    Args:
      labels: of the training examples, `[n]`, or `[n, C]` if any number of them fit.
      num_outputs: C, or 1 for numbers.

    Example:
      >>> head_bias(np.array([0.5, 2.5]), 1)
      array([1.5])
      >>> head_bias(np.array([0] * 8 + [1] * 2), 2).round(2)  # log(3) apart
      array([ 0.55, -0.55])
    """
    if labels.ndim == 2:
        fit = labels.sum(axis=0, dtype=np.float64)
        return np.log(fit + 1) - np.log(len(labels) - fit + 1)
    if num_outputs == 1:
        return np.array([np.mean(labels, dtype=np.float64)])
    counts = np.bincount(labels, minlength=num_outputs) + 1
    logs = np.log(counts / np.mean(counts))
    return logs - np.mean(logs)


def make_token_loss(
    model: Model,
    *,
    checkpointing: bool = False,
    unroll: int | None = None,
    label_smoothing: float = 0.0,
    noise: float = 0.0,
) -> Loss:
    """Returns the loss of `Compact` for batches of `TokenSequences`.

    It is the sum of the cross-entropies of the targets, in nats, and their number.

    Args:
      model: a causal language model.
      checkpointing: whether layers run again in the backward pass.
      unroll: layers in one pass of the loop; None chooses by backend.
      label_smoothing: share of a token that is spread over all.
      noise: alpha of NEFTune.
    """
    options = _model_options(checkpointing, unroll, noise)

    def loss(
        params: Params, batch: _Arrays, key: jax.Array | None, attachment: Attachment
    ) -> tuple[jax.Array, jax.Array]:
        inputs, weights = model_inputs(batch), batch["weights"]
        hidden = model.hidden(params, inputs, key=key, attachment=attachment, **options)
        args = (model, params, hidden, batch["input_ids"], weights)
        total = summed_token_loss(*args, smoothing=label_smoothing)
        return total, jnp.sum(weights[:, 1:])

    return loss


def model_inputs(batch: Mapping[str, _Array]) -> dict[str, _Array]:
    """Returns what the model sees of a batch."""
    return {name: batch[name] for name in _INPUTS if name in batch}


def _model_options(
    checkpointing: bool, unroll: int | None, noise: float
) -> dict[str, float | None]:
    """Returns the options of a model that say how it runs in training."""
    # Unrolled code would undo the checkpoint; the loop is what saves memory.
    unroll = 1 if checkpointing else unroll
    options = {"checkpoint": checkpointing, "unroll": unroll}
    return {**options, "noise": noise} if noise else options


def _losses(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Returns the loss of every example."""
    if labels.ndim == 2:
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)
    if logits.shape[-1] == 1:
        return (logits[:, 0] - labels.astype(jnp.float32)) ** 2
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing:
        others = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        losses = (1 - smoothing) * losses + smoothing * others
    return losses

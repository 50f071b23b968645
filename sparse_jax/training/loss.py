"""The loss of a classifier, or of a regression."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_jax.compact import Loss
from sparse_jax.models.pure import PureModel
from sparse_jax.sharding.devices import Devices
from sparse_jax.sites import Attachment

__all__ = ["Predict", "make_loss", "make_predict", "model_inputs"]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# (params, arrays of the attachment, batch) -> logits [B, num_labels]
Predict = Callable[[Any, Any, Mapping[str, Any]], jax.Array]


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the model sees of a batch."""
    return {name: batch[name] for name in _INPUTS if name in batch}


def make_loss(
    model: PureModel, *, checkpointing: bool = False, unroll: int | None = None
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


def make_predict(model: PureModel, attachment: Attachment, devices: Devices) -> Predict:
    """Returns a compiled function of logits, without dropout.

    The arrays of the attachment are its argument, so that training and a loaded
    adapter run the same program and give the same bits.
    """

    @devices.compiled
    def predict(params: Any, trained: Any, inputs: Mapping[str, Any]) -> jax.Array:
        attached = attachment._replace(trained=trained)
        return model(params, inputs, attachment=attached)

    return lambda params, trained, batch: predict(
        params, trained, devices.put(model_inputs(batch))
    )


def _losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the loss of every example."""
    if labels.ndim == 2:
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)
    if logits.shape[-1] == 1:
        return (logits[:, 0] - labels.astype(jnp.float32)) ** 2
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

"""The loss of a causal language model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.compact import Loss
from sparse_jax.models.next_token import summed_token_loss
from sparse_jax.models.pure import PureModel
from sparse_jax.sites import Attachment

__all__ = ["make_token_loss"]

_INPUTS = ("input_ids", "attention_mask", "segment_ids", "positions")


def make_token_loss(
    model: PureModel, *, checkpointing: bool = False, unroll: int | None = None
) -> Loss:
    """Returns the loss of `Compact` for batches of `CausalBatches`.

    It is the sum of the cross-entropies of the targets, in nats, and their number.

    Args:
      model: a causal language model.
      checkpointing: whether layers run again in the backward pass.
      unroll: layers in one pass of the loop; None chooses by backend.
    """

    def loss(
        params: Any,
        batch: Mapping[str, Any],
        key: jax.Array | None,
        attachment: Attachment,
    ) -> tuple[jax.Array, jax.Array]:
        # Unrolled code would undo the checkpoint; the loop is what saves memory.
        options = {
            "checkpoint": checkpointing,
            "unroll": 1 if checkpointing else unroll,
        }
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        hidden = model.hidden(params, inputs, key=key, attachment=attachment, **options)
        return (
            summed_token_loss(
                model, params, hidden, batch["input_ids"], batch["weights"]
            ),
            jnp.sum(batch["weights"][:, 1:]),
        )

    return loss

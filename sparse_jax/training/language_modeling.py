"""The next token, of responses or of everything: the loss, and the objective."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.compact.compact import Loss
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.functional import Model
from sparse_jax.models.next_token import summed_token_loss
from sparse_jax.sharding.placement import Placement
from sparse_jax.training.feed import Feed
from sparse_jax.training.objective import Evaluate

__all__ = ["LanguageModeling", "make_token_loss"]

_INPUTS = ("input_ids", "attention_mask", "segment_ids", "positions")


def make_token_loss(
    model: Model, *, checkpointing: bool = False, unroll: int | None = None
) -> Loss:
    """Returns the loss of `Compact` for batches of `TokenSequences`.

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


# exp of this is infinite in float64.
_LARGEST = 709.0


@dataclass(frozen=True)
class LanguageModeling:
    """Cross-entropy of the next token, over all tokens that are targets.

    The members are those of `Objective`. A model without a head for the task has
    nothing to exclude from counts, so there is no head.
    """

    settings: Mapping[str, Any]
    name: str = "causal"
    labels: tuple[str, ...] = ()
    primary: str = "loss"
    loss_name: str = "cross-entropy, nats per token"
    head: tuple[str, ...] = ()

    def make_loss(self, model: Model, *, checkpointing: bool) -> Loss:
        """Returns the loss that training minimizes."""
        return make_token_loss(model, checkpointing=checkpointing)

    def make_evaluate(
        self, model: Model, attachment: Attachment, feed: Feed, placement: Placement
    ) -> Evaluate:
        """Returns loss and perplexity of every evaluation split."""
        loss = make_token_loss(model)

        @placement.compiled
        def sums(params: Any, trained: Any, batch: Mapping[str, Any]) -> Any:
            return loss(params, batch, None, attachment._replace(trained=trained))

        def run(params: Any, trained: Any) -> dict[str, dict[str, float]]:
            results = {}
            for split, batches in feed.evaluation.items():
                # Python adds in float64: a split may have millions of tokens.
                total = weight = 0.0
                for batch in batches:
                    part, part_weight = sums(params, trained, placement.put(batch))
                    total, weight = total + float(part), weight + float(part_weight)
                results[split] = _metrics(total / weight)
            return results

        return run


def _metrics(loss: float) -> dict[str, float]:
    """Returns the metrics of a mean loss."""
    # A comparison with NaN is false, so that NaN stays.
    return {
        "loss": loss,
        "perplexity": math.inf if loss > _LARGEST else math.exp(loss),
    }

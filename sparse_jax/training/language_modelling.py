"""The next token, of responses or of everything."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_jax.compact import Loss
from sparse_jax.models.pure import PureModel
from sparse_jax.sharding.devices import Devices
from sparse_jax.sites import Attachment
from sparse_jax.training.feed import Feed
from sparse_jax.training.objective import Judge
from sparse_jax.training.token_loss import make_token_loss

__all__ = ["LanguageModelling"]

# exp of this is infinite in float64.
_LARGEST = 709.0


@dataclass(frozen=True)
class LanguageModelling:
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

    def make_loss(self, model: PureModel, *, checkpointing: bool) -> Loss:
        """Returns the loss that training minimises."""
        return make_token_loss(model, checkpointing=checkpointing)

    def make_judge(
        self, model: PureModel, attachment: Attachment, feed: Feed, devices: Devices
    ) -> Judge:
        """Returns loss and perplexity of every evaluation split."""
        loss = make_token_loss(model)

        @devices.compiled
        def sums(params: Any, trained: Any, batch: Mapping[str, Any]) -> Any:
            return loss(params, batch, None, attachment._replace(trained=trained))

        def judge(params: Any, trained: Any) -> dict[str, dict[str, float]]:
            results = {}
            for split, batches in feed.evaluation.items():
                # Python adds in float64: a split may have millions of tokens.
                total = weight = 0.0
                for batch in batches:
                    part, part_weight = sums(params, trained, devices.put(batch))
                    total, weight = total + float(part), weight + float(part_weight)
                results[split] = _metrics(total / weight)
            return results

        return judge


def _metrics(loss: float) -> dict[str, float]:
    """Returns the metrics of a mean loss."""
    # A comparison with NaN is false, so that NaN stays.
    return {
        "loss": loss,
        "perplexity": math.inf if loss > _LARGEST else math.exp(loss),
    }

"""The best model of a run: which it is, and when no better one is to be expected."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparse_jax.data.metrics import is_greater_better
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.training.build import Job
from sparse_jax.training.objective import Metrics, flattened
from sparse_jax.training.run_files import MetricRows

__all__ = ["BestModel", "Standing", "best_model_of"]

_log = logging.getLogger(__name__)


class Standing(NamedTuple):
    """What the evaluations so far say."""

    step: int | None = None  # updates of the best model; None if there is none
    value: float = math.nan  # its metric
    since: int = 0  # evaluations since one was better by more than the threshold


@dataclass(frozen=True)
class BestModel:
    """How the models that a run evaluates are compared.

    All follows from the rows of the run, so that a resumed run has the same best model.
    The rows of compared models have `is_best`.

    Example:
      >>> by = BestModel("validation", "loss", threshold=0.1, patience=2)
      >>> rows = [{"step": i, "loss": loss, "is_best": True}
      ...         for i, loss in enumerate([3.0, 2.0, 1.95, 2.5])]
      >>> by.standing(rows), by.is_over(rows)
      (Standing(step=2, value=1.95, since=2), True)
    """

    split: str
    metric: str
    threshold: float = 0.0
    patience: int | None = None

    def standing(self, rows: MetricRows) -> Standing:
        """Returns what the rows of a run say."""
        found = Standing()
        for row in rows:
            if "is_best" in row:
                value = row[self.metric]
                found = self._next(
                    found, row["step"], math.nan if value is None else value
                )
        return found

    def is_better(self, rows: MetricRows, metrics: Metrics) -> bool:
        """Returns whether metrics are better than those of all compared models."""
        return self._gain(self.standing(rows), metrics[self.metric]) > 0

    def is_over(self, rows: MetricRows) -> bool:
        """Returns whether no better model is to be expected."""
        return self.patience is not None and self.standing(rows).since >= self.patience

    @property
    def reason(self) -> str:
        """Why the training ends."""
        return (
            f"no better {self.metric} on {self.split} in {self.patience} evaluations: "
            "the training ends"
        )

    def _gain(self, before: Standing, value: float) -> float:
        """Returns by how much a value is better; NaN is never better."""
        if before.step is None:
            return -math.inf if math.isnan(value) else math.inf
        return value - before.value if self._is_greater else before.value - value

    @property
    def _is_greater(self) -> bool:
        return is_greater_better(self.metric)

    def _next(self, before: Standing, step: int, value: float) -> Standing:
        """Returns the standing after one more evaluation."""
        gain = self._gain(before, value)
        # As `EarlyStoppingCallback` of transformers: a model that is better by less
        # than the threshold is the best one, and is waited for no longer.
        since = 0 if gain > self.threshold else before.since + 1
        return (
            Standing(step, value, since) if gain > 0 else before._replace(since=since)
        )


def best_model_of(job: Job) -> BestModel | None:
    """Returns how the models of a run are compared; None if they are not.

    Raises:
      InputError: if there is no such metric, or early stopping can never act.
    """
    settings = job.settings
    if not settings.chooses_model:
        return None
    splits = [split for split in job.feed.sizes if split != "train"]
    places = [(split, name) for split in splits for name in job.objective.metrics]
    nothing = dict.fromkeys(job.objective.metrics, 0.0)
    names = flattened({split: nothing for split in splits})
    known = dict(zip(names, places, strict=True))
    word = settings.metric_for_best_model or job.objective.primary
    # As the Trainer of transformers has it, with or without.
    place = known.get(word, known.get(word.removeprefix("eval_")))
    if place is None:
        raise InputError(
            f"`metric_for_best_model` must be one of {listed(known)}, got "
            f"{brief(word)}."
        )
    patience = settings.early_stopping_patience
    count = len(_evaluations(job))
    if patience is not None and patience >= count:
        _log.warning(
            "`early_stopping_patience`=%d cannot stop a run of %d evaluations: "
            "evaluate more often, by `eval_every`, or train for more epochs",
            patience, count,
        )  # fmt: skip
    return BestModel(*place, settings.early_stopping_threshold, patience)


def _evaluations(job: Job) -> Sequence[int]:
    """Returns the updates after which a run is evaluated and has an adapter."""
    every, length, total = (
        job.settings.eval_every, job.feed.batches_per_epoch, job.total,
    )  # fmt: skip
    steps = {*range(length, total, length), total}
    steps |= {*range(every, total, every)} if every else set()
    return sorted(step for step in steps if step > job.select_after)

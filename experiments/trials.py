"""Trials: runs of one method over learning rates and seeds, each made once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparse_jax import Settings, finetune

__all__ = ["COLUMNS", "Trial", "make_trial"]

COLUMNS = ("trained, no head", "learning rate", "mean", "sd", "range")


@dataclass(frozen=True)
class Trial:
    """One method at its best learning rate.

    Attributes:
      rate: the learning rate of the grid that was best on the first seed.
      size: trained parameters, head excluded.
      values: the metric of every seed.
    """

    rate: float
    size: int
    values: tuple[float, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table shows in `COLUMNS`: values in percent."""
        return self.shown(100, 1)

    def shown(self, scale: float, digits: int) -> tuple[str, ...]:
        """Returns what a table shows in `COLUMNS`, values times a scale."""
        values = scale * np.array(self.values)
        deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
        texts = [
            f"{value:.{digits}f}"
            for value in (np.mean(values), deviation, min(values), max(values))
        ]
        spread = f"{texts[2]} to {texts[3]}"
        return (f"{self.size:,}", f"{self.rate:g}", *texts[:2], spread)


def make_trial(
    name: str,
    settings: Settings,
    *,
    metric: str,
    rates: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
    choose: Callable[..., float] = max,
) -> Trial:
    """Chooses a learning rate on the first seed, then runs all seeds with it.

    Every run has a directory of its own in `folder`. A run that was made is not made
    again and one that was interrupted goes on, so the same call may be repeated.

    Args:
      name: the beginning of the names of the directories.
      settings: of all runs, but for learning rate, seed and output.
      metric: what decides, a key of `eval` in `metrics.json`.
      rates: the grid of learning rates.
      seeds: not empty.
      folder: where the directories are.
      choose: `max` if a large metric is good, `min` if a small one is.
    """

    def run(rate: float, seed: int) -> dict[str, Any]:
        output = folder / f"{name}-lr{rate:g}-seed{seed}"
        return _result(
            replace(settings, learning_rate=rate, seed=seed, output=str(output))
        )

    best = choose(rates, key=lambda rate: run(rate, seeds[0])["eval"][metric])
    runs = [run(best, seed) for seed in seeds]
    values = tuple(metrics["eval"][metric] for metrics in runs)
    return Trial(best, runs[0]["trained_parameters_without_head"], values)


def _result(settings: Settings) -> dict[str, Any]:
    """Returns the metrics of a run, from its directory if it has been made."""
    output = Path(settings.output)
    stored = output / "metrics.json"
    if stored.is_file():
        return json.loads(stored.read_text())
    return finetune(replace(settings, resume=(output / "config.json").is_file()))

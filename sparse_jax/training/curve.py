"""The picture of a run: its loss, and the metric on the evaluation data."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_curve"]

_RAW, _SMOOTH, _METRICS = "#b8c4d6", "#1f4e8c", ("#b3541e", "#3b7d4f", "#6a4c93")


def draw_curve(
    path: str | Path, rows: Sequence[Mapping[str, Any]], *, title: str, primary: str
) -> None:
    """Draws the training curve of a run to a PNG, whole or not at all.

    Args:
      path: file to write.
      rows: lines of `metrics.jsonl`: with `loss`, or with `split` and metrics.
      title: what was run.
      primary: the metric to show.
    """
    # Matplotlib takes seconds to import. A figure of its own needs no backend.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    _draw_loss(left, [row for row in rows if "loss" in row])
    _draw_metric(right, [row for row in rows if "split" in row], primary)
    for axes in (left, right):
        axes.set_xlabel("updates")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", integer=True)
    temporary = Path(path).with_name(f".{Path(path).name}.part")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _draw_loss(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws the loss of every update and its moving average."""
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows], float)
    axes.plot(steps, losses, color=_RAW, linewidth=1, label="each update")
    width = max(2, len(losses) // 20)
    label = f"moving average, about {width} updates"
    axes.plot(steps, _smooth(losses, width), color=_SMOOTH, linewidth=2, label=label)
    axes.set_title("training loss (nats or squared label units)", fontsize=9)
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8)


def _draw_metric(axes: Any, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Draws a metric on every split that has it."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    for split, color in zip(splits, _METRICS, strict=False):
        points = [(r["step"], r[metric]) for r in rows if r["split"] == split]
        steps, values = np.array(points, float).T
        axes.plot(steps, values, "o-", color=color, label=split)
        if np.isfinite(values[-1]):
            axes.annotate(
                f"{values[-1]:.3f}", (steps[-1], values[-1]), color=color, fontsize=9,
                xytext=(-4, 7), textcoords="offset points", ha="right",
            )  # fmt: skip
    axes.set_title(f"{metric} (fraction, higher is better)", fontsize=9)
    axes.set_ylabel(metric)
    axes.margins(x=0.08, y=0.25)
    axes.legend(frameon=False, fontsize=8)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Returns an exponential moving average, unbiased at the start."""
    decay, total, weight, averages = 1 - 1 / width, 0.0, 0.0, []
    for value in np.nan_to_num(values):
        total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight)
    return np.array(averages)

"""The pictures of a run: its curve, and which layers were trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_jax.adapter.file import replacing
from sparse_jax.training.run_files import MetricRows, evaluations_of, updates_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_curve", "draw_layers"]

_RAW, _SMOOTH = "#b8c4d6", "#1f4e8c"
_SPLITS = ("#b3541e", "#3b7d4f", "#6a4c93")


def draw_curve(
    path: str | Path, rows: MetricRows, *, title: str, loss: str, metric: str
) -> None:
    """Draws the training curve of a run to a PNG, atomically.

    Args:
      path: file to write.
      rows: lines of `metrics.jsonl`: with `loss`, or with `split` and metrics.
      title: what was run.
      loss: which loss, and its unit.
      metric: name of the metric to draw.
    """
    figure, (left, right) = _panels(title, 2)
    _draw_loss(left, updates_of(rows), loss)
    _draw_metric(right, evaluations_of(rows), metric)
    last = max((row["step"] for row in rows), default=1)
    for axes in (left, right):
        axes.set(xlabel="update", xlim=(0, 1.02 * last))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, Path(path))


def _panels(title: str, count: int) -> Any:
    """Returns a figure and its panels, side by side."""
    # Matplotlib takes seconds to import. A figure of its own needs no backend.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure: "Figure", path: Path) -> None:
    """Writes a figure to a PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_loss(axes: "Axes", rows: MetricRows, loss: str) -> None:
    """Draws the loss of every update and its moving average."""
    steps = [row["step"] for row in rows]
    losses = np.array([row["loss"] for row in rows], float)
    width = max(5, len(losses) // 20)
    axes.plot(steps, losses, color=_RAW, linewidth=1, label="each update")
    label = f"moving average over about {width}"
    axes.plot(steps, _smooth(losses, width), color=_SMOOTH, linewidth=2, label=label)
    axes.set_title("training loss", fontsize=10)
    axes.set_ylabel(loss)
    axes.legend(frameon=False, fontsize=8)


def _draw_metric(axes: "Axes", rows: MetricRows, metric: str) -> None:
    """Draws a metric on every split, with its last value."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    for split, color in zip(splits, _SPLITS, strict=False):
        points = [(row["step"], row[metric]) for row in rows if row["split"] == split]
        steps, values = np.array(points, float).T
        label = f"{split.replace('_', ' ')}, at the end {values[-1]:.3f}"
        axes.plot(steps, values, "o-", color=color, label=label)
    axes.set_title(f"{metric} on data not trained on", fontsize=10)
    axes.set_ylabel(metric)
    axes.margins(y=0.2)
    axes.legend(frameon=False, fontsize=8)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Returns an exponential moving average, unbiased at the start."""
    decay, total, weight, averages = 1 - 1 / width, 0.0, 0.0, []
    for value in values[np.isfinite(values)]:
        total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight)
    # From the first loss that is not finite on, there is nothing to draw.
    return np.array(averages + [np.nan] * (len(values) - len(averages)))


_MOST_COLUMNS = 200


def draw_layers(
    path: str | Path, rows: MetricRows, *, num_layers: int, title: str
) -> None:
    """Draws how often each layer was updated, and its importance, to a PNG.

    Args:
      path: file to write, atomically.
      rows: lines of `metrics.jsonl`: with `active` if it changed, and `importance`
        if it did.
      num_layers: layers of the model.
      title: what was run.
    """
    updates = updates_of(rows)
    # Before a selection there are no layers to choose.
    drawn = next(i for i, row in enumerate(updates) if "active" in row)
    updates = updates[drawn:]
    importance = _filled(updates, "importance", num_layers)
    figure, panels = _panels(title, 1 if importance is None else 2)
    shares = _shares(_filled(updates, "active", None), num_layers)
    _draw(figure, panels[0], shares, len(updates), "share of updates", vmin=0)
    panels[0].set_title("layers updated", fontsize=10)
    if importance is not None:
        widest = float(np.max(np.abs(importance))) or 1.0
        limits = {"vmin": -widest, "vmax": widest, "cmap": "RdBu_r"}
        _draw(figure, panels[1], importance.T, len(updates), "importance", **limits)
        panels[1].set_title("importance learned", fontsize=10)
    _save(figure, Path(path))


def _draw(
    figure: Any, axes: Any, values: np.ndarray, updates: int, label: str, **limits: Any
) -> None:
    """Draws an array [layers, time] as a heat map, layer 0 at the bottom."""
    num_layers = values.shape[0]
    image = axes.imshow(
        values, aspect="auto", origin="lower", interpolation="nearest",
        extent=(0.5, updates + 0.5, -0.5, num_layers - 0.5), **limits,
    )  # fmt: skip
    axes.set(xlabel="update", ylabel="layer")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label=label)


def _filled(updates: MetricRows, name: str, size: int | None) -> Any:
    """Returns a list of every update, the last known where it was left out."""
    found, last = [], None if size is None else [0.0] * size
    if not any(name in row for row in updates):
        return None
    for row in updates:
        last = row.get(name, last)
        found.append(last)
    return np.array(found)


def _shares(active: np.ndarray, num_layers: int) -> np.ndarray:
    """Returns how often layers were active in successive spans, [layers, spans]."""
    is_on = np.zeros((len(active), num_layers))
    np.put_along_axis(is_on, active, 1.0, axis=1)
    spans = np.array_split(
        is_on, min(len(is_on), max(1, len(is_on) // 20), _MOST_COLUMNS)
    )
    return np.array([span.mean(axis=0) for span in spans]).T

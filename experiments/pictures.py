"""The pictures of the experiments."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparse_jax.training.run_files import updates_of

__all__ = ["draw_comparison", "draw_rows", "draw_sweep"]

# Tol's bright palette, which keeps its order in gray and for the color-blind.
COLORS = ("#BBBBBB", "#4477AA", "#CCBB44", "#EE6677", "#228833", "#AA3377")


def draw_comparison(
    path: Path,
    points: Mapping[str, tuple[int, float, float]],
    losses: Mapping[str, Path],
) -> None:
    """Draws the accuracy of every method beside its training loss.

    Args:
      path: PNG file to write.
      points: trained parameters, accuracy in [0, 1] and its standard error.
      losses: the `metrics.jsonl` of each method.
    """
    # Matplotlib takes half a second to import.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = []
    for place, (color, (title, point)) in enumerate(
        zip(COLORS, points.items(), strict=False)
    ):
        size, accuracy, error = point
        left.errorbar(
            100 * accuracy, place, xerr=100 * error, fmt="o", color=color,
            markersize=9, capsize=4, linewidth=1.8,
        )  # fmt: skip
        names.append(f"{title}\n{size:,} trained")
        steps, values = _losses(losses[title])
        right.plot(steps, values, color=color, label=title, linewidth=1.8)
    left.set_yticks(range(len(names)), names, fontsize=9)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_xlabel("validation accuracy (%), with one standard error")
    left.set_title("Accuracy for the parameters trained", loc="left")
    right.set_xlabel("updates")
    right.set_ylabel("training loss (nats), running mean")
    right.set_title("Training", loc="left")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_sweep(
    path: Path,
    series: Mapping[str, Mapping[int, list[float]]],
    *,
    metric: str,
    title: str,
) -> None:
    """Draws a metric against trained parameters, mean and range over the seeds.

    Args:
      path: PNG file to write.
      series: method -> trained parameters without the head -> values, one a seed.
      metric: what the values are, for the axis.
      title: title of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, (method, values) in zip(COLORS[1:], series.items(), strict=False):
        sizes = sorted(values)
        means = [100 * np.mean(values[size]) for size in sizes]
        low = [100 * min(values[size]) for size in sizes]
        high = [100 * max(values[size]) for size in sizes]
        axes.plot(sizes, means, "o-", color=color, label=method)
        axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters, head excluded")
    axes.set_ylabel(f"{metric} (%), mean and range over seeds")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_rows(path: Path, tasks: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Draws a metric of several tasks, a line for each row of a table.

    Args:
      path: PNG file to write.
      tasks: task -> row -> values in [0, 1], one a seed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [*dict.fromkeys(row for rows in tasks.values() for row in rows)]
    size = (3 + 2.5 * len(tasks), 1.5 + 0.35 * len(names))
    figure, panels = plt.subplots(
        1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (task, rows) in zip(panels[0], tasks.items(), strict=True):
        for row, values in rows.items():
            place, percent = names.index(row), 100 * np.array(values)
            axes.plot(percent, [place] * len(values), ".", color=COLORS[0])
            axes.plot(np.mean(percent), place, "o", color=COLORS[1])
        axes.set_title(task, loc="left")
        axes.set_yticks(range(len(names)), names)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("metric of the task (%), mean and every seed")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _losses(path: Path, window: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Returns the updates and the running mean of the losses of a run."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = updates_of(rows)
    values = np.array([row["loss"] for row in rows])
    total = np.cumsum(np.insert(values, 0, 0.0))
    width = np.minimum(np.arange(1, values.size + 1), window)
    means = (total[1:] - total[np.arange(1, values.size + 1) - width]) / width
    return np.array([row["step"] for row in rows]), means

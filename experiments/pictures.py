"""The pictures of the experiments."""

import itertools
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from sparse_jax.training.run_files import updates_of

__all__ = [
    "COLORS",
    "canvas",
    "colored",
    "draw_choices",
    "draw_comparison",
    "draw_sweep",
    "save",
]

# Tol's bright palette, which keeps its order in gray and for the color-blind.
COLORS = (
    "#BBBBBB", "#4477AA", "#CCBB44", "#EE6677", "#228833", "#AA3377", "#66CCEE",
)  # fmt: skip
Series = TypeVar("Series")


def colored(series: Iterable[Series]) -> Iterator[tuple[str, Series]]:
    """Yields every series with its color; from the seventh on, colors come again.

    Example:
      >>> [color for color, name in colored("abcdefg")][::6]
      ['#4477AA', '#4477AA']
    """
    return zip(itertools.cycle(COLORS[1:]), series, strict=False)


def canvas(number: int) -> tuple[Any, Any]:
    """Returns a figure with so many panels in a row, and the panels."""
    # Matplotlib takes half a second to import.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (max(4.7 * number, 7), 4.2)
    figure, panels = plt.subplots(
        1, number, figsize=size, layout="constrained", squeeze=False
    )
    return figure, panels[0]


def save(figure: Any, path: Path, title: str) -> None:
    """Writes a figure of `canvas` to a PNG, with a light grid and a title."""
    import matplotlib.pyplot as plt

    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # At matplotlib's size of 12 points an inch has room for ten characters.
    lines = textwrap.wrap(title, int(10 * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
        zip(itertools.cycle(COLORS), points.items(), strict=False)
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
    for color, (method, values) in colored(series.items()):
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


class _Probes(Protocol):
    """What the probes of a run found."""

    @property
    def updates(self) -> Sequence[int]: ...
    @property
    def losses(self) -> Sequence[Sequence[float]]: ...
    @property
    def importance(self) -> Sequence[Sequence[float]]: ...


def draw_choices(
    path: Path,
    values: Mapping[str, Sequence[float]],
    probes: Mapping[str, _Probes],
    *,
    unit: str,
    title: str,
) -> None:
    """Draws a metric by choice of layers, and what the probes of IST taught it.

    Args:
      path: PNG file to write.
      values: the metric of every seed, by choice.
      probes: of the choices that make some.
      unit: of the metric, for the axis.
      title: of the picture.
    """
    figure, (left, middle, right) = canvas(3)
    for place, found in enumerate(values.values()):
        left.plot(found, [place] * len(found), "o", color=COLORS[1], alpha=0.5)
        left.plot(np.mean(found), place, "|", color=COLORS[3], markersize=18, mew=2.5)
    left.set_yticks(range(len(values)), [*values])
    left.invert_yaxis()
    left.set(xlabel=unit)
    left.set_title("Every seed, and the mean", loc="left")
    for color, (name, one) in colored(probes.items()):
        importance, losses = np.array(one.importance), np.array(one.losses)
        weights = 1 / (1 + np.exp(-importance))
        lines = middle.plot(one.updates, weights, color=color, linewidth=1.3)
        lines[0].set_label(name)
        for style, spread in (("-", losses), ("--", np.exp(-losses))):
            label = name if style == "-" else None
            right.plot(one.updates, spread.std(axis=1), style, color=color, label=label)
    middle.set(xlabel="update", ylabel="sigmoid(importance), one line a layer")
    middle.set_title("Weight that a layer is drawn with", loc="left")
    right.set(
        xlabel="update", ylabel="standard deviation over the probes", yscale="log"
    )
    right.set_title("Of losses (solid), of exp(-loss) (dashed)", loc="left")
    if probes:
        middle.legend(frameon=False)
        right.legend(frameon=False)
    save(figure, path, title)


def _losses(path: Path, window: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Returns the updates and the running mean of the losses of a run."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = updates_of(rows)
    values = np.array([row["loss"] for row in rows])
    total = np.cumsum(np.insert(values, 0, 0.0))
    width = np.minimum(np.arange(1, values.size + 1), window)
    means = (total[1:] - total[np.arange(1, values.size + 1) - width]) / width
    return np.array([row["step"] for row in rows]), means

"""A table of rows, columns and seeds: printed, kept as JSON, and drawn."""

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

__all__ = ["SCALES", "Report", "fill_in", "spread", "table_parser"]

MEAN = "mean"
SCALES = ("tiny", "small", "paper")


def table_parser(doc: str | None, *, output: str) -> argparse.ArgumentParser:
    """Returns the options that the tables of the papers share.

    Args:
      doc: of the experiment; its first line describes it.
      output: the folder of the runs unless another is named.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default=SCALES[0])
    parser.add_argument("--model", help="folder, or id on the Hub")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument(
        "--plan",
        metavar="TARGET",
        help="report what the rows of the paper need on devices such as v5p:2x2x1 "
        "instead of running anything",
    )
    return parser


def fill_in(args: argparse.Namespace, defaults: Mapping[str, object]) -> None:
    """Sets the options that were left out to those of their scale."""
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def spread(values: Sequence[float], digits: int) -> str:
    """Returns the mean, of several values with their standard deviation.

    Example:
      >>> spread([1.0, 2.0, 3.0], 1)
      '2.0 ± 1.0'
    """
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a table of a paper shows, as it was measured here.

    Attributes:
      title: with the unit and the scale.
      rows: values of every seed, by row and column.
      notes: of every row, by the name of their column: sizes, learning rates.
      published: values of the paper, by row and column.
      scale: multiplies values for people.
      digits: after the point.
    """

    title: str
    rows: Mapping[str, Mapping[str, Sequence[float]]]
    notes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    scale: float = 100
    digits: int = 1

    @property
    def columns(self) -> list[str]:
        """The names of the columns of values."""
        return list(next(iter(self.rows.values())))

    def cell(self, values: Sequence[float]) -> str:
        """Returns mean and deviation of the values of all seeds."""
        return spread([self.scale * value for value in values], self.digits)

    def show(self) -> None:
        """Prints the table, ours above the paper's."""
        notes = list(next(iter(self.notes.values()), {}))
        several = len(self.columns) > 1
        table = Table(title=self.title)
        for name in ("", *notes, *self.columns, *([MEAN] if several else [])):
            table.add_column(name, justify="right" if name else "left")
        for row, cells in self.rows.items():
            # The deviation of a mean is that of the seeds' means.
            means = [np.mean(np.array([*cells.values()]), axis=0)] if several else []
            values = map(self.cell, (*cells.values(), *means))
            table.add_row(row, *self.notes.get(row, {}).values(), *values)
        for row, cells in self.published.items():
            found = [cells.get(column) for column in self.columns]
            whole = [float(np.mean([*cells.values()]))] if several else []
            texts = ["" if one is None else f"{one:.{self.digits}f}" for one in found]
            mean = [f"{one:.{self.digits}f}" for one in whole]
            blank = [""] * len(notes)
            table.add_row(f"{row} (paper)", *blank, *texts, *mean, style="dim")
        Console(width=min(160, 44 + 16 * len(table.columns))).print(table)

    def save(self, stem: Path) -> None:
        """Writes the values to `stem.json` and draws them in `stem.png`."""
        record = {"date": date.today().isoformat(), **asdict(self)}
        stem.with_suffix(".json").write_text(json.dumps(record, indent=2))
        self._draw(stem.with_suffix(".png"))

    def _draw(self, path: Path) -> None:
        """Draws a dot for every seed and a bar for their mean, a panel a column."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        height = 1.2 + 0.32 * len(self.rows)
        figure, panels = plt.subplots(
            1, len(self.columns), figsize=(3.4 + 2.6 * len(self.columns), height),
            sharey=True, squeeze=False, layout="constrained",
        )  # fmt: skip
        names = list(self.rows)
        for axes, column in zip(panels[0], self.columns, strict=True):
            for place, row in enumerate(names):
                values = self.scale * np.array(self.rows[row][column])
                axes.plot(
                    values, [place] * len(values), "o", color="#4477AA", alpha=0.5
                )
                axes.plot(
                    [values.mean()], [place], "|", color="#EE6677", ms=16, mew=2.5
                )
            axes.set_title(column, loc="left")
            axes.grid(alpha=0.25, axis="x")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_yticks(range(len(names)), names)
        panels[0][0].set_ylim(len(names) - 0.5, -0.5)
        # A dot for every seed, a bar for the mean.
        figure.suptitle(textwrap.fill(self.title, 60), fontsize=10)
        figure.savefig(path, dpi=150)
        plt.close(figure)

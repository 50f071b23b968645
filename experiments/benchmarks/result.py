"""What a benchmark found: a table for people, JSON for programs, and a picture."""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.pictures import COLORS, canvas, colored, save

__all__ = ["Panel", "Result", "benchmark_parser", "finish", "quartiles"]

_PACKAGES = (
    "jax", "torch", "transformers", "peft", "libtpu", "flax", "qwix", "google-tunix",
)  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One quantity of the rows, drawn beside the others.

    Attributes:
      key: of the rows.
      name: with its unit.
      spread: keys of its low and high quartile.
      floor: where a line is drawn, such as 1 for a ratio.
      along: key of a number: rows of one name become a line over it, on axes that
        are both logarithmic. Without it every row is a dot.
    """

    key: str
    name: str
    spread: tuple[str, str] | None = None
    floor: float | None = None
    along: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A table of a benchmark.

    Attributes:
      title: what was measured, at which sizes.
      rows: numbers and names, as JSON has them.
      columns: header -> format of a row, such as `"{ms:.0f}"`; the first names rows.
      panels: what is drawn.
      caption: below the table.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]
    panels: Sequence[Panel] = ()
    caption: str = ""

    def show(self) -> None:
        """Prints the table."""
        table = Table(title=self.title, caption=self.caption or None)
        for number, header in enumerate(self.columns):
            table.add_column(header, justify="right" if number else "left")
        for row in self.rows:
            cells = (template.format(**row) for template in self.columns.values())
            table.add_row(*cells)
        Console(width=min(120, 48 + 14 * len(self.columns))).print(table)

    def name_of(self, row: Mapping[str, Any]) -> str:
        """Returns what the first column says of a row."""
        return next(iter(self.columns.values())).format(**row)

    def save(self, stem: Path) -> None:
        """Writes the rows to `stem.json`, and draws them in `stem.png`."""
        record = {"title": self.title, **circumstances(), "rows": list(self.rows)}
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        if self.panels:
            self._draw(stem.with_suffix(".png"))

    def _draw(self, path: Path) -> None:
        """Draws the panels."""
        figure, panels = canvas(len(self.panels))
        for number, (axes, panel) in enumerate(zip(panels, self.panels, strict=True)):
            if panel.along:
                self._lines(axes, panel, panel.along)
            else:
                self._dots(axes, panel, with_names=number == 0)
        width, _ = figure.get_size_inches()
        if not any(panel.along for panel in self.panels):
            figure.set_size_inches(width + 2, 1.4 + 0.34 * len(self.rows))
        save(figure, path, self.title)

    def _dots(self, axes: Any, panel: Panel, *, with_names: bool) -> None:
        """Draws a dot for every row, with its spread."""
        for place, row in enumerate(self.rows):
            if row.get(panel.key) is None:
                continue
            if panel.spread:
                low, high = (row[key] for key in panel.spread)
                axes.plot([low, high], [place, place], color=COLORS[1], linewidth=2)
            axes.plot(row[panel.key], place, "o", color=COLORS[1], markersize=7)
        names = [self.name_of(row) for row in self.rows] if with_names else []
        axes.set_yticks(range(len(self.rows)), names or [""] * len(self.rows))
        axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_xlabel(panel.name)
        if panel.floor is not None:
            axes.axvline(panel.floor, color=COLORS[3], linewidth=1)
        axes.margins(x=0.08)
        # Of times and bytes zero is shown, of what they add also what is below it.
        rows = [row for row in self.rows if row.get(panel.key) is not None]
        values = [
            row[key] for row in rows for key in (panel.key, *(panel.spread or ()))
        ]
        if min(values, default=0) >= 0:
            axes.set_xlim(0, 1.06 * max(*values, panel.floor or 0, 1e-9))

    def _lines(self, axes: Any, panel: Panel, along: str) -> None:
        """Draws a line for the rows of each name."""
        from matplotlib.ticker import LogLocator, NullLocator

        names = dict.fromkeys(map(self.name_of, self.rows))
        for color, name in colored(names):
            rows = [row for row in self.rows if self.name_of(row) == name]
            at = [row[along] for row in rows]
            axes.plot(at, [row[panel.key] for row in rows], "o-", color=color)
            axes.plot([], [], color=color, label=name)
        axes.set_xscale("log")
        values = [row[panel.key] for row in self.rows]
        # Values that hardly differ would seem to, on an axis that begins at the least.
        if max(values) > 2 * min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.1 * max(values))
        ticks = sorted({row[along] for row in self.rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(along)
        axes.set_title(panel.name, loc="left", fontsize=10)
        axes.legend(fontsize=8)


def circumstances() -> dict[str, Any]:
    """Returns the day, the machine and the versions of what was measured."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
    }


def quartiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Returns the median and the quartiles, as rows have them."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"ratio": float(middle), "low": float(low), "high": float(high)}


def benchmark_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with what all benchmarks take.

    Args:
      doc: of the benchmark; its first line describes it.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, metavar="STEM", help="also write STEM.json and STEM.png"
    )
    return parser


def finish(output: Path | None, *results: Result) -> None:
    """Prints results, and writes them where they are wanted.

    Args:
      output: of the options; several results have numbers after it.
      *results: of the benchmark, in order.
    """
    for number, result in enumerate(results):
        result.show()
        if output is not None:
            suffix = f"-{number + 1}" if len(results) > 1 else ""
            result.save(output.with_name(output.name + suffix))

"""Which entries, and at which learning rate?  Every rule on the quickstart's task.

    python -m experiments.proofreading [--rows random sift lift ...] [--seeds 0 1 2]
        [--learning-rates 2e-3 5e-3 1.25e-2] [--model FOLDER] [--max-steps 60]
        [--output runs/proofreading]

Proofreading as in `experiments/quickstart.py`, where methods differ after a minute of
training: are the words of a sentence in order? Every row trains the head, and all but
"head" and "full" as many entries as LoRA has parameters; lanes round that up, by 13 %
with MiniLM. Each has the best learning rate of one grid on the first seed; full
fine-tuning has a fiftieth of it, the head alone twice as much. An interrupted table
goes on where it was.

sift        the largest gradients of one batch
sift-sum    of the sum of eight batches; so are normalized and the two of fisher
sift-late   of one batch after the head has been trained alone for 12 of 60 updates
sift-again  chosen again every 15 updates
relative    the largest gradients in relation to the weights
lanes       the largest gradients, as many in every lane of a weight
rows, 4x4   whole rows, or blocks, of kernels by the norm of their gradients

The other rows are named by their scores; docs/scores.md has the equations.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.command import run_command
from experiments.quickstart import (
    Encoder,
    be_quiet,
    encoder_of,
    settings_of,
    write_task,
)
from experiments.report import Report
from experiments.trials import run_folder, run_once, trial_parser
from sparse_jax import Settings

RATES = (2e-3, 5e-3, 1.25e-2)
# Of the learning rates of the grid, where a row needs others.
FACTORS = {"head": 2.0, "full": 0.02}
# As in the quickstart; other rows select by one batch.
_SUM = {"select_batches": 8}
# A bias has no rows.
_KERNELS = {"where": ("^layers/attention/(query|key|value|output)/kernel$",)}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("head only", {}),
    "full": ("full", {}),
    "lora": ("LoRA", {}),
    "random": ("random support", {}),
    "sift": ("SIFT", {}),
    "sift-sum": ("SIFT", _SUM),
    "sift-late": ("SIFT", {"select_after": 0.2}),
    "sift-again": ("SIFT", {"reselect_every": 15}),
    "normalized": ("SIFT", {"score": "normalized", **_SUM}),
    "fisher": ("SIFT", {"score": "fisher", **_SUM}),
    "smallest-fisher": ("SIFT", {"score": "smallest-fisher", **_SUM}),
    "snip": ("SIFT", {"score": "snip"}),
    "relative": ("SIFT", {"score": "gradient/magnitude"}),
    "lift": ("SIFT", {"method": "lift"}),
    "off-principal": ("SIFT", {"score": "off-principal"}),
    "magnitude": ("SIFT", {"method": "magnitude"}),
    "smallest-magnitude": ("SIFT", {"score": "smallest-magnitude"}),
    "lanes": ("SIFT", {"granularity": "lane"}),
    "rows": ("SIFT", {"granularity": "row", **_KERNELS}),
    "4x4": ("SIFT", {"granularity": "4x4", **_KERNELS}),
}


def settings_of_row(
    row: str, encoder: Encoder, task: Path, output: Path, *, rate: float
) -> Settings:
    """Returns the settings of a row, at its multiple of a rate of the grid."""
    like, changes = ROWS[row]
    of_run = {
        "learning_rate": FACTORS.get(row, 1.0) * rate,
        "select_batches": 1,
        "overwrite": False,
    }
    return replace(settings_of(like, encoder, task, output), **{**of_run, **changes})


def rates_table(found: dict[str, dict[float, float]], title: str) -> Table:
    """Returns the accuracies of the first seed, by row and learning rate."""
    table = Table(title=title)
    rates = next(iter(found.values()))
    for number, name in enumerate(["", *(f"{rate:g}" for rate in rates)]):
        table.add_column(name, justify="right" if number else "left")
    for row, values in found.items():
        factor = FACTORS.get(row, 1.0)
        of = "" if factor == 1 else f", rates x {factor:g}"
        table.add_row(row + of, *(f"{100 * value:.1f}" for value in values.values()))
    return table


def make_report(args: argparse.Namespace) -> tuple[Report, Table]:
    """Makes the runs that are missing; returns the values of all, and the grid."""
    encoder, task = encoder_of(args.model), write_task(args.output / "task")
    steps = args.max_steps or encoder.max_steps
    notes: dict[str, dict[str, str]] = {}

    def accuracy(row: str, rate: float, seed: int) -> float:
        output = run_folder(args.output, row, rate, seed)
        settings = settings_of_row(row, encoder, task, output, rate=rate)
        metrics = run_once(replace(settings, seed=seed, max_steps=steps))
        trained = f"{metrics['trained_parameters_without_head']:,}"
        notes[row] = {
            "trained, no head": trained,
            "rate": f"{settings.learning_rate:g}",
        }
        return metrics["eval"]["accuracy"]

    grid, rows = {}, {}
    for row in args.rows:
        first = {
            rate: accuracy(row, rate, args.seeds[0]) for rate in args.learning_rates
        }
        best = max(first, key=first.__getitem__)
        grid[row] = first
        rows[row] = {"accuracy": [accuracy(row, best, seed) for seed in args.seeds]}
    seeds = ", ".join(map(str, args.seeds))
    title = f"Proofreading, {encoder.title}, {steps} updates of 32, %, seeds {seeds}"
    report = Report(title=title, rows=rows, notes=notes)
    return report, rates_table(grid, f"Seed {args.seeds[0]}, by learning rate, %")


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, then shows all of them."""
    output = "runs/proofreading"
    parser = trial_parser(__doc__, rates=RATES, output=output, needs_model=False)
    parser.add_argument(
        "--rows", choices=ROWS, metavar="ROW", nargs="+", default=[*ROWS],
        help=f"of {', '.join(ROWS)}",
    )  # fmt: skip
    args = parser.parse_args(argv)
    be_quiet()
    report, grid = make_report(args)
    Console(width=100).print(grid)
    report.show()
    report.save(args.output / "proofreading")


if __name__ == "__main__":
    run_command(main)

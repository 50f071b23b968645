"""Trials: runs of one method over learning rates and seeds, each made once."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.report import Report
from sparse_jax import Settings, finetune
from sparse_jax.data.glue import find_task
from sparse_jax.training.output_folder import require_usable

__all__ = [
    "LOSS",
    "Measure",
    "Trial",
    "grid_of",
    "make_trial",
    "measure_of",
    "run_folder",
    "run_once",
    "show",
    "trial_parser",
]


@dataclass(frozen=True)
class Measure:
    """What is compared, and how a table shows it.

    Attributes:
      key: of `eval` in `metrics.json`.
      unit: for people.
      choose: `max` if a large value is good, `min` if a small one is.
      scale: what values are multiplied with.
      digits: after the point.
    """

    key: str
    unit: str
    choose: Callable[..., float] = max
    scale: float = 100
    digits: int = 1


LOSS = Measure("loss", "loss, nats per token", min, 1, 4)


def measure_of(task: str) -> Measure:
    """Returns what decides on a task: the loss, or the first metric of GLUE's."""
    if task == "causal":
        return LOSS
    metric = find_task(task).primary
    return Measure(metric, f"{metric}, %")


@dataclass(frozen=True)
class Trial:
    """One method at its best learning rate.

    Attributes:
      rate: the learning rate of the grid that was best on the first seed.
      size: trained parameters, head excluded.
      state_bytes: of supports, masters and the optimizer, for each trained parameter.
      values: the metric of every seed.
    """

    rate: float
    size: int
    state_bytes: float
    values: tuple[float, ...]


def run_folder(folder: Path, name: str, rate: float, seed: int) -> Path:
    """Returns the directory of one run of a trial."""
    return folder / f"{name}-lr{rate:g}-seed{seed}"


def make_trial(
    name: str,
    settings: Settings,
    *,
    measure: Measure,
    rates: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
) -> Trial:
    """Chooses a learning rate on the first seed, then runs all seeds with it.

    Every run has a directory of its own in `folder`. A run that was made is not made
    again and one that was interrupted goes on, so the same call may be repeated.

    Args:
      name: the beginning of the names of the directories.
      settings: of all runs, but for learning rate, seed and output.
      measure: what decides.
      rates: the grid of learning rates.
      seeds: not empty.
      folder: where the directories are.
    """

    def run(rate: float, seed: int) -> dict[str, Any]:
        output = str(run_folder(folder, name, rate, seed))
        return run_once(replace(settings, learning_rate=rate, seed=seed, output=output))

    def value(metrics: dict[str, Any]) -> float:
        return metrics["eval"][measure.key]

    best = measure.choose(rates, key=lambda rate: value(run(rate, seeds[0])))
    runs = [run(best, seed) for seed in seeds]
    values = tuple(map(value, runs))
    first = runs[0]
    held = first["optimizer_bytes"] / first["trained_parameters"]
    return Trial(best, first["trained_parameters_without_head"], held, values)


def run_once(settings: Settings) -> dict[str, Any]:
    """Returns the metrics of a run, from its directory if it has been made.

    Raises:
      InputError: as `finetune`, or if the run that was made had other settings.
    """
    output = Path(settings.output)
    stored = output / "metrics.json"
    settings = replace(settings, resume=(output / "config.json").is_file())
    if not stored.is_file():
        return finetune(settings)
    if settings.resume:
        # Another scale or number of updates may have been meant for this folder.
        require_usable(settings)
    return json.loads(stored.read_text())


def trial_parser(
    doc: str | None, *, rates: Sequence[float], output: str, needs_model: bool = True
) -> argparse.ArgumentParser:
    """Returns the options that comparisons share.

    Args:
      doc: of the experiment; its first line describes it.
      rates: the grid of learning rates unless told.
      output: the folder of the runs unless told.
      needs_model: whether `--model` has no default.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", required=needs_model, help="folder")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=list(rates))
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def grid_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what `make_trial` takes from the options of `trial_parser`."""
    return {
        "rates": args.learning_rates,
        "seeds": args.seeds,
        "folder": args.output,
    }


def show(
    title: str,
    rows: Mapping[str, Settings],
    *,
    measure: Measure,
    args: argparse.Namespace,
) -> dict[str, Trial]:
    """Makes the runs that are missing, then shows a table of all of them.

    Args:
      title: of the table; the seeds are added.
      rows: the settings by the names of the rows, which begin those of the folders.
      measure: what is compared.
      args: as `trial_parser` reads them.

    Returns:
      The trials by the names of their rows.
    """
    trials = {
        name: make_trial(name, settings, measure=measure, **grid_of(args))
        for name, settings in rows.items()
    }
    Report(
        title=f"{title}, seeds {', '.join(map(str, args.seeds))}",
        rows={name: {measure.unit: one.values} for name, one in trials.items()},
        notes={
            name: {
                "trained, no head": f"{one.size:,}",
                "training state, bytes each": f"{one.state_bytes:.2f}",
                "rate": f"{one.rate:g}",
            }
            for name, one in trials.items()
        },
        scale=measure.scale,
        digits=measure.digits,
    ).show()
    return trials

"""Which layers should an update train?  IST, seven other rules, and all layers.

    python -m experiments.layer_choice --model FOLDER --data FILE --scale tiny
        [--task causal] [--choices all ist random ...] [--method lora]
        [--active 0.25] [--max-steps 60] [--seeds 0 1]
        [--learning-rates 8e-3] [--output runs/layer_choice]

With the task causal FOLDER is a decoder, such as BabyLlama or the one that
`experiments/pretrain_decoder.py` makes, and FILE a text of another kind than it was
trained on: what is compared is the loss on the end of the text, which no run trains on.
With a task of GLUE FOLDER is an encoder, and its metric on the evaluation data is
compared. All runs make the same number of updates and differ in nothing but the layers;
each way has its learning rate from the same grid, the best on the first seed.

A second table says how far the importance moved: a reward of IST is exp(-loss) less its
mean over the probes, which at the losses of real models hardly differs between them.
Writes `layer_choice.json` and `layer_choice.png`. An interrupted run of this file goes
on where it was; `--scale` sets the options that are not given.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.command import run_command
from experiments.pictures import draw_choices
from experiments.trials import Trial, measure_of, run_folder, show, trial_parser
from sparse_jax import Settings
from sparse_jax.training.run_files import read_rows, updates_of

# The paper's sites: query, key, value, and the two maps of the MLP.
WHERE = ("^attention/(query|key|value)$", "^mlp/(up|down)$")
CHOICES: dict[str, dict[str, Any]] = {
    "all": {},
    "ist": {"sampler": "ist"},
    # The released rate is for tens of thousands of updates.
    "ist-fast": {"sampler": "ist", "importance_rate": 1000.0},
    "ist-normalized": {
        "sampler": "ist",
        "normalize_rewards": True,
        "importance_rate": 0.3,
    },
    "random": {"sampler": "uniform"},
    "lisa": {"sampler": "uniform", "hold": 20},
    "norm": {"sampler": "norm"},
    "cka": {"sampler": "cka"},
    "spectral": {"sampler": "spectral"},
    "middle": {"sampler": "middle"},
}


@dataclass(frozen=True)
class Scale:
    """What the options are that are not given.

    Attributes:
      max_steps: updates.
      learning_rates: the grid.
      seeds: of the runs.
      batch_size: examples.
      max_length: tokens.
    """

    max_steps: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    batch_size: int
    max_length: int


SCALES = {
    "tiny": Scale(60, (8e-3,), (0, 1), 8, 64),
    "small": Scale(300, (5e-4, 2e-3, 8e-3), (0, 1, 2), 16, 128),
}


def settings_of(choice: str, args: argparse.Namespace) -> Settings:
    """Returns the settings of a choice of layers."""
    scale = SCALES[args.scale]
    settings = Settings(
        model=args.model,
        data=args.data,
        task=args.task,
        output="",
        method=args.method,
        epochs=100,
        max_steps=args.max_steps,
        batch_size=scale.batch_size,
        max_length=scale.max_length,
    )
    if settings.is_causal:
        settings = replace(settings, loss_on="all")
    if args.method == "sift":
        leaves = tuple(f"^layers/{rule[1:-1]}/" for rule in WHERE)
        settings = replace(settings, where=leaves, density=0.05)
    if args.method == "lora" and settings.is_causal:
        settings = replace(settings, where=WHERE)
    if choice == "all":
        return settings
    return replace(settings, active=args.active, **CHOICES[choice])


@dataclass(frozen=True)
class Probes:
    """What the probes of a run found, and how far the importance moved.

    Attributes:
      updates: the numbers of the updates with a probe.
      losses: shape (probes, num_probes), nats.
      importance: after them, shape (probes, L).
    """

    updates: list[int]
    losses: list[list[float]]
    importance: list[list[float]]

    def summary(self) -> dict[str, float]:
        """Returns what the second table shows."""
        losses, importance = np.array(self.losses), np.array(self.importance)
        weights = 1 / (1 + np.exp(-importance[-1]))
        return {
            "probes": len(losses),
            "loss": float(losses.mean()),
            "spread_of_losses": float(np.median(losses.std(axis=1))),
            "spread_of_rewards": float(np.median(np.exp(-losses).std(axis=1))),
            "range_of_importance": float(np.ptp(importance[-1])),
            "ratio_of_weights": float(weights.max() / weights.min()),
        }


def probes_of(name: str, trial: Trial, args: argparse.Namespace) -> Probes | None:
    """Returns the probes of the first seed of a choice; None if it makes none."""
    folder = run_folder(args.output, name, trial.rate, args.seeds[0])
    found = Probes([], [], [])
    importance: list[float] = []
    for row in updates_of(read_rows(folder / "metrics.jsonl")):
        importance = row.get("importance", importance)
        # Lists are written when they change; of earlier versions also zeros before.
        if any(row.get("probe_losses", ())):
            found.updates.append(row["step"])
            found.losses.append(row["probe_losses"])
            found.importance.append(importance)
    return found if found.updates else None


def show_probes(found: Mapping[str, Probes]) -> None:
    """Prints how far the importance moved."""
    table = Table(title="Probes of the first seed: medians, and the importance at last")
    for column in (
        "layers", "probes", "loss", "sd of losses", "sd of exp(-loss)",
        "importance, max - min", "weights, max / min",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "layers" else "right")
    for name, probes in found.items():
        values = probes.summary()
        cells = [f"{values.pop('probes'):.0f}", f"{values.pop('loss'):.2f}"]
        table.add_row(name, *cells, *(f"{value:.3g}" for value in values.values()))
    Console(width=110).print(table)


def main() -> None:
    """Makes the runs that are missing, then shows all of them."""
    parser = trial_parser(__doc__, rates=(), output="runs/layer_choice")
    parser.set_defaults(learning_rates=None, seeds=None)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="causal")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--choices", choices=CHOICES, nargs="+", default=[*CHOICES])
    parser.add_argument("--method", choices=("lora", "sift", "full"), default="lora")
    parser.add_argument("--active", type=float, default=0.25)
    args = parser.parse_args()
    for option in ("max_steps", "learning_rates", "seeds"):
        default = getattr(SCALES[args.scale], option)
        setattr(args, option, getattr(args, option) or default)
    names = {name: f"{args.method}-{name}" for name in args.choices}
    title = f"{args.method} on {args.task}, {args.max_steps} updates"
    measure = measure_of(args.task)
    trials = show(
        title,
        {names[name]: settings_of(name, args) for name in names},
        measure=measure,
        args=args,
    )
    every = {name: probes_of(names[name], trials[names[name]], args) for name in names}
    found = {name: probes for name, probes in every.items() if probes is not None}
    if found:
        show_probes(found)
    values = {
        name: [measure.scale * value for value in trials[names[name]].values]
        for name in names
    }
    path = args.output / "layer_choice.png"
    draw_choices(path, values, found, unit=measure.unit, title=title)
    report = {
        "title": title,
        "unit": measure.unit,
        "options": {name: str(value) for name, value in vars(args).items()},
        "trials": {name: asdict(trials[names[name]]) for name in names},
        "probes": {
            name: {**asdict(probes), **probes.summary()}
            for name, probes in found.items()
        },
    }
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)

"""How many parameters does each method need?  The paper's figure, on any model.

    python -m experiments.sweep --model MODEL --task mrpc [--data FOLDER]
        [--densities 0.0001 0.001 0.01 0.1] [--ranks 1 4 16] [--seeds 0 1 2]
        [--learning-rates 3e-4 1e-3 3e-3] [--epochs 4] [--output runs/sweep]

SIFT and a random support at several densities and LoRA at several ranks. For every
method and size the learning rate is the best of the grid on the first seed; then all
seeds run. Every run has a directory of its own and is not repeated, so an interrupted
sweep goes on where it was. Prints a table with mean and deviation, draws `sweep.png`.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from experiments.command import run_command
from experiments.pictures import draw_sweep
from experiments.trials import measure_of, show, trial_parser
from sparse_jax import Settings


def sizes(base: Settings, args: argparse.Namespace) -> dict[str, Settings]:
    """Returns the settings of every method and size, by a name for their folders."""
    found = {}
    for method, density in itertools.product(("sift", "random"), args.densities):
        found[f"{method}-{density:g}"] = replace(base, method=method, density=density)
    for rank in args.ranks:
        found[f"lora-{rank}"] = replace(base, method="lora", rank=rank)
    return found


def main() -> None:
    """Runs the sweep, then shows it."""
    parser = trial_parser(__doc__, rates=[3e-4, 1e-3, 3e-3], output="runs/sweep")
    parser.add_argument("--data")
    parser.add_argument("--task", required=True)
    densities = {"nargs": "*", "type": float, "default": [1e-4, 1e-3, 1e-2, 1e-1]}
    parser.add_argument("--densities", **densities)
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128)
    args = parser.parse_args()
    base = Settings(
        model=args.model,
        task=args.task,
        data=args.data,
        output="",
        epochs=args.epochs,
        max_steps=args.max_steps,
        max_length=args.max_length,
    )
    measure = measure_of(args.task)
    rows = sizes(base, args)
    trials = show(args.task, rows, measure=measure, args=args)
    series: dict[str, dict[int, list[float]]] = {}
    for name, trial in trials.items():
        found = series.setdefault(rows[name].method_word, {})
        found[trial.size] = list(trial.values)
    picture = args.output / "sweep.png"
    title = f"{args.task}, {Path(args.model).name}"
    draw_sweep(picture, series, metric=measure.key, title=title)
    print(f"The picture is {picture}.")


if __name__ == "__main__":
    run_command(main)

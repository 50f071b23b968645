"""Do lanes and rows of entries train as well as entries chosen freely?  Three seeds.

    python -m experiments.granularity --model FOLDER --data FILE [--task causal]
        [--density 0.0546875] [--where '^layers/.*kernel'] [--max-steps 300]
        [--seeds 0 1 2] [--learning-rates 5e-4 2e-3 8e-3] [--output runs/granularity]
        [--granularities entry lane row]

FOLDER is a model whose widths are multiples of 128. With lanes every 128 rows of a
column have the same number of trained entries, 7 of 128 unless told; free entries, and
those of rows, are as many in all. With the task causal the loss on the end of FILE is
compared, which no run trains on; with a task of GLUE its metric. Each has its learning
rate from the same grid, the best on the first seed. An interrupted run of this file
goes on where it was.
"""

import argparse

from experiments.command import run_command
from experiments.trials import measure_of, show, trial_parser
from sparse_jax import Settings


def settings_of(granularity: str, args: argparse.Namespace) -> Settings:
    """Returns the settings of a granularity."""
    is_causal = args.task == "causal"
    texts = {"loss_on": "all", "batch_size": 16, "max_length": 128}
    return Settings(
        model=args.model,
        data=args.data,
        task=args.task,
        output="",
        density=args.density,
        granularity=granularity,
        where=(args.where,),
        epochs=100,
        max_steps=args.max_steps,
        **(texts if is_causal else {}),
    )


def main() -> None:
    """Makes the runs that are missing, then shows all of them."""
    rates = [5e-4, 2e-3, 8e-3]
    parser = trial_parser(__doc__, rates=rates, output="runs/granularity")
    parser.set_defaults(max_steps=300)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="causal")
    parser.add_argument("--density", type=float, default=7 / 128)
    parser.add_argument("--where", default="^layers/.*kernel")
    words = ("entry", "lane", "row")
    parser.add_argument("--granularities", nargs="+", default=words)
    args = parser.parse_args()
    show(
        f"sift on {args.task}, {args.max_steps} updates",
        {name: settings_of(name, args) for name in args.granularities},
        measure=measure_of(args.task),
        args=args,
    )


if __name__ == "__main__":
    run_command(main)

"""Do entries chosen by lanes train as well as entries chosen freely?  Three seeds.

    python -m experiments.granularity --model FOLDER --data FILE [--task causal]
        [--density 0.0546875] [--where '^layers/.*kernel'] [--max-steps 300]
        [--seeds 0 1 2] [--learning-rates 5e-4 2e-3 8e-3] [--output runs/granularity]

FOLDER is a model whose widths are multiples of 128. With lanes every 128 rows of a
column have the same number of trained entries, 7 of 128 unless told; free entries are
as many in all. With the task causal the loss on the end of FILE is compared, which no
run trains on; with a task of GLUE its metric. Each has its learning rate from the same
grid, the best on the first seed. An interrupted run of this file goes on where it was.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.trials import COLUMNS, make_trial
from sparse_jax import Settings
from sparse_jax.tasks.glue import find_task


def main() -> None:
    """Makes the runs that are missing, then shows all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="causal")
    parser.add_argument("--density", type=float, default=7 / 128)
    parser.add_argument("--where", default="^layers/.*kernel")
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    rates = [5e-4, 2e-3, 8e-3]
    parser.add_argument("--learning-rates", nargs="+", type=float, default=rates)
    parser.add_argument("--output", type=Path, default=Path("runs/granularity"))
    args = parser.parse_args()
    is_loss = args.task == "causal"
    metric = "loss" if is_loss else find_task(args.task).primary
    unit = "loss, nats per token" if is_loss else f"{metric}, %"
    table = Table(
        title=f"sift on {args.task}: {unit}, {args.max_steps} updates, "
        f"{len(args.seeds)} seeds"
    )
    for column in ("entries", *COLUMNS):
        table.add_column(column, justify="left" if column == "entries" else "right")
    texts = {"loss_on": "all", "batch_size": 16, "max_length": 128} if is_loss else {}
    for granularity in ("entry", "lane"):
        settings = Settings(
            model=args.model,
            data=args.data,
            task=args.task,
            output="",
            density=args.density,
            granularity=granularity,
            where=(args.where,),
            epochs=100,
            max_steps=args.max_steps,
            **texts,
        )
        trial = make_trial(
            granularity,
            settings,
            metric=metric,
            rates=args.learning_rates,
            seeds=args.seeds,
            folder=args.output,
            choose=min if is_loss else max,
        )
        cells = trial.shown(1, 4) if is_loss else trial.cells
        table.add_row(granularity, *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

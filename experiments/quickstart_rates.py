"""Which learning rate is each method of the quickstart best at?

    python -m experiments.quickstart_rates [--seed 0] [--output runs/quickstart_rates]

Runs every method of the quickstart at three learning rates and prints the accuracies.
Ten minutes on two cores.
"""

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from experiments.command import run_command
from experiments.quickstart import (
    ROWS,
    be_quiet,
    encoder_of,
    quickstart_parser,
    settings_of,
    slug,
    write_task,
)
from sparse_jax import finetune

FEW = (2e-3, 5e-3, 1.25e-2)
GRIDS = {
    "head only": (4e-3, 1e-2, 2.5e-2),
    "LoRA": FEW,
    "random support": FEW,
    "SIFT": FEW,
    "full": (4e-5, 1e-4, 2.5e-4),
}


def main() -> None:
    """Runs the grid and prints it."""
    parser = quickstart_parser(__doc__, "runs/quickstart_rates")
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=[*ROWS])
    args = parser.parse_args()
    be_quiet()
    encoder, task = encoder_of(args.model), write_task(args.output / "task")
    table = Table(title=f"{encoder.title}: accuracy by learning rate, seed {args.seed}")
    for column in ("method", "low", "middle", "high"):
        table.add_column(column)
    for row in args.rows:
        cells = []
        for rate in GRIDS[row]:
            output = args.output / f"{slug(row)}-{rate:g}"
            settings = replace(
                settings_of(row, encoder, task, output),
                learning_rate=rate,
                seed=args.seed,
                max_steps=args.max_steps or encoder.max_steps,
            )
            accuracy = finetune(settings)["eval"]["accuracy"]
            cells.append(f"{rate:g}: {accuracy:.1%}")
            print(row, cells[-1], flush=True)
        table.add_row(row, *cells)
    Console(width=96).print(table)


if __name__ == "__main__":
    run_command(main)

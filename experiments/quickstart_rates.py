"""Which learning rate is each method of the quickstart best at?

    python -m experiments.quickstart_rates [--seed 0] [--output runs/quickstart_rates]

Runs every method of the quickstart at its own learning rate, at 0.4 and at 2.5 times
as much, and prints the accuracies. Ten minutes on two cores.
"""

from dataclasses import replace

from rich.console import Console
from rich.table import Table

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
        for factor in (0.4, 1, 2.5):
            rate = factor * encoder.rates[row]
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
    main()

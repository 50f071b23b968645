"""Which learning rate is each method of the quickstart best at?

    python -m experiments.quickstart_rates [--seed 1] [--output runs/quickstart_rates]

Runs every method of the quickstart at three learning rates and prints the accuracies.
Ten minutes on two cores.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.quickstart import BASE, ENTRIES, slug
from sparse_jax import finetune

GRIDS = {
    "head only": (3e-3, 1e-2, 3e-2),
    "LoRA": (5e-3, 1e-2, 2e-2),
    "random support": (5e-3, 1e-2, 2e-2),
    "SIFT": (5e-3, 1e-2, 2e-2),
    "full": (3e-4, 6e-4, 1e-3),
}


def main() -> None:
    """Runs the grid and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart_rates"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=BASE.max_steps)
    args = parser.parse_args()
    table = Table(title=f"accuracy by learning rate, seed {args.seed}")
    for column in ("method", "low", "middle", "high"):
        table.add_column(column)
    for entry in ENTRIES:
        cells = []
        for rate in GRIDS[entry.title]:
            settings = replace(
                entry.settings,
                learning_rate=rate,
                seed=args.seed,
                max_steps=args.max_steps,
                output=str(args.output / f"{slug(entry.title)}-{rate:g}"),
                overwrite=True,
            )
            accuracy = finetune(settings)["eval"]["accuracy"]
            cells.append(f"{rate:g}: {accuracy:.1%}")
            print(entry.title, cells[-1], flush=True)
        table.add_row(entry.title, *cells)
    Console(width=96).print(table)


if __name__ == "__main__":
    main()

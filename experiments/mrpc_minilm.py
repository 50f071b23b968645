"""Does SIFT keep up with full fine-tuning and LoRA?  MiniLM on MRPC, three seeds.

    python -m experiments.mrpc_minilm --model FOLDER --data FOLDER
        [--methods full lora-8 sift-0.01 ...] [--seeds 0 1 2]
        [--learning-rates 1e-4 5e-4 2e-3] [--epochs 4] [--output runs/mrpc_minilm]

FOLDER are all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide) and the two files of MRPC. Every
method has its learning rate from the same grid, the best on the first seed, judged on
the test examples like all results here. LoRA and the sparse methods train query, key,
value and output of the attention; everything but "head" trains the classifier too.
An interrupted run of this file goes on where it was; several may share a folder if
their methods differ.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.trials import COLUMNS, make_trial
from sparse_jax import Settings

BASE = Settings(
    model="",
    task="mrpc",
    output="",
    batch_size=32,  # examples
    max_length=128,  # tokens
    epochs=4,
)
METHODS = {
    "full": replace(BASE, method="full"),
    "lora-8": replace(BASE, method="lora", rank=8),
    "sift-0.05": replace(BASE, method="sift", density=0.05),
    "sift-0.01": replace(BASE, method="sift", density=0.01),
    "sift-0.001": replace(BASE, method="sift", density=0.001),
    "random-0.001": replace(BASE, method="random", density=0.001),
    # Two of the six layers at a time, chosen by their importance or at random.
    "lora-8-ist": replace(BASE, method="lora", rank=8, sampler="ist", active=0.34),
    "lora-8-rst": replace(BASE, method="lora", rank=8, sampler="uniform", active=0.34),
    "bitfit": replace(BASE, method="bitfit"),
    "head": replace(BASE, method="head"),
}


def main() -> None:
    """Makes the runs that are missing, then shows all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    rates = [1e-4, 5e-4, 2e-3]
    parser.add_argument("--learning-rates", nargs="+", type=float, default=rates)
    parser.add_argument("--epochs", type=int, default=BASE.epochs)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs/mrpc_minilm"))
    args = parser.parse_args()
    seeds = ", ".join(map(str, args.seeds))
    table = Table(title=f"MRPC test accuracy (%), seeds {seeds}, {args.epochs} epochs")
    for column in ("method", *COLUMNS):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in args.methods:
        settings = replace(
            METHODS[name],
            model=args.model,
            data=args.data,
            epochs=args.epochs,
            max_steps=args.max_steps,
        )
        trial = make_trial(
            name,
            settings,
            metric="accuracy",
            rates=args.learning_rates,
            seeds=args.seeds,
            folder=args.output,
        )
        table.add_row(name, *trial.cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

"""Do five tasks fit on one base?  Disjoint SIFT adapters against added LoRAs.

    python -m experiments.five_tasks --model FOLDER --data FOLDER
        [--density 0.01] [--rank 8] [--max-steps 300] [--output runs/five_tasks]

FOLDER of the data has the folders CoLA, MRPC, RTE, and SST-2 and QNLI in `samples`.
SIFT trains each task outside the entries of those before it, LoRA as if it were alone.
Every adapter is evaluated when it has been trained, again when all five have, and with
all five on the base at once, each task with its own classifier. An interrupted run goes
on where it was.
"""

import argparse
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from experiments.command import run_command
from experiments.trials import run_once
from sparse_jax import (
    Settings,
    combine_adapters,
    compare_supports,
    evaluate_adapter,
    from_pretrained,
    load_adapter,
    save_adapter,
)
from sparse_jax.data.glue import find_task

TASKS = {
    "mrpc": "MRPC", "rte": "RTE", "cola": "CoLA",
    "sst2": "samples/SST-2", "qnli": "samples/QNLI",
}  # fmt: skip
HEAD = ("classifier/kernel", "classifier/bias")
COLUMNS = ("alone", "after all five", "all five on")


def train(method: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the metrics of every task, by task and column."""
    runs = {task: args.output / f"{method}-{task}" for task in TASKS}
    found: dict[str, dict[str, float]] = {}
    for number, (task, folder) in enumerate(TASKS.items()):
        earlier = tuple(str(runs[other]) for other in list(TASKS)[:number])
        settings = Settings(
            model=args.model,
            data=str(args.data / folder),
            task=task,
            output=str(runs[task]),
            method=method,
            density=args.density,
            rank=args.rank,
            avoid=earlier if method == "sift" else (),
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
        )
        alone = run_once(settings)["eval"]
        found[task] = {"alone": alone[find_task(task).primary]}
    adapters = [load_adapter(runs[task]) for task in TASKS]
    for number, (task, folder) in enumerate(TASKS.items()):
        data, metric = str(args.data / folder), find_task(task).primary
        again = evaluate_adapter(runs[task], data=data)
        found[task]["after all five"] = again[metric]
        _, params = from_pretrained(
            args.model, labels=adapters[number].labels, key=jax.random.key(0)
        )
        total = combine_adapters(params, adapters, new=HEAD, head=number)
        path = args.output / f"{method}-all-{task}.safetensors"
        save_adapter(path, total)
        found[task]["all five on"] = evaluate_adapter(
            path, model=args.model, data=data, max_length=128, batch_size=32
        )[metric]
    return found


def shared_entries(args: argparse.Namespace) -> int:
    """Returns how many entries of the base two of the SIFT adapters share."""
    adapters = [load_adapter(args.output / f"sift-{task}") for task in TASKS]
    return sum(
        overlap.shared
        for i, first in enumerate(adapters)
        for second in adapters[:i]
        for leaf, overlap in compare_supports(first, second).items()
        if leaf not in HEAD
    )


def main() -> None:
    """Makes the runs that are missing, then shows the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/five_tasks"))
    args = parser.parse_args()
    results = {method: train(method, args) for method in ("sift", "lora")}
    table = Table("task", "metric", title="Five tasks on one base, %")
    for method in results:
        for column in COLUMNS:
            table.add_column(f"{method}, {column}", justify="right")
    for task in TASKS:
        values = [f"{100 * results[m][task][c]:.2f}" for m in results for c in COLUMNS]
        table.add_row(task, find_task(task).primary, *values)
    Console(width=120).print(table)
    print(f"Entries of the base that two SIFT adapters share: {shared_entries(args)}.")


if __name__ == "__main__":
    run_command(main)

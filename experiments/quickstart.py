"""Do a few entries of a pre-trained Transformer suffice?  Five ways, one budget.

    python -m experiments.quickstart [--output runs/quickstart]

Needs no network: the encoder was pre-trained by `experiments/quickstart_data` on the
documentation that every Python installation carries, and the task, which part of the
standard library a sentence is about, comes from there too (8 classes, 1030 sentences
for evaluation). Head only, LoRA, a random support, SIFT and full fine-tuning make the
same number of updates; LoRA, random and SIFT train the same number of parameters.
`experiments/quickstart_rates.py` compares learning rates. Prints a
table, draws `quickstart.png`, and leaves a run directory for each method. Under five
minutes on two cores.
"""

import argparse
import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparse_jax import Settings, finetune

ASSETS = Path(__file__).parent / "assets"
BASE = Settings(
    model=str(ASSETS / "quickstart_bert"),
    data=str(ASSETS / "quickstart"),
    task="classification",
    output="",
    batch_size=32,  # examples
    epochs=3,
    max_steps=300,  # updates
    max_length=48,  # tokens; 97 in 100 sentences are shorter
    rank=1,  # LoRA on four sites of four layers: 6,144 parameters beside the head
    density=0.0104,  # of the same sites' kernels and biases: as many, within 1 %
)


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    title: str
    settings: Settings


ENTRIES = (
    Entry("head only", replace(BASE, method="head", learning_rate=1e-2)),
    Entry("LoRA", replace(BASE, method="lora", learning_rate=1e-2)),
    Entry("random support", replace(BASE, method="random", learning_rate=1e-2)),
    Entry("SIFT", replace(BASE, method="sift", learning_rate=1e-2)),
    Entry("full", replace(BASE, method="full", learning_rate=6e-4)),
)
COLUMNS = (
    "method",
    "trained parameters",
    "accuracy",
    "optimizer bytes",
    "adapter bytes",
    "step time",
)


def row(title: str, metrics: dict[str, Any]) -> tuple[str, ...]:
    """Returns the cells of one method."""
    return (
        title,
        f"{metrics['trained_parameters']:,}",
        f"{metrics['eval']['accuracy']:.1%}",
        f"{metrics['optimizer_bytes']:,}",
        f"{metrics['adapter_bytes']:,}",
        f"{metrics['seconds_per_step'] * 1e3:.0f} ms",
    )


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Prints the comparison."""
    steps = results["SIFT"]["steps"]
    table = Table(title=f"{steps} updates of {BASE.batch_size} sentences, seed 0")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    for title, metrics in results.items():
        table.add_row(*row(title, metrics))
    console = Console(width=96)
    console.print(table)
    sift, full = results["SIFT"], results["full"]
    share = sift["trained_parameters"] / full["trained_parameters"]
    state = full["optimizer_bytes"] / sift["optimizer_bytes"]
    file = full["adapter_bytes"] / sift["adapter_bytes"]
    error = standard_error(sift["eval"]["accuracy"])
    console.print(
        f"SIFT trains {share:.1%} of the parameters that full fine-tuning trains: "
        f"{state:.0f} times less optimizer state, a file {file:.0f} times smaller. "
        f"An accuracy has a standard error of {error:.1%}: smaller differences mean "
        "nothing."
    )


def draw(path: Path, results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Draws accuracy against trained parameters, and the loss of every method."""
    from experiments.pictures import draw_comparison

    losses = {title: folder / slug(title) / "metrics.jsonl" for title in results}
    points = {}
    for title, metrics in results.items():
        accuracy = metrics["eval"]["accuracy"]
        size = metrics["trained_parameters"]
        points[title] = (size, accuracy, standard_error(accuracy))
    draw_comparison(path, points, losses)


def standard_error(accuracy: float) -> float:
    """Returns how far an accuracy is off by the choice of sentences alone."""
    number = len((ASSETS / "quickstart" / "validation.jsonl").read_text().splitlines())
    return math.sqrt(accuracy * (1 - accuracy) / number)


def slug(title: str) -> str:
    """Returns the folder of a method."""
    return title.lower().replace(" ", "-")


def main() -> None:
    """Trains all methods, then shows them side by side."""
    # The advice of transformers is to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Five runs would warn of the same new classifier and of the same long sentences;
    # `metrics.json` of each run has these lines.
    log = logging.getLogger("sparse_jax")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=BASE.max_steps)
    args = parser.parse_args()
    results = {}
    for number, entry in enumerate(ENTRIES, 1):
        print(f"[{number}/{len(ENTRIES)}] {entry.title}", flush=True)
        output = str(args.output / slug(entry.title))
        settings = replace(
            entry.settings,
            output=output,
            seed=args.seed,
            max_steps=args.max_steps,
            overwrite=True,
        )
        results[entry.title] = finetune(settings)
    print_table(results)
    picture = args.output / "quickstart.png"
    draw(picture, results, args.output)
    print(f"The picture is {picture}, the runs are beside it.")


if __name__ == "__main__":
    main()

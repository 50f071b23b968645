"""Does SIFT match full fine-tuning on GLUE?  Song et al., 2024, Table 2.

    python -m experiments.glue --task mrpc rte [--model FacebookAI/roberta-large]
        [--data FOLDER] [--method sift] [--max-steps N] [--output runs/glue]

The paper's settings as values: RoBERTa-large, query, key, value and output of the
attention at density 0.008, the classifier in full, batch 32, seed 42. The published
weight decay acts on nothing in the released code and is left out. Meant for one
accelerator; prints our value beside the published ones. No result of ours is recorded
yet.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparse_jax import Settings, finetune
from sparse_jax.data.glue import find_task

BASE = Settings(
    model="FacebookAI/roberta-large",
    task="mrpc",
    output="",
    density=0.008,
    where=("^layers/attention/(query|key|value|output)/",),
    dense=("^classifier/",),
    batch_size=32,  # examples
    max_length=512,  # tokens
    seed=42,
)
# The released scripts: task, peak learning rate, epochs.
CONFIGS = {
    task: replace(BASE, task=task, learning_rate=rate, epochs=epochs)
    for task, rate, epochs in (
        ("cola", 7e-5, 20),
        ("mnli", 7e-5, 10),
        ("mrpc", 7e-5, 20),
        ("qnli", 5e-5, 10),
        ("qqp", 7e-5, 20),
        ("rte", 7e-5, 20),
        ("sst2", 7e-5, 15),
        ("stsb", 8e-5, 30),
    )
}
# Table 2, in percent: full fine-tuning and LoRA (both from Hu et al., 2021), SIFT.
PUBLISHED = {
    "cola": (68.0, 68.2, 68.5),
    "mnli": (90.2, 90.6, 90.6),
    "mrpc": (90.9, 90.2, 90.4),
    "qnli": (94.7, 94.8, 94.1),
    "qqp": (92.2, 91.6, 91.0),
    "rte": (86.6, 85.2, 85.9),
    "sst2": (96.4, 96.2, 96.2),
    "stsb": (92.4, 92.3, 92.3),
}
COLUMNS = ("task", "metric", "ours", "full", "LoRA", "SIFT", "trained, no head")


def main() -> None:
    """Runs the tasks asked for and prints them beside the paper's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=CONFIGS, nargs="*", default=list(CONFIGS))
    parser.add_argument("--model", default=BASE.model)
    parser.add_argument("--data", help="folder of the task's files; default: the Hub")
    parser.add_argument("--method", default="sift")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--max-length", type=int, default=BASE.max_length)
    parser.add_argument("--output", type=Path, default=Path("runs/glue"))
    args = parser.parse_args()
    title = f"{args.method} on {args.model}; full, LoRA, SIFT as published, percent"
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column)
    for name in args.task:
        settings = replace(
            CONFIGS[name],
            model=args.model,
            data=args.data,
            method=args.method,
            max_steps=args.max_steps,
            max_length=args.max_length,
            output=str(args.output / f"{name}-{args.method}"),
            overwrite=True,
        )
        if args.method not in ("sift", "random", "magnitude"):
            settings = replace(settings, where=None)
        metrics = finetune(settings)
        metric = find_task(name).primary
        size = metrics["trained_parameters_without_head"]
        ours = f"{100 * metrics['eval'][metric]:.1f}"
        published = [str(value) for value in PUBLISHED[name]]
        table.add_row(name, metric, ours, *published, f"{size:,}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

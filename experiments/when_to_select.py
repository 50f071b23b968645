"""When should SIFT choose its entries?  Before and after the head has settled.

    python -m experiments.when_to_select --model FOLDER --data FOLDER
        [--tasks stsb unbalanced rte mrpc cola] [--rows sift random lora full ...]
        [--seeds 0 1 2] [--max-steps 200] [--output runs/when_to_select]

FOLDER are all-MiniLM-L6-v2 and data with the folders CoLA, MRPC and RTE, and STS-B and
SST-2 in `samples`. The first gradient of a new head is about the offset of all examples
alike: the mean of a regression, the shares of unbalanced classes. "unbalanced" is SST-2
with nine positive texts for a negative one to train on, and as many of both to evaluate
on, by the area under the ROC curve: accuracy is first of all about the offset. Rows
start the bias of the head at zero or, as is usual, at what the labels say; update the
head alone for a while, sum the gradients of several batches or examples, or choose
again every 50 updates (as many entries each time). Beside them are a random support,
LoRA of rank 8, with as many parameters as there are entries, and full fine-tuning. Each
learning rate is the best of one grid on the first seed, by the evaluation data. An
interrupted run goes on where it was; `TASK.json` and `TASK.png` hold the tables.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import mannwhitneyu

from experiments.command import run_command
from experiments.glue import RANK
from experiments.report import Report, spread
from experiments.trials import measure_of, run_folder, run_once
from sparse_jax import Settings, predict
from sparse_jax.planning.abstract import read_model

UNBALANCED = "unbalanced"
TASKS = {
    "stsb": "samples/STS-B", UNBALANCED: "samples/SST-2", "rte": "RTE",
    "mrpc": "MRPC", "cola": "CoLA",
}  # fmt: skip
BATCH = 16
ROWS: dict[str, dict[str, Any]] = {
    "sift": {},
    "random": {"method": "random"},
    "lora": {"method": "lora", "rank": RANK},
    "full": {"method": "full"},
    "sift, from zero": {"head_bias": "zeros"},
    "random, from zero": {"method": "random", "head_bias": "zeros"},
    "sift, from zero, after 30": {"head_bias": "zeros", "select_after": 30.0},
    "sift, after 10": {"select_after": 10.0},
    "sift, after 30": {"select_after": 30.0},
    "sift, after 60": {"select_after": 60.0},
    "sift, 8 batches": {"select_batches": 8},
    "sift, after 30, 8 batches": {"select_after": 30.0, "select_batches": 8},
    # A batch of a selection is one micro-batch.
    "sift, 64 examples": {"select_batches": 64, "accumulate": BATCH},
    "sift, 64 examples, normalized": {
        "select_batches": 64,
        "accumulate": BATCH,
        "score": "normalized",
    },
    "sift, again every 50": {"reselect_every": 50},
}


class Run(NamedTuple):
    """What a run reached: by the first metric of its task, and by what decides here."""

    usual: float
    decides: float


def unbalanced(source: Path, folder: Path) -> Path:
    """Writes SST-2 with nine positive training texts for a negative one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "dev"):
        lines = (source / f"{name}.jsonl").read_text().splitlines()
        by_label = {label: [] for label in "01"}
        for line in lines:
            by_label[json.loads(line)["label"]].append(line)
        most = min(len(by_label["0"]), len(by_label["1"]))
        fewer = most // 9 if name == "train" else most
        kept = by_label["0"][:fewer] + by_label["1"][:most]
        if not (written := folder / f"{name}.jsonl").is_file():
            written.write_text("\n".join(kept) + "\n")
    return folder


def settings_of(task: str, row: str, args: argparse.Namespace) -> Settings:
    """Returns the settings of a row, but for learning rate, seed and output."""
    data, word = args.data / TASKS[task], task
    if task == UNBALANCED:
        data, word = unbalanced(data, args.output / "unbalanced-data"), "sst2"
    changes = {"method": "sift", **ROWS[row]}
    if changes["method"] in ("sift", "random"):
        # LoRA has 2 r d parameters at a kernel of d x d with a bias of d.
        width = read_model(args.model).config.hidden_size
        changes["density"] = 2 * RANK / (width + 1)
    return Settings(
        model=args.model,
        data=str(data),
        task=word,
        output="",
        batch_size=args.batch_size,
        group_by_length=True,
        epochs=1000,  # until `max_steps`
        max_steps=args.max_steps,
        **changes,
    )


def area_of(run: Path) -> float:
    """Returns how often a positive example has a larger score than a negative one.

    That is the area under the ROC curve, one half by chance, and the same for whatever
    is added to all scores.
    """
    file = run / "predictions.jsonl"
    predict(run, output=file, overwrite=True)
    scores: dict[str, list[float]] = {}
    for line in map(json.loads, file.read_text().splitlines()):
        # Small probabilities keep digits that those close to one lose.
        scores.setdefault(line["label"], []).append(-line["scores"]["negative"])
    positive, negative = scores["positive"], scores["negative"]
    larger = mannwhitneyu(positive, negative).statistic
    return float(larger) / (len(positive) * len(negative))


def best_runs(task: str, row: str, args: argparse.Namespace) -> tuple[float, list[Run]]:
    """Returns the best learning rate on the first seed, and the runs of all seeds."""
    name = f"{task}-{row.replace(', ', '-').replace(' ', '-')}"
    measure = measure_of(settings_of(task, row, args).task)

    def run(rate: float, seed: int) -> Run:
        output = run_folder(args.output, name, rate, seed)
        own = {"learning_rate": rate, "seed": seed, "output": str(output)}
        metrics = run_once(replace(settings_of(task, row, args), **own))
        usual = metrics["eval"][measure.key]
        return Run(usual, area_of(output) if task == UNBALANCED else usual)

    best = lambda rate: run(rate, args.seeds[0]).decides
    rate = measure.choose(args.learning_rates, key=best)
    return rate, [run(rate, seed) for seed in args.seeds]


def main() -> None:
    """Makes the runs that are missing, showing the table after every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, default=[1e-4, 5e-4, 2e-3]
    )
    parser.add_argument("--output", type=Path, default=Path("runs/when_to_select"))
    args = parser.parse_args()
    for task in args.tasks:
        rows: dict[str, dict[str, list[float]]] = {}
        notes = {}
        for row in args.rows:
            rate, runs = best_runs(task, row, args)
            unit = measure_of(settings_of(task, row, args).task).unit
            notes[row] = {"rate": f"{rate:g}"}
            if task == UNBALANCED:
                notes[row][unit] = spread([100 * one.usual for one in runs], 1)
                unit = "area under the ROC curve, %"
            rows[row] = {unit: [one.decides for one in runs]}
            title = f"When to select, {task}, {args.max_steps} updates"
            report = Report(title=title, rows=rows, notes=notes)
            report.save(args.output / task)
            report.show()


if __name__ == "__main__":
    run_command(main)

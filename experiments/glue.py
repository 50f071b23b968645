"""Does SIFT match full fine-tuning on GLUE, and LoRA of as many entries?

    python -m experiments.tables glue --scale tiny|small|paper --model FOLDER
        --data FOLDER [--tasks mrpc rte cola] [--rows full lora sift ...]
        [--seeds 0 1 2] [--output runs/glue] [--plan TARGET]

FOLDER of the data has the folders MRPC, RTE and so on; without it, the Hub's are read.

tiny   the encoder of the quickstart, 20 updates, one seed: shows that it runs.
small  all-MiniLM-L6-v2 (22.7 M parameters), 500 updates of 16 examples, three seeds.
       Every row trains the classifier, and all but full, head and biases as many
       entries of the query, key, value and output of the attention as LoRA of rank 8
       has parameters. Each learning rate is the best of one grid on the first task and
       seed, by the evaluation data, which all rows are compared on.
paper  RoBERTa-large with the settings of the released scripts (Song et al., 2024,
       Table 2), meant for an accelerator. `--plan v5e:2x2` reports what it needs.

"released" is what the published code does, `sift(compat="torch-sift")`, without its
clipping, which differs by the version of its trainer. An interrupted table goes on
where it was; several may share a folder if their rows differ.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import optax

from experiments.papers import print_plan
from experiments.report import Report, fill_in, table_parser
from experiments.trials import run_folder, run_once
from sparse_jax import Dense, Settings, sift
from sparse_jax.data.glue import find_task
from sparse_jax.planning.abstract import read_model
from sparse_jax.training.optimizer import learning_rate_at, schedule_of

SITES = "layers/attention/(query|key|value|output)/"
RANK = 8
SPARSE = ("sift", "random", "lift", "magnitude")
_IST = {"sampler": "ist", "active": 0.5}
ROWS: dict[str, dict[str, object]] = {
    "full": {"method": "full"},
    "head": {"method": "head"},
    "biases": {"method": "bitfit"},
    "lora": {"method": "lora", "rank": RANK},
    "lora+ist": {"method": "lora", "rank": RANK, **_IST},
    "random": {"method": "random"},
    "sift": {"method": "sift"},
    "sift-sum": {"method": "sift", "select_batches": 8},
    "sift after head": {"method": "sift", "select_after": 0.2},
    "sift+ist": {"method": "sift", **_IST},
    "lift": {"method": "lift"},
    "fisher": {"method": "sift", "score": "fisher", "select_batches": 8},
    "snip": {"method": "sift", "score": "snip"},
    "magnitude": {"method": "magnitude"},
    "released": {},
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
# The released scripts: peak learning rate and epochs. Their weight decay acts on
# nothing in the released code and is left out.
RELEASED = {
    "cola": (7e-5, 20),
    "mnli": (7e-5, 10),
    "mrpc": (7e-5, 20),
    "qnli": (5e-5, 10),
    "qqp": (7e-5, 20),
    "rte": (7e-5, 20),
    "sst2": (7e-5, 15),
    "stsb": (8e-5, 30),
}
BASE = Settings(model="", task="mrpc", output="", batch_size=32, max_length=128)
TINY = Path(__file__).parent / "assets" / "quickstart_bert"
FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE"}
# What the options are where they are left out.
SCALES: dict[str, dict[str, object]] = {
    "tiny": {
        "model": None, "tasks": ("mrpc", "rte"), "rows": ("full", "lora", "sift"),
        "seeds": (0,), "learning_rates": (1e-3,), "max_steps": 20,
    },
    "small": {
        "model": None, "tasks": ("mrpc", "rte", "cola"), "rows": tuple(ROWS),
        "seeds": (0, 1, 2), "learning_rates": (1e-4, 5e-4, 2e-3), "max_steps": 500,
    },
    "paper": {
        "model": "FacebookAI/roberta-large", "tasks": tuple(RELEASED),
        "rows": ("sift",), "seeds": (42,), "learning_rates": (),
    },
}  # fmt: skip


def paper_settings(task: str, row: str) -> Settings:
    """Returns the settings of a released script, with another method in some rows."""
    rate, epochs = RELEASED[task]
    sparse = {"density": 0.008, "where": (f"^{SITES}",)}
    return replace(
        BASE,
        model="FacebookAI/roberta-large",
        task=task,
        max_length=512,
        seed=42,
        learning_rate=rate,
        epochs=epochs,
        dense=("^classifier/",) if row not in ("full", "head") else None,
        head_bias="zeros",
        **ROWS[row],
        **(sparse if ROWS[row]["method"] in SPARSE else {}),
    )


def settings_of(row: str, base: Settings, rate: float, width: int) -> Settings:
    """Returns the settings of a row at a learning rate.

    Args:
      row: of `ROWS`.
      base: of the task.
      rate: peak learning rate.
      width: of the model. LoRA of rank r has 2 r d parameters at a kernel of d x d
        with a bias of d: a density of 2 r / (d + 1).
    """
    density = 2 * RANK / (width + 1)
    if row == "released":
        schedule = schedule_of(rate, base.max_steps or 1)
        tx = sift(
            optax.adamw(lambda count: learning_rate_at(count, schedule)),
            density,
            where=SITES,
            dense="classifier/",
            stacked="layers/",
            compat="torch-sift",
        )
        method = Dense(dense=(f"^{SITES}", "^classifier/"))
        return replace(base, method=method, optimizer=tx, head_bias="zeros")
    settings = replace(base, learning_rate=rate, **ROWS[row])
    return replace(settings, density=density) if settings.method in SPARSE else settings


def make_report(args: argparse.Namespace) -> Report:
    """Makes the runs that are missing and returns the values of all."""
    model = args.model or str(TINY)
    width = read_model(model).config.hidden_size
    notes: dict[str, dict[str, str]] = {}

    def value(row: str, task: str, rate: float, seed: int) -> float:
        folder = args.data and str(args.data / FOLDERS.get(task, task))
        base = replace(
            BASE,
            model=model,
            data=folder,
            task=task,
            batch_size=16,
            group_by_length=True,  # MRPC: rows of 1.2 instead of 1.8 times its tokens
            epochs=1000,  # until `max_steps`
            max_steps=args.max_steps,
            seed=seed,
            output=str(run_folder(args.output, f"{row}-{task}", rate, seed)),
        )
        metrics = run_once(settings_of(row, base, rate, width))
        size = f"{metrics['trained_parameters_without_head']:,}"
        # To the run the released code is an optimizer of whole leaves.
        size = "as sift" if row == "released" else size
        notes[row] = {"trained, no head": size, "rate": f"{rate:g}"}
        return metrics["eval"][find_task(task).primary]

    rows = {}
    for row in args.rows:
        first = partial(value, row, args.tasks[0], seed=args.seeds[0])
        best = max(args.learning_rates, key=first)
        rows[row] = {
            task: [value(row, task, best, seed) for seed in args.seeds]
            for task in args.tasks
        }
    name = Path(model).name if args.model else "the quickstart's encoder"
    return Report(
        title=f"GLUE, {name}, {args.max_steps} updates, %, seeds "
        f"{', '.join(map(str, args.seeds))}",
        rows=rows,
        notes=notes,
        published={
            f"{row}, RoBERTa-large": {task: PUBLISHED[task][i] for task in args.tasks}
            for i, row in enumerate(("full", "LoRA", "SIFT"))
        },
    )


def paper_report(args: argparse.Namespace) -> Report:
    """Runs the released settings, of one seed, and returns their values."""
    rows: dict[str, dict[str, list[float]]] = {row: {} for row in args.rows}
    for row in args.rows:
        for task in args.tasks:
            settings = replace(
                paper_settings(task, row),
                data=args.data and str(args.data / FOLDERS.get(task, task)),
                output=str(args.output / f"paper-{row}-{task}"),
                max_steps=args.max_steps,
            )
            rows[row][task] = [run_once(settings)["eval"][find_task(task).primary]]
    return Report(
        title="GLUE, RoBERTa-large, %, seed 42",
        rows=rows,
        published={
            row: {task: PUBLISHED[task][i] for task in args.tasks}
            for i, row in enumerate(("full", "LoRA", "SIFT"))
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, then shows all of them."""
    parser = table_parser(__doc__, output="runs/glue")
    parser.add_argument("--data", type=Path, help="default: the Hub")
    parser.add_argument("--tasks", choices=PUBLISHED, nargs="+")
    parser.add_argument("--rows", choices=ROWS, nargs="+")
    parser.add_argument("--learning-rates", nargs="+", type=float)
    args = parser.parse_args(argv)
    fill_in(args, SCALES[args.scale])
    if args.plan:
        rows = {row: paper_settings("mrpc", row) for row in args.rows}
        print_plan("roberta-large", rows, length=512, target=args.plan)
        return
    report = (paper_report if args.scale == "paper" else make_report)(args)
    report.show()
    report.save(args.output / f"glue-{args.scale}")

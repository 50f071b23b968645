"""Can one model do several tasks?  Sums of sparse adapters against summed LoRAs.

    python -m experiments.merging --data FOLDER [--scale tiny|small] [--model FOLDER]
        [--tasks mrpc rte cola sst2 qnli] [--output runs/merging]

FOLDER of the data has the folders CoLA, MRPC, RTE, and SST-2 and QNLI in `samples`.
`disjoint` trains each task outside of the entries of those before it (SIFT with
`avoid`), `overlapping` every task as if it were alone (SIFT), and so does `lora`, with
as many parameters; `tiny` takes the quickstart's encoder. Then 2, 3, ... adapters
are added, and each task is evaluated with its own classifier. The table has the metric
of the sum in relation to that of the adapter alone, as a mean over the tasks in the
sum; a task whose metric alone is zero is left out of it. An interrupted run goes on
where it was.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.command import run_command
from experiments.five_tasks import HEAD, TASKS
from experiments.glue import TINY
from experiments.report import Report, fill_in, table_parser
from experiments.trials import run_once
from sparse_jax import (
    Settings,
    combine_adapters,
    evaluate_adapter,
    from_pretrained,
    load_adapter,
    save_adapter,
)
from sparse_jax.data.glue import find_task
from sparse_jax.planning.abstract import read_model

METHODS, RANK = ("disjoint", "overlapping", "lora"), 4
SCALES: dict[str, dict[str, Any]] = {
    "tiny": {
        "tasks": ("sst2", "qnli", "rte"), "max_steps": 25, "batch_size": 16,
        "max_length": 48,
    },
    "small": {
        "tasks": tuple(TASKS), "max_steps": 300, "batch_size": 32,
        "max_length": 128,
    },
}  # fmt: skip


def run_of(method: str, task: str, output: Path) -> Path:
    """Returns the folder of a run."""
    return output / f"{method}-{task}"


def evaluated(
    method: str, tasks: Sequence[str], number: int, common: Mapping[str, Any], at: Path
) -> float:
    """Returns the metric of a task with the sum of several adapters, made once.

    Args:
      method: of all.
      tasks: of the adapters that are added.
      number: the task of the classifier and the data, as a place in `tasks`.
      common: settings of the runs.
      at: folder of the runs.
    """
    task, path = tasks[number], at / f"{method}-{'+'.join(tasks)}-{tasks[number]}.json"
    if not path.is_file():
        adapters = [load_adapter(run_of(method, one, at)) for one in tasks]
        _, params = from_pretrained(
            common["model"], labels=adapters[number].labels, key=jax.random.key(0)
        )
        total = combine_adapters(params, adapters, new=HEAD, head=number)
        saved = path.with_suffix(".safetensors")
        save_adapter(saved, total)
        metrics = evaluate_adapter(
            saved,
            model=common["model"],
            data=str(common["data"] / TASKS[task]),
            max_length=common["max_length"],
            batch_size=common["batch_size"],
        )
        saved.unlink()
        path.write_text(json.dumps(metrics))
    return json.loads(path.read_text())[find_task(task).primary]


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, then shows the table."""
    parser = table_parser(__doc__, output="runs/merging")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", choices=TASKS, nargs="+")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args(argv)
    if args.scale == "tiny":
        fill_in(args, {"model": str(TINY)})
    if args.scale not in SCALES or args.plan or args.model is None:
        parser.error(f"give --model, and a --scale of {', '.join(SCALES)}")
    # LoRA has 2 r d parameters at a kernel of d x d with a bias of d.
    density = 2 * RANK / (read_model(args.model).config.hidden_size + 1)
    scale = SCALES[args.scale]
    fill_in(args, {"tasks": scale["tasks"], "max_steps": scale["max_steps"]})
    common = {
        "model": args.model,
        "data": args.data,
        "batch_size": scale["batch_size"],
        "max_length": scale["max_length"],
    }
    rows: dict[str, dict[str, list[float]]] = {}
    notes = {}
    for method in METHODS:
        alone = []
        for number, task in enumerate(args.tasks):
            earlier = [run_of(method, one, args.output) for one in args.tasks[:number]]
            settings = Settings(
                **{**common, "data": str(args.data / TASKS[task])},
                task=task,
                output=str(run_of(method, task, args.output)),
                method="lora" if method == "lora" else "sift",
                density=density,
                rank=RANK,
                avoid=tuple(map(str, earlier)) if method == "disjoint" else (),
                learning_rate=args.learning_rate,
                epochs=1000,  # until `max_steps`
                max_steps=args.max_steps,
            )
            alone.append(run_once(settings)["eval"][find_task(task).primary])
        rows[method] = {}
        notes[method] = {"metric alone, %": f"{100 * np.mean(alone):.1f}"}
        for count in range(2, len(args.tasks) + 1):
            tasks = args.tasks[:count]
            shares = [
                evaluated(method, tasks, i, common, args.output) / alone[i]
                for i in range(count)
                if alone[i] > 0  # a correlation may be 0 or less
            ]
            rows[method][f"sum of {count}"] = [float(np.mean(shares))]
    report = Report(
        title=f"{Path(args.model).name}, {', '.join(args.tasks)}: share of the metric "
        f"alone, %, in sums of adapters, {args.max_steps} updates",
        rows=rows,
        notes=notes,
    )
    report.show()
    report.save(args.output / "merging")


if __name__ == "__main__":
    run_command(main)

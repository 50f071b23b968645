"""Any task of lm-evaluation-harness, on a base model or an adapter.

    pip install 'sparse_jax[eval]'
    python -m experiments.harness --model FOLDER [--adapter RUN] --tasks arc_easy ...
        [--shots N] [--limit N] [--include FOLDER] [--output runs/harness.json]

Task data comes from the Hub, or from files that the tasks in `--include` name.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.command import run_command
from sparse_jax.generation.harness import harness_model
from sparse_jax.generation.writer import load_writer


def main() -> None:
    """Evaluates the tasks, and writes and prints their results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder or id; default: that of the adapter")
    parser.add_argument("--adapter", help="adapter file, run directory or PEFT folder")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--shots", type=int, help="default: those of the task")
    parser.add_argument("--limit", type=int, help="questions of a task")
    parser.add_argument("--include", help="folder with more tasks")
    parser.add_argument("--output", type=Path, default=Path("runs/harness.json"))
    args = parser.parse_args()
    model = harness_model(load_writer(args.model, args.adapter))
    from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

    results: Any = evaluator.simple_evaluate(
        model=model,
        tasks=args.tasks,
        num_fewshot=args.shots,
        limit=args.limit,
        task_manager=TaskManager(include_path=args.include),
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    kept = {"results": results["results"], "versions": results["versions"]}
    args.output.write_text(json.dumps(kept, indent=2), encoding="utf-8")
    print(make_table(results))


if __name__ == "__main__":
    run_command(main)

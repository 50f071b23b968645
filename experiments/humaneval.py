"""How many programs does a model get right?  HumanEval.

    python -m experiments.humaneval --model FOLDER [--adapter RUN]
        --data HumanEval.jsonl.gz [--num-samples 20] [--temperature 0.2] [--limit N]
        [--k 1 10] [--output runs/humaneval] [--allow-code-execution]
    python -m experiments.humaneval --samples FILE --data HumanEval.jsonl.gz
        [--k 1 10] [--output runs/humaneval] --allow-code-execution

Writes samples in the official JSON lines (`task_id`, `completion`), and with
`--allow-code-execution` runs them and prints the unbiased pass@k. Programs of a model
are never run without that word, and only where they can be contained:
`experiments/sandbox.py` says what that means and what it does not. Samples and outcomes
are kept, and an interrupted run goes on where it was.
"""

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.command import run_command
from experiments.predictions import (
    Predictions,
    digest_of,
    fingerprint,
)
from experiments.sandbox import Limits, require_containment, run_contained
from sparse_jax import Greedy, Sample
from sparse_jax.data import humaneval
from sparse_jax.data.humaneval import Problem, load_problems, load_samples, pass_at_k
from sparse_jax.errors import InputError
from sparse_jax.generation.writer import load_writer, read_stop, text_tokens

# What cannot be part of the body of a function.
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_ROWS = 32  # written at a time, and between two writes


def main() -> None:
    """Writes the samples that are missing, runs those allowed to, and shows pass@k."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder or id; default: that of the adapter")
    parser.add_argument("--adapter", help="adapter file, run directory or PEFT folder")
    parser.add_argument("--samples", type=Path, help="evaluate these; no model needed")
    parser.add_argument("--data", required=True, type=Path, help="HumanEval.jsonl.gz")
    parser.add_argument("--num-samples", type=int, default=1, help="of each problem")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=384)
    parser.add_argument("--limit", type=int, help="problems")
    parser.add_argument("--k", nargs="+", type=int, default=[1])
    parser.add_argument("--seconds", type=float, default=Limits().seconds)
    parser.add_argument("--output", type=Path, default=Path("runs/humaneval"))
    parser.add_argument("--allow-code-execution", action="store_true")
    args = parser.parse_args()
    known = load_problems(args.data)
    problems = [*known.values()][: args.limit]
    limits = Limits(seconds=args.seconds)
    if args.allow_code_execution:
        require_containment(limits)
    if args.samples is not None:
        samples = load_samples(args.samples, known)
    else:
        samples = _write(args, problems)
    counts = Counter(sample.task_id for sample in samples)
    if max(args.k) > (fewest := min(counts.values())):
        raise InputError(
            f"`k` must be at most {fewest}, the fewest samples of a problem, got "
            f"{max(args.k)}. Write more with --num-samples."
        )
    if not args.allow_code_execution:
        print("samples are not run: that takes --allow-code-execution")
        return
    _show(_evaluate(args, known, samples, limits), args)


def _write(
    args: argparse.Namespace, problems: Sequence[Problem]
) -> list[humaneval.Sample]:
    """Returns samples of every problem; those that are there are not written again."""
    writer = load_writer(args.model, args.adapter)
    identity = {
        "model": fingerprint(writer),
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
    }
    kept = Predictions(args.output, "samples", ("task_id", "number"), identity)
    stop = [read_stop(word, writer.tokenizer) for word in _STOP]
    choice = Sample(temperature=args.temperature) if args.temperature else Greedy()
    for number in range(args.num_samples):
        missing = [
            one
            for one in problems
            if not kept.has((one.task_id, number), digest_of(one.prompt))
        ]
        starts = range(0, len(missing), _ROWS)
        for start in track(starts, f"Writing sample {number + 1}"):
            asked = missing[start : start + _ROWS]
            prompts = [text_tokens(one.prompt, writer.tokenizer) for one in asked]
            room = writer.model.config.max_positions - args.max_new_tokens
            fitting = [i for i, tokens in enumerate(prompts) if len(tokens) <= room]
            # Another seed for every sample and part: rows of a call differ anyway.
            seed = number * len(problems) + start
            written = (
                writer.write(
                    [prompts[i] for i in fitting],
                    choice=choice,
                    max_new_tokens=args.max_new_tokens,
                    seed=seed,
                    stop=stop,
                    # A body indented by three and four is no program.
                    keep_space=True,
                )
                if fitting
                else []
            )
            texts = dict(zip(fitting, written, strict=True))
            kept.add(
                [
                    {
                        "task_id": one.task_id,
                        "asked": digest_of(one.prompt),
                        # Nothing after a prompt that is too long.
                        "completion": texts.get(i, ""),
                        "number": number,
                    }
                    for i, one in enumerate(asked)
                ]
            )
    return [
        humaneval.Sample(one.task_id, kept.found[one.task_id, number]["completion"])
        for one in problems
        for number in range(args.num_samples)
    ]


def _evaluate(
    args: argparse.Namespace,
    problems: dict[str, Problem],
    samples: Sequence[humaneval.Sample],
    limits: Limits,
) -> dict[str, list[str]]:
    """Returns the outcomes of the samples of every problem, from the folder if there.

    Equal samples of a problem are run once.
    """
    kept = Predictions(args.output, "outcomes", ("task_id", "digest"), asdict(limits))

    def key(sample: humaneval.Sample) -> tuple[str, str]:
        # With its tests, which other data may have others of.
        program = problems[sample.task_id].program(sample.completion)
        digest = hashlib.sha256(program.encode("utf-8", "backslashreplace"))
        return sample.task_id, digest.hexdigest()

    missing = {key(one): one for one in samples if key(one) not in kept.found}

    def run(sample: humaneval.Sample) -> dict[str, str]:
        program = problems[sample.task_id].program(sample.completion)
        task_id, digest = key(sample)
        outcome = run_contained(program, limits)
        return {"task_id": task_id, "digest": digest, "outcome": outcome}

    with ThreadPoolExecutor() as pool:
        outcomes = pool.map(run, missing.values())
        for line in track(outcomes, "Running", total=len(missing)):
            kept.add([line])
    found = defaultdict(list)
    for sample in samples:
        found[sample.task_id].append(kept.found[key(sample)]["outcome"])
    return found


def _show(outcomes: dict[str, list[str]], args: argparse.Namespace) -> None:
    """Writes and prints pass@k, and how the samples ended."""
    passed = [(len(ends), ends.count("passed")) for ends in outcomes.values()]
    rates = {f"pass@{k}": pass_at_k(passed, k) for k in args.k}
    ends = Counter(end for ends in outcomes.values() for end in ends)
    results = {**rates, "problems": len(passed), "samples": dict(ends)}
    path = args.output / "humaneval.json"
    path.write_text(json.dumps(results, indent=2), encoding="utf-8")
    table = Table(
        title=f"HumanEval, {len(passed)} problems, {sum(ends.values())} samples"
    )
    for name in (*rates, *ends):
        table.add_column(name, justify="right")
    cells = [f"{100 * rate:.1f} %" for rate in rates.values()]
    table.add_row(*cells, *map(str, ends.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    run_command(main)

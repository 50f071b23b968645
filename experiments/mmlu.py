"""What does a model know?  MMLU, by the likelihood of the letters.

    python -m experiments.mmlu --model FOLDER [--adapter RUN] --data FOLDER
        [--shots 5] [--subjects astronomy ...] [--limit N] [--output runs/mmlu]

`--data` has the folders `dev` and `test` of the authors, and the prompts are theirs.
The answer is the likeliest of " A" to " D" after "Answer:". Examples that do not fit
the context are left out from the last one on, as the authors do, and counted; so is a
question that does not fit alone, which is wrong then. Predictions are kept as JSON
lines in the folder of the results, and an interrupted run goes on where it was.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.command import run_command
from experiments.predictions import (
    Predictions,
    digest_of,
    fingerprint,
)
from sparse_jax.data.mmlu import (
    LETTERS,
    MMLU_SUBJECTS,
    ChoiceQuestion,
    load_subject,
    mmlu_prompt,
)
from sparse_jax.errors import InputError
from sparse_jax.generation.ranking import score_responses
from sparse_jax.generation.writer import Writer, load_writer

# Questions between two writes; those of a subject share their examples.
_CHUNK = 256


class _Asked(NamedTuple):
    """A question with the prompt that it is asked by."""

    subject: str
    number: int
    question: ChoiceQuestion
    prompt: str
    shots: int
    digest: str = ""  # of the question with all examples, and its answer


def main() -> None:
    """Answers the questions that have no prediction yet, and shows the accuracies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder or id; default: that of the adapter")
    parser.add_argument("--adapter", help="adapter file, run directory or PEFT folder")
    parser.add_argument("--data", required=True, type=Path, help="folder of MMLU")
    parser.add_argument("--shots", type=int, default=0, help="examples, at most 5")
    parser.add_argument("--subjects", nargs="+", default=[*MMLU_SUBJECTS])
    parser.add_argument("--limit", type=int, help="questions of a subject")
    parser.add_argument("--output", type=Path, default=Path("runs/mmlu"))
    args = parser.parse_args()
    if args.shots < 0 or (args.limit is not None and args.limit < 1):
        raise InputError("`shots` must be at least 0 and `limit` at least 1.")
    tests = {one: load_subject(args.data, one, "test") for one in args.subjects}
    dev = {one: load_subject(args.data, one, "dev") for one in args.subjects}
    few = min(map(len, dev.values()))
    if few < args.shots:
        raise InputError(
            f"`shots` must be at most {few}, the examples of a subject in `dev`, got "
            f"{args.shots}."
        )
    writer = load_writer(args.model, args.adapter)
    name = f"mmlu-{args.shots}-shot"
    identity = {"model": fingerprint(writer), "shots": args.shots}
    kept = Predictions(args.output, name, ("subject", "number"), identity)
    asked = []
    for subject in args.subjects:
        examples = dev[subject][: args.shots]
        for number, question in enumerate(tests[subject][: args.limit]):
            whole = mmlu_prompt(subject, examples, question)
            digest = digest_of(f"{whole} {question.answer}")
            if not kept.has((subject, number), digest):
                one = _asked(writer, subject, number, examples, question)
                asked.append(one._replace(digest=digest))
    for start in track(range(0, len(asked), _CHUNK), "Answering"):
        kept.add(answer(writer, asked[start : start + _CHUNK]))
    chosen = [
        kept.found[subject, number]
        for subject in args.subjects
        for number in range(len(tests[subject][: args.limit]))
    ]
    results = summary(chosen, args.shots)
    path = args.output / f"{name}.json"
    path.write_text(json.dumps(results, indent=2), encoding="utf-8")
    _show(results, args.shots)


def _asked(
    writer: Writer,
    subject: str,
    number: int,
    examples: Sequence[ChoiceQuestion],
    question: ChoiceQuestion,
) -> _Asked:
    """Returns a question after as many of the examples as fit, the first ones."""
    shots = len(examples)
    prompt = mmlu_prompt(subject, examples, question)
    while shots and not _fits(writer, prompt):
        shots -= 1
        prompt = mmlu_prompt(subject, examples[:shots], question)
    return _Asked(subject, number, question, prompt, shots)


def _fits(writer: Writer, prompt: str) -> bool:
    """Says whether the model can read a prompt."""
    length = len(writer.tokenizer(prompt, verbose=False)["input_ids"])
    return length <= writer.model.config.max_positions


def answer(writer: Writer, asked: Sequence[_Asked]) -> list[dict[str, Any]]:
    """Returns the predictions of some questions; none is "" if one is too long."""
    scores = score_responses(
        writer.model,
        writer.params,
        writer.tokenizer,
        [one.question.responses(one.prompt) for one in asked],
        attachment=writer.attachment,
    )
    return [
        {
            "subject": one.subject,
            "number": one.number,
            "shots": one.shots,
            "asked": one.digest,
            "answer": one.question.answer,
            "prediction": LETTERS[int(np.argmax(found))] if len(found) else "",
            "log_likelihoods": found.tolist(),
        }
        for one, found in zip(asked, scores, strict=True)
    ]


def summary(lines: Sequence[Mapping[str, Any]], shots: int) -> dict[str, Any]:
    """Returns accuracies in [0, 1] of subjects, categories and all questions."""
    right = defaultdict(list)
    for line in lines:
        is_right = line["prediction"] == line["answer"]
        for group in (line["subject"], MMLU_SUBJECTS[line["subject"]], "all"):
            right[group].append(is_right)
    return {
        "accuracy": {group: float(np.mean(found)) for group, found in right.items()},
        "questions": {group: len(found) for group, found in right.items()},
        "with fewer shots": sum(line["shots"] < shots for line in lines),
        "too long": sum(not line["prediction"] for line in lines),
    }


def _show(results: Mapping[str, Any], shots: int) -> None:
    """Prints a row for every subject, then the categories and the average."""
    dropped = (
        f"{results['with fewer shots']} with fewer, {results['too long']} too long"
    )
    table = Table(title=f"MMLU, {shots} shots ({dropped}): accuracy (%)")
    table.add_column("subject")
    table.add_column("accuracy", justify="right")
    table.add_column("questions", justify="right")
    groups = [*{**MMLU_SUBJECTS, **dict.fromkeys(MMLU_SUBJECTS.values())}, "all"]
    for group in groups:
        if group in results["accuracy"]:
            percent = f"{100 * results['accuracy'][group]:.1f}"
            table.add_row(group, percent, str(results["questions"][group]))
    Console(width=80).print(table)


if __name__ == "__main__":
    run_command(main)

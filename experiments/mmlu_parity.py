"""Are the choices on MMLU those of PyTorch, and as fast?

    python -m experiments.mmlu_parity --model FOLDER --data FOLDER
        [--questions 1000] [--shots 0] [--output STEM]

Questions of all subjects, in the prompts of `experiments.mmlu`. Two programs with the
same weights in float32 answer the next fifty in turn, each in a process of its own:
this library, and a plain loop with transformers that reads one prompt after the other
and compares the logits of the four letters. With examples (`--shots`) fifty questions
are of one subject, as there, and this library reads its examples once. Times are CPU
seconds, after the first hundred questions. Where choices differ, the distance of the
two likeliest letters is given, in nats. SmolLM2-135M takes a quarter of an hour on one
core without examples; needs torch and transformers.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.benchmarks.workers import (
    OURS,
    THEIRS,
    WARM_UP,
    Program,
    Row,
    add_options,
    are_there,
    circumstances,
    measure,
    ratios,
    serve,
    texts_of,
)
from experiments.command import run_command
from sparse_jax.data.mmlu import (
    LETTERS,
    MMLU_SUBJECTS,
    ChoiceQuestion,
    load_subject,
    mmlu_prompt,
)
from sparse_jax.errors import InputError

CHUNK = 50  # questions of a step
PROGRAMS: tuple[Program, ...] = (("mmlu", OURS), ("mmlu", THEIRS))

Asked = tuple[str, ChoiceQuestion]  # the prompt, and what it asks
Answer = Callable[[Sequence[Asked]], np.ndarray]  # -> scores, shape=(N, 4)


def questions_of(folder: Path, count: int, shots: int) -> list[Asked]:
    """Returns the first questions of all subjects, one of each in turn.

    After examples they are some steps, each of one subject, evenly spread over all.
    """

    def of(subject: str) -> list[Asked]:
        examples = load_subject(folder, subject, "dev")[:shots] if shots else []
        test = load_subject(folder, subject, "test")
        return [(mmlu_prompt(subject, examples, one), one) for one in test]

    if shots:
        names = [*MMLU_SUBJECTS]
        steps = min(count // CHUNK, len(names))
        turns = [of(names[i * len(names) // steps])[:CHUNK] for i in range(steps)]
    else:
        turns = zip_longest(*map(of, MMLU_SUBJECTS))
    found = [*islice((one for one in chain.from_iterable(turns) if one), count)]
    if len(found) < count:
        raise InputError(
            f"`questions` must be at most {len(found)}, those that `data` has, got "
            f"{count}."
        )
    return found


def our_answers(model: str) -> Answer:
    """Returns what scores the letters with this library."""
    from sparse_jax.generation.ranking import score_responses
    from sparse_jax.generation.writer import load_writer

    writer = load_writer(model, None)

    def answer(asked: Sequence[Asked]) -> np.ndarray:
        responses = [question.responses(prompt) for prompt, question in asked]
        scores = score_responses(
            writer.model,
            writer.params,
            writer.tokenizer,
            responses,
            attachment=writer.attachment,
        )
        return np.stack(scores)

    return answer


def their_answers(model: str) -> Answer:
    """Returns what scores the letters with a loop in PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.eval()
    letters = [
        tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"][-1]
        for letter in LETTERS
    ]

    def one(prompt: str) -> np.ndarray:
        ids = torch.tensor(tokenizer(prompt)["input_ids"])[None]
        logits = network(input_ids=ids, logits_to_keep=1).logits[0, -1]
        return logits.log_softmax(-1)[letters].double().numpy()

    def answer(asked: Sequence[Asked]) -> np.ndarray:
        with torch.inference_mode():
            return np.stack([one(prompt) for prompt, _ in asked])

    return answer


def work(args: argparse.Namespace) -> None:
    """Answers the next questions as it is asked to."""
    _, library = args.program
    build = {OURS: our_answers, THEIRS: their_answers}[library]

    def built() -> Callable[[], Row]:
        asked = iter(questions_of(args.data, args.questions, args.shots))
        answer = build(args.model)
        return lambda: {"scores": answer([*islice(asked, CHUNK)]).tolist()}

    serve(built, args.threads)


def summary(rows: dict[Program, list[Row]], asked: Sequence[Asked]) -> list[Row]:
    """Returns a row for each program, with what ours is to it."""
    scores = {one: np.concatenate([r["scores"] for r in rows[one]]) for one in rows}
    right = np.array([LETTERS.index(question.answer) for _, question in asked])
    ours = scores[PROGRAMS[0]]
    found = []
    for program, steps in rows.items():
        other = scores[program]
        chosen = other.argmax(1)
        differs = chosen != ours.argmax(1)
        best = np.sort(other, axis=1)
        near = best[differs, -1] - best[differs, -2]
        found.append(
            {
                "program": program[1],
                **ratios(steps, rows[PROGRAMS[0]]),
                "accuracy": float((chosen == right).mean()),
                "same": int((~differs).sum()),
                "margin": float(near.max()) if differs.any() else None,
                "nats": float(np.abs(other - ours).max()),
            }
        )
    return found


def result_of(found: Sequence[Row], title: str, count: int) -> Result:
    """Returns the table of the rows."""

    def told(one: Row) -> Row:
        is_ours, margin = one["program"] == OURS, one["margin"]
        apart = "" if margin is None else f" (at most {margin:.1g} nats apart)"
        return texts_of(one, is_ours) | {
            "rate": CHUNK / one["seconds"],
            "equal": "" if is_ours else f"{one['same']:,} of {count:,}{apart}",
            "far": "" if is_ours else f"{one['nats']:.1g}",
        }

    return Result(
        title=title,
        caption="Means over the rounds; quartiles are those of the ratios within a "
        "round, above 1 where sparse_jax is faster.",
        rows=[one | told(one) for one in found],
        columns={
            "program": "{program}",
            "accuracy": "{accuracy:.1%}",
            "questions a CPU s": "{rate:.2f}",
            "ratio": "{time}",
            "quartiles": "{spread}",
            "the same choices": "{equal}",
            "furthest, nats": "{far}",
            "peak MiB": "{mib:,.0f}",
        },
        panels=(Panel("ratio", "CPU time, ratio to sparse_jax", ("low", "high"), 1),),
    )


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    add_options(parser, rounds=0)
    parser.add_argument("--data", required=True, type=Path, help="folder of MMLU")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--shots", type=int, default=0, help="examples, at most 5")
    args = parser.parse_args()
    if args.program:
        work(args)
        return
    least = (WARM_UP + 1) * CHUNK
    if args.questions < least or args.questions % CHUNK:
        raise InputError(
            f"`questions` must be a multiple of {CHUNK}, at least {least}, got "
            f"{args.questions}."
        )
    if args.model is None:
        raise InputError("`model` must be the folder of a decoder, got None.")
    if not are_there("torch", "transformers"):
        return
    asked = questions_of(args.data, args.questions, args.shots)
    names = ("model", "data", "questions", "shots", "threads")
    options = {name: getattr(args, name) for name in names}
    args.rounds = args.questions // CHUNK - WARM_UP
    rows = measure(__spec__.name, PROGRAMS, options, args.rounds, lambda firsts: None)
    where = circumstances(args, "torch", "transformers")
    size = f"MMLU, {args.questions:,} questions, {args.shots} shots"
    title = f"{Path(args.model).name}, {size} ({where})"
    finish(args.output, result_of(summary(rows, asked), title, args.questions))


if __name__ == "__main__":
    run_command(main)

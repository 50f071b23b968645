"""Are texts written and answers ranked here as fast as with PyTorch on the same CPU?

    python -m experiments.benchmarks.generation [--model FOLDER] [--rounds 6]
        [--output STEM]

Greedy texts after prompts of different lengths, beside `generate` of transformers; and
the likeliest of the candidates of some questions, beside two loops over the questions:
one reads prompt and candidate together, all candidates of a question as a batch, the
other reads the prompt once and the candidates with its cache. Every program is a
process of its own with the same weights in float32, and all take turns. Texts and
choices have to be the same, or the run ends. Times are CPU seconds, the peak is that of
the process after two steps, weights and libraries included. Without a model it is a
Llama of 30 M random parameters that reads bytes. Needs torch and transformers.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.benchmarks.passages import encoder, prompts_of, questions_of
from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.benchmarks.workers import (
    OURS,
    THEIRS,
    Program,
    Row,
    add_options,
    are_there,
    circumstances,
    measure,
    model_of,
    ratios,
    serve,
    texts_of,
)
from experiments.command import run_command

WRITE, RANK = "write", "rank"
BATCHED, SHARED = f"{THEIRS}, batched", f"{THEIRS}, prompt shared"
PROGRAMS: tuple[Program, ...] = (
    (WRITE, OURS), (WRITE, THEIRS), (RANK, OURS), (RANK, BATCHED), (RANK, SHARED),
)  # fmt: skip
UNITS = {WRITE: "new tokens", RANK: "candidates"}


def our_write(args: argparse.Namespace) -> Callable[[], Row]:
    """Returns a step that writes the texts with this library."""
    from sparse_jax import CausalLM, from_pretrained, generate
    from sparse_jax.training.progress import release_freed_memory

    model, params = from_pretrained(args.model, head=CausalLM)
    release_freed_memory()  # as runs do
    prompts = prompts_of(encoder(args.model), args.batch_size)
    run = partial(generate, model, params, prompts, max_new_tokens=args.new_tokens)
    return lambda: {"found": [row.tolist() for row in run()]}


def our_rank(args: argparse.Namespace) -> Callable[[], Row]:
    """Returns a step that ranks the candidates with this library."""
    from sparse_jax import CausalLM, from_pretrained
    from sparse_jax.data.batches import TokenSequences
    from sparse_jax.generation.ranking import score_sequences
    from sparse_jax.training.progress import release_freed_memory

    model, params = from_pretrained(args.model, head=CausalLM)
    release_freed_memory()
    questions = questions_of(encoder(args.model), args.questions)
    whole = [
        (np.concatenate([prompt, one]), len(prompt))
        for prompt, candidates in questions
        for one in candidates
    ]
    sequences = TokenSequences(
        [ids for ids, _ in whole],
        [np.arange(len(ids)) >= begin for ids, begin in whole],
        max(len(ids) for ids, _ in whole),
        0,
    )
    ends = np.cumsum([len(candidates) for _, candidates in questions])

    def step() -> Row:
        scores = score_sequences(model, params, sequences).log_likelihood
        return _choices(np.split(scores, ends[:-1]))

    return step


def _choices(scores: Sequence[np.ndarray]) -> Row:
    """Returns the likeliest candidates, and all scores in nats."""
    return {
        "found": [int(np.argmax(one)) for one in scores],
        "scores": [float(score) for one in scores for score in one],
    }


def _network(model: str) -> Any:
    """Loads the model with transformers."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def their_write(args: argparse.Namespace) -> Callable[[], Row]:
    """Returns a step that writes the texts with transformers."""
    import torch

    network = _network(args.model)
    prompts = prompts_of(encoder(args.model), args.batch_size)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row.tolist() for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    # A token that the model lacks: all texts get their full length.
    options = {"do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = network.config.vocab_size

    def step() -> Row:
        found = network.generate(
            ids, attention_mask=mask, max_new_tokens=args.new_tokens, **options
        )
        return {"found": found[:, width:].tolist()}

    return step


def their_rank(args: argparse.Namespace, shares: bool) -> Callable[[], Row]:
    """Returns a step that ranks the candidates with a loop over the questions."""
    import torch

    network = _network(args.model)
    questions = questions_of(encoder(args.model), args.questions)
    score = _with_cache if shares else _together

    def step() -> Row:
        with torch.inference_mode():
            return _choices([score(network, *one) for one in questions])

    return step


def _padded(rows: Sequence[np.ndarray]) -> tuple[Any, Any]:
    """Returns tokens and mask, padded on the right."""
    import torch

    width = max(map(len, rows))
    ids = [[*row.tolist(), *[0] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _together(
    network: Any, prompt: np.ndarray, candidates: Sequence[np.ndarray]
) -> np.ndarray:
    """Scores prompt and candidate as one text, all candidates at once."""
    ids, mask = _padded([np.concatenate([prompt, one]) for one in candidates])
    logits = network(input_ids=ids, attention_mask=mask).logits
    first = len(prompt)
    logs = logits[:, first - 1 : -1].log_softmax(-1)
    chosen = logs.gather(2, ids[:, first:, None])[..., 0]
    return (chosen * mask[:, first:]).sum(1).double().numpy()


def _with_cache(
    network: Any, prompt: np.ndarray, candidates: Sequence[np.ndarray]
) -> np.ndarray:
    """Reads the prompt once, then all candidates with its cache."""
    import torch

    ids, mask = _padded(candidates)
    start = torch.tensor(prompt)[None].long()
    read = network(input_ids=start, use_cache=True, logits_to_keep=1)
    read.past_key_values.batch_repeat_interleave(len(candidates))
    whole = torch.cat([torch.ones(len(candidates), len(prompt)).long(), mask], 1)
    rest = network(
        input_ids=ids[:, :-1],
        attention_mask=whole[:, :-1],
        past_key_values=read.past_key_values,
    ).logits
    logits = torch.cat([read.logits.expand(len(candidates), -1, -1), rest], 1)
    chosen = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    return (chosen * mask).sum(1).double().numpy()


BUILDS: dict[Program, Callable[[argparse.Namespace], Callable[[], Row]]] = {
    (WRITE, OURS): our_write,
    (WRITE, THEIRS): their_write,
    (RANK, OURS): our_rank,
    (RANK, BATCHED): partial(their_rank, shares=False),
    (RANK, SHARED): partial(their_rank, shares=True),
}


def check(firsts: dict[Program, Row]) -> None:
    """Ends the run if texts or choices differ."""
    for (task, name), row in firsts.items():
        ours = firsts[task, OURS]["found"]
        if row["found"] != ours:
            equal = sum(a == b for a, b in zip(ours, row["found"], strict=True))
            raise SystemExit(
                f"error: {name} finds the same in {equal} of {len(ours)} ({task})"
            )


def summary(rows: dict[Program, list[Row]], work: dict[str, int]) -> list[Row]:
    """Returns a row for each program, with what ours is to it.

    Args:
      rows: the steps of every program.
      work: new tokens, and candidates, of a step.
    """
    found = []
    for (task, name), steps in rows.items():
        ours = rows[task, OURS]
        costs = ratios(steps, ours)
        scores = [np.array(one[0].get("scores", [])) for one in (steps, ours)]
        differences = np.abs(np.subtract(*scores))
        found.append(
            {
                "task": task,
                "program": name,
                **costs,
                "rate": work[task] / costs["seconds"],
                "start": steps[0]["since_start"],
                "compile": steps[0]["seconds"] - costs["seconds"],
                "same": len(ours[0]["found"]),
                "nats": float(differences.max()) if differences.size else None,
            }
        )
    return found


def result_of(found: Sequence[Row], title: str) -> Result:
    """Returns the table of the rows."""

    def told(one: Row) -> Row:
        is_ours, same = one["program"] == OURS, one["same"]
        return texts_of(one, is_ours) | {
            "unit": UNITS[one["task"]],
            "equal": "" if is_ours else f"{same} of {same}",
        }

    return Result(
        title=title,
        caption="Means over the rounds. Ratios are those of CPU seconds and of peaks "
        "to sparse_jax, above 1 where it is faster or smaller; quartiles are of the "
        "ratios within a round. The first step takes longer, to compile or warm up.",
        rows=[one | told(one) for one in found],
        columns={
            "program": "{task}, {program}",
            "per CPU s": "{rate:.1f} {unit}",
            "CPU s": "{seconds:.2f}",
            "ratio": "{time}",
            "quartiles": "{spread}",
            "peak MiB": "{mib:,.0f}",
            "ratio of it": "{memory}",
            "first step, + CPU s": "{compile:.1f}",
            "the same": "{equal}",
        },
        panels=(
            Panel("ratio", "CPU time, ratio to sparse_jax", ("low", "high"), floor=1),
            Panel("peak_ratio", "peak memory, ratio to sparse_jax", floor=1),
        ),
    )


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    add_options(parser, rounds=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--questions", type=int, default=8)
    args = parser.parse_args()
    if args.program:
        serve(lambda: BUILDS[*args.program](args), args.threads)
        return
    if not are_there("torch", "transformers"):
        return
    with model_of(args) as name:
        asked = questions_of(encoder(args.model), args.questions)
        shared = ("model", "batch_size", "new_tokens", "questions", "threads")
        options = {name: getattr(args, name) for name in shared}
        rows = measure(__spec__.name, PROGRAMS, options, args.rounds, check)
    work = {WRITE: args.batch_size * args.new_tokens}
    work[RANK] = sum(len(candidates) for _, candidates in asked)
    found = summary(rows, work)
    where = circumstances(args, "torch", "transformers")
    size = (
        f"{args.batch_size} x {args.new_tokens} new tokens, {args.questions} questions"
    )
    finish(args.output, result_of(found, f"{name}, {size} ({where})"))


if __name__ == "__main__":
    run_command(main)

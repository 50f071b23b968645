"""What the experiments on questions share: methods, layers, runs, judging, a table."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.predictions import Predictions, digest_of, fingerprint
from experiments.trials import LOSS, grid_of, make_trial, run_folder, trial_parser
from sparse_jax import Beams, Greedy, Settings
from sparse_jax.data.conversations import PROMPTS, PromptTemplate
from sparse_jax.data.llm_adapters import (
    QUESTION_SETS,
    Question,
    accuracy,
    load_questions,
)
from sparse_jax.generation.choice import Choice
from sparse_jax.generation.ranking import rank_candidates
from sparse_jax.generation.writer import Writer, load_writer, text_tokens

__all__ = ["compare", "parser_of"]

_log = logging.getLogger(__name__)

# Questions between two writes.
_CHUNK = 128

# The maps of the paper: query, key, value, and the two of the MLP.
_MAPS = ("^attention/(query|key|value)$", "^mlp/(up|down)$")
SAMPLERS = {"all": None, "ist": "ist", "random": "uniform"}
# The adapters of LLM-Adapters: rank 32 with alpha 64, bottlenecks of 256.
METHODS = {
    "lora": {"method": "lora", "rank": 32, "alpha": 64.0, "where": _MAPS},
    "dora": {"method": "dora", "rank": 32, "alpha": 64.0, "where": _MAPS},
    "series": {"method": "series", "size": 256},
    "parallel": {"method": "parallel", "size": 256},
}


def parser_of(
    doc: str | None, sets: Sequence[str], output: str
) -> argparse.ArgumentParser:
    """Returns the options that the experiments share."""
    parser = trial_parser(doc, rates=[1e-4, 2e-4, 5e-4], output=output)
    parser.add_argument("--data", required=True, help="training file")
    parser.add_argument("--tests", required=True, type=Path, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", choices=sets, default=list(sets))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lora"])
    parser.add_argument("--layers", nargs="+", choices=SAMPLERS, default=[*SAMPLERS])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-questions", type=int, help="of every set")
    parser.add_argument("--beams", type=int, default=4, help="1 is greedy")
    return parser


def compare(
    args: argparse.Namespace, *, template: str, max_new_tokens: int, answer_by: str
) -> None:
    """Makes the runs that are missing, evaluates them, and shows a table.

    Args:
      args: as `parser_of` reads them.
      template: name of the prompt.
      max_new_tokens: of a written answer.
      answer_by: "write", or "rank" to take the likeliest candidate.
    """
    base = Settings(
        model=args.model,
        task="causal",
        data=args.data,
        output="",
        template=template,
        # The released code trains on the prompt too.
        loss_on="all",
        batch_size=args.batch_size,
        epochs=args.epochs,
        max_steps=args.max_steps,
        max_length=args.max_length,
    )
    results = {}
    for method in args.methods:
        for layers in args.layers:
            settings = replace(base, sampler=SAMPLERS[layers], **METHODS[method])
            name = f"{method}-{layers}"
            trial = make_trial(name, settings, measure=LOSS, **grid_of(args))
            runs = [
                run_folder(args.output, name, trial.rate, seed) for seed in args.seeds
            ]
            results[name] = [
                _accuracies(run, args, template, max_new_tokens, answer_by)
                for run in runs
            ]
    path = args.output / f"{answer_by}.json"
    path.write_text(json.dumps(results, indent=2), encoding="utf-8")
    _show(results, args, answer_by)


def _accuracies(
    run: Path,
    args: argparse.Namespace,
    template: str,
    max_new_tokens: int,
    answer_by: str,
) -> dict[str, float]:
    """Returns the accuracy of a run on every set; its predictions are in its folder."""
    writer = load_writer(None, run)
    identity = {
        "model": fingerprint(writer),
        "template": template,
        "max_new_tokens": max_new_tokens,
        "beams": args.beams,
    }
    kept = Predictions(run, f"{answer_by}-predictions", ("set", "number"), identity)
    found = {}
    for name in args.sets:
        questions = QUESTION_SETS[name]
        asked = load_questions(questions, args.tests)[: args.max_questions]
        prompts = (one.prompt(PROMPTS[template]) for one in asked)
        digests = [
            digest_of(f"{prompt} {one.answer}")
            for prompt, one in zip(prompts, asked, strict=True)
        ]
        missing = [i for i, one in enumerate(digests) if not kept.has((name, i), one)]
        for start in range(0, len(missing), _CHUNK):
            numbers = missing[start : start + _CHUNK]
            part = [asked[i] for i in numbers]
            if answer_by == "rank":
                texts = _ranked(writer, part, PROMPTS[template])
            else:
                choice = Greedy() if args.beams == 1 else Beams(args.beams)
                texts = _written(
                    writer, part, PROMPTS[template], choice, max_new_tokens
                )
            kept.add(
                [
                    {
                        "set": name,
                        "number": i,
                        "asked": digests[i],
                        "answer": one.answer,
                        "text": text,
                    }
                    for i, one, text in zip(numbers, part, texts, strict=True)
                ]
            )
        texts = [kept.found[name, i]["text"] for i in range(len(asked))]
        found[name] = accuracy(questions, asked, texts)
    return found


def _ranked(
    writer: Writer, asked: Sequence[Question], template: PromptTemplate
) -> list[str]:
    """Returns the likeliest responses."""
    return rank_candidates(
        writer.model,
        writer.params,
        writer.tokenizer,
        asked,
        template=template,
        attachment=writer.attachment,
    )


def _written(
    writer: Writer,
    asked: Sequence[Question],
    template: PromptTemplate,
    choice: Choice,
    max_new_tokens: int,
) -> list[str]:
    """Returns what the model writes; after a question that does not fit, nothing."""
    prompts = [text_tokens(one.prompt(template), writer.tokenizer) for one in asked]
    room = writer.model.config.max_positions - max_new_tokens
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    if len(fitting) < len(prompts):
        _log.warning(
            "%d of %d questions leave no room for %d tokens and count as wrong",
            len(prompts) - len(fitting), len(prompts), max_new_tokens,
        )  # fmt: skip
    texts = [""] * len(prompts)
    if fitting:
        chosen = [prompts[i] for i in fitting]
        written = writer.write(chosen, choice=choice, max_new_tokens=max_new_tokens)
        for i, text in zip(fitting, written, strict=True):
            texts[i] = text
    return texts


def _show(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    args: argparse.Namespace,
    answer_by: str,
) -> None:
    """Prints the mean over seeds of every set, and mean and deviation of all."""
    table = Table(title=f"accuracy (%) by {answer_by}, {len(args.seeds)} seeds")
    for column in ("method-layers", *args.sets, "mean", "sd"):
        table.add_column(column, justify="left" if column[0] == "m" else "right")
    for name, runs in results.items():
        values = 100 * np.array([[run[one] for one in args.sets] for run in runs])
        means = values.mean(axis=1)
        deviation = np.std(means, ddof=1) if len(means) > 1 else np.nan
        cells = [*values.mean(axis=0), means.mean(), deviation]
        table.add_row(name, *(f"{cell:.1f}" for cell in cells))
    Console(width=120).print(table)

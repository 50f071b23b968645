"""Answers to questions: ranked or written, and kept one by one."""

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.predictions import Predictions, digest_of, fingerprint
from sparse_jax import Beams, Greedy
from sparse_jax.data.conversations import (
    PROMPTS,
    Conversation,
    Piece,
    prompt_and_response,
)
from sparse_jax.data.llm_adapters import QUESTION_SETS, Question, grade
from sparse_jax.errors import InputError
from sparse_jax.generation.ranking import score_responses
from sparse_jax.generation.writer import Writer, load_writer, text_tokens

__all__ = ["Answer", "Benchmark", "answer_sets", "candidates_of", "cloze"]

_log = logging.getLogger(__name__)

_CHUNK = 100  # questions between two writes

Answer = Literal["cloze", "rank", "write"]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What distinguishes one table on questions from another.

    Attributes:
      title: of the table.
      sets: names of `QUESTION_SETS`, in the order of the columns, by scale.
      trained: those whose training splits make the training data without a file.
      template: name of the prompt of `rank` and `write`.
      max_new_tokens: of a written answer.
      answers: ways to answer: that of the small scales first, the paper's last.
      published: accuracies in percent, by row and set.
    """

    title: str
    sets: Mapping[str, Sequence[str]]
    trained: Sequence[str] = ()
    template: str
    max_new_tokens: int
    answers: Sequence[Answer]
    published: Mapping[str, Sequence[float]]


_PARTS = re.compile(
    r"Please choose the correct (?:answer|solution|ending) to .*?: (.*?)\s*"
    r"((?:Answer|Solution|Ending|Option)1: .*?)\s*Answer format: .*",
    re.DOTALL,
)


def cloze(question: Question) -> list[Conversation]:
    """Returns the question with the text of each answer as its response.

    Small models do not choose among answers that a prompt numbers; they find some texts
    likelier than others. A sentence with a blank has the answer in its blank, and what
    comes after it is the response.

    Raises:
      InputError: if the instruction does not list its answers.

    Example:
      >>> text = "Please choose the correct answer to the question: Who barks?\\n\\n"
      >>> text += "Answer1: cats Answer2: dogs\\n\\nAnswer format: answer1/answer2"
      >>> one = cloze(Question(text, "", "answer2", ("answer1", "answer2")))[1]
      >>> [piece.text for piece in one.pieces]
      ['Question: Who barks?\\nAnswer:', ' dogs']
    """
    parts = _PARTS.fullmatch(question.instruction)
    texts = parts and re.split(r"\s*(?:Answer|Solution|Ending|Option)\d: ?", parts[2])
    if parts is None or texts is None or len(texts) != 1 + len(question.candidates):
        raise InputError(
            "`data` must have questions that list their answers, got "
            f"{question.instruction[:80]!r}. Use `--answer-by rank`."
        )
    asked, options = parts[1], texts[1:]
    if "fill in the blank" in question.instruction:
        before, after = asked.split("_", 1)
        fill = lambda text: (Piece(before + text, False), Piece(after, True))
        return [Conversation(fill(text)) for text in options]
    prompt = f"Question: {asked}\nAnswer:"
    return [prompt_and_response(prompt, f" {text}") for text in options]


def candidates_of(
    question: Question, answer_by: Answer, benchmark: Benchmark
) -> list[Conversation]:
    """Returns the responses to be ranked, in the order of the candidates."""
    if answer_by == "cloze":
        return cloze(question)
    return question.responses(PROMPTS[benchmark.template])


def answer_sets(
    folder: Path,
    adapter: Path | None,
    args: argparse.Namespace,
    benchmark: Benchmark,
    asked: Mapping[str, Sequence[Question]],
) -> dict[str, np.ndarray]:
    """Returns which answers are right, by set; predictions are kept in a folder."""
    writer = load_writer(args.model if adapter is None else None, adapter)
    identity = {
        "model": fingerprint(writer),
        "template": benchmark.template,
        "max_new_tokens": benchmark.max_new_tokens,
        "beams": args.beams,
    }
    name = f"{args.answer_by}-predictions"
    kept = Predictions(folder, name, ("set", "number"), identity)
    return {
        name: _answers_to(name, questions, kept, writer, args, benchmark)
        for name, questions in asked.items()
    }


def _answers_to(
    name: str,
    questions: Sequence[Question],
    kept: Predictions,
    writer: Writer,
    args: argparse.Namespace,
    benchmark: Benchmark,
) -> np.ndarray:
    """Returns which answers of a set are right, asking what is not kept."""
    prompts = (one.prompt(PROMPTS[benchmark.template]) for one in questions)
    digests = [
        digest_of(f"{prompt} {one.answer}")
        for prompt, one in zip(prompts, questions, strict=True)
    ]
    missing = [i for i, one in enumerate(digests) if not kept.has((name, i), one)]
    for start in range(0, len(missing), _CHUNK):
        numbers = missing[start : start + _CHUNK]
        part = [questions[i] for i in numbers]
        if args.answer_by == "write":
            texts = _written(writer, part, args, benchmark)
        else:
            texts = _ranked(writer, part, args, benchmark)
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
    about = QUESTION_SETS[name]
    texts = [kept.found[name, i]["text"] for i in range(len(questions))]
    return np.array(grade(about, questions, texts))


def _ranked(
    writer: Writer,
    asked: Sequence[Question],
    args: argparse.Namespace,
    benchmark: Benchmark,
) -> list[str]:
    """Returns the likeliest candidates; of a question that does not fit, nothing."""
    scores = score_responses(
        writer.model,
        writer.params,
        writer.tokenizer,
        [candidates_of(one, args.answer_by, benchmark) for one in asked],
        # Answers that are texts differ in length.
        per_token=args.answer_by == "cloze",
        attachment=writer.attachment,
    )
    return [
        one.candidates[int(np.argmax(found))] if len(found) else ""
        for one, found in zip(asked, scores, strict=True)
    ]


def _written(
    writer: Writer,
    asked: Sequence[Question],
    args: argparse.Namespace,
    benchmark: Benchmark,
) -> list[str]:
    """Returns what the model writes; after a question that does not fit, nothing."""
    template, most = PROMPTS[benchmark.template], benchmark.max_new_tokens
    prompts = [text_tokens(one.prompt(template), writer.tokenizer) for one in asked]
    room = writer.model.config.max_positions - most
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    if len(fitting) < len(prompts):
        _log.warning(
            "%d of %d questions leave no room for %d tokens and count as wrong",
            len(prompts) - len(fitting), len(prompts), most,
        )  # fmt: skip
    texts = [""] * len(prompts)
    if fitting:
        chosen = [prompts[i] for i in fitting]
        choice = Greedy() if args.beams == 1 else Beams(args.beams)
        written = writer.write(chosen, choice=choice, max_new_tokens=most)
        for i, text in zip(fitting, written, strict=True):
            texts[i] = text
    return texts

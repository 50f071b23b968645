"""The commonsense and arithmetic questions of LLM-Adapters, and their answers."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from types import MappingProxyType

from sparse_jax.data.conversations import (
    ALPACA,
    Conversation,
    PromptTemplate,
    prompt_and_response,
)
from sparse_jax.data.examples import text_of
from sparse_jax.data.read_rows import read_objects
from sparse_jax.errors import InputError

__all__ = [
    "Extract",
    "IsCorrect",
    "QUESTION_SETS",
    "Question",
    "QuestionSet",
    "first_match",
    "grade",
    "is_number",
    "last_number",
    "load_questions",
]

Extract = Callable[[str], str]
# (answer, true answer) -> whether it is right
IsCorrect = Callable[[str, str], bool]

_NUMBER = re.compile(r"-?\d+\.?\d*")
_TOLERANCE = 1e-3


def first_match(*words: str) -> Extract:
    """Returns a function for the first of some words in a text, or "".

    Example:
      >>> first_match("answer1", "answer2")("It is answer2, not answer1.")
      'answer2'
    """
    pattern = re.compile("|".join(map(re.escape, words)))
    return lambda text: match.group() if (match := pattern.search(text)) else ""


def last_number(text: str) -> str:
    """Returns the last number in a text, or "".

    Example:
      >>> last_number("She makes 9 * $2,000 = $18,000. The answer is 18,000.")
      '18000.'
    """
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else ""


def is_number(answer: str, truth: str) -> bool:
    """Says whether an answer is a number within 0.001 of the true one.

    Example:
      >>> is_number("18.", "18.0"), is_number("", "18.0")
      (True, False)
    """
    value = float(answer) if answer else math.inf
    return abs(value - float(truth)) <= _TOLERANCE


@dataclass(frozen=True)
class QuestionSet:
    """How the answers of a set are found in a text, and when they are right."""

    name: str  # of its folder
    extract: Extract
    is_correct: IsCorrect = eq
    choices: tuple[str, ...] = ()  # none if answers are numbers
    statement: str = "{}"  # how a response states an answer


@dataclass(frozen=True)
class Question:
    """A question with its true answer.

    Where `candidates` are given, a model can score each of them as the response,
    see `responses`, instead of writing one.
    """

    instruction: str
    input: str
    answer: str
    candidates: tuple[str, ...] = ()  # the possible answers; none for numbers
    statement: str = "{}"

    def prompt(self, template: PromptTemplate = ALPACA) -> str:
        """Returns the text that a model continues."""
        return template.fill(self.instruction, self.input)

    def responses(self, template: PromptTemplate = ALPACA) -> list[Conversation]:
        """Returns the prompt with each candidate as its response, to be ranked.

        The likeliest one is the answer. The words are those that the training data
        state an answer with: "the correct answer is answer2".
        """
        prompt = self.prompt(template)
        stated = map(self.statement.format, self.candidates)
        return [prompt_and_response(prompt, response) for response in stated]


def _choice(name: str, stem: str, count: int) -> QuestionSet:
    """Returns a set whose answers are numbered words."""
    words = tuple(f"{stem}{i}" for i in range(1, count + 1))
    return QuestionSet(name, first_match(*words), eq, words, _STATEMENT)


_STATEMENT = "the correct answer is {}"
_YES_NO = ("true", "false")
_LETTERS = tuple("ABCDE")

_ALL = (
    QuestionSet("boolq", first_match(*_YES_NO), eq, _YES_NO, _STATEMENT),
    _choice("piqa", "solution", 2),
    _choice("social_i_qa", "answer", 5),
    _choice("hellaswag", "ending", 4),
    _choice("winogrande", "option", 2),
    _choice("ARC-Easy", "answer", 5),
    _choice("ARC-Challenge", "answer", 5),
    _choice("openbookqa", "answer", 5),
    QuestionSet("gsm8k", last_number, is_number),
    QuestionSet("AQuA", first_match(*_LETTERS), eq, _LETTERS, "The answer is ({})."),
    QuestionSet("mawps", last_number, is_number),
    QuestionSet("SVAMP", last_number, is_number),
)

QUESTION_SETS = MappingProxyType({questions.name: questions for questions in _ALL})
"""The eight commonsense sets and four arithmetic ones, by the names of their folders.

Extraction is that of the published evaluation: the first choice named in the text, or
the last number in it, within 0.001. For AQuA it is the first capital letter from A to
E, even that of "Because".
"""


def load_questions(
    questions: QuestionSet, folder: str | Path, split: str = "test"
) -> list[Question]:
    """Returns the questions of a set, from `folder/NAME/test.json`.

    Args:
      questions: one of `QUESTION_SETS`.
      folder: the folder `dataset` of LLM-Adapters.
      split: name of the file, "train" or "test".

    Raises:
      InputError: if there is no such file, or a record lacks `instruction` or
        `answer`, or has an answer that is not possible.
    """
    rows = read_objects(Path(folder) / questions.name / f"{split}.json")
    found = []
    for number, record in rows.numbered:
        place = rows.source.at(number)
        instruction = text_of(place, record, ("instruction",))
        answer = text_of(place, record, ("answer",)).strip()
        candidates = _candidates(questions, instruction)
        _require_possible(place, answer, candidates)
        given = text_of(place, record, ("input",)) if record.get("input") else ""
        found.append(
            Question(instruction, given, answer, candidates, questions.statement)
        )
    if not found:
        raise InputError(f"{rows.source.name} must have questions, got an empty list.")
    return found


def grade(
    questions: QuestionSet, asked: Sequence[Question], texts: Sequence[str]
) -> list[bool]:
    """Returns which texts give the true answer.

    Args:
      questions: the set, which knows how to read a text.
      asked: the questions.
      texts: what a model wrote after each prompt.

    Example:
      >>> question = Question("1 + 1?", "", "2.0")
      >>> grade(QUESTION_SETS["gsm8k"], [question], ["1 + 1 = 2."])
      [True]
    """
    return [
        questions.is_correct(questions.extract(text), question.answer)
        for question, text in zip(asked, texts, strict=True)
    ]


def _candidates(questions: QuestionSet, instruction: str) -> tuple[str, ...]:
    """Returns the answers that a question allows: some of ARC have three or five."""
    offered = re.search(r"Answer format: *([\w/]+)\s*$", instruction)
    if questions.choices and offered:
        return tuple(offered.group(1).split("/"))
    return questions.choices


def _require_possible(place: str, answer: str, candidates: tuple[str, ...]) -> None:
    """Raises unless an answer is a candidate, or a number if there are none."""
    if candidates and answer not in candidates:
        raise InputError(
            f"{place} must have an answer among {', '.join(candidates)}, got "
            f"{answer!r}."
        )
    if not candidates and not re.fullmatch(r"-?\d+(\.\d*)?([eE][+-]?\d+)?", answer):
        raise InputError(f"{place} must have a number as its answer, got {answer!r}.")

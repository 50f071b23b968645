"""Answers: what a model's text says, by the rules of the published evaluations."""

import math
import re
from collections.abc import Callable

__all__ = ["Extract", "Judge", "first_match", "is_number", "last_number"]

Extract = Callable[[str], str]
Judge = Callable[[str, str], bool]

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

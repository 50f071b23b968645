"""Conversations: texts in pieces, each trained on or only read, and their prompts."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

__all__ = [
    "ALPACA",
    "Conversation",
    "LLM_ADAPTERS",
    "PROMPTS",
    "Piece",
    "PromptTemplate",
    "join",
    "plain_text",
    "prompt_and_response",
]


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    is_response: bool  # whether a model learns to write it
    is_excluded: bool = False  # whether it is read only, even if all else is trained on


@dataclass(frozen=True)
class Conversation:
    """The one form of all data for causal language models.

    The text is that of the pieces, one after the other.

    Example:
      >>> prompt_and_response("1 + 1 =", " 2").text
      '1 + 1 = 2'
    """

    pieces: tuple[Piece, ...]
    # A chat template writes the special tokens of the beginning; they are not added
    # a second time.
    is_rendered: bool = False
    # Whether the text has its end; otherwise it gets the tokenizer's.
    is_ended: bool = False
    weight: float = 1.0  # of its tokens in the loss

    @property
    def text(self) -> str:
        """All of the text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def is_plain(self) -> bool:
        """Whether there is no prompt, so that the text can be cut anywhere."""
        return all(piece.is_response for piece in self.pieces)


def prompt_and_response(prompt: str, response: str) -> Conversation:
    """Returns a prompt that is read and a response that is trained on."""
    return Conversation((Piece(prompt, False), Piece(response, True)))


def plain_text(text: str) -> Conversation:
    """Returns a text that is trained on from its beginning."""
    return Conversation((Piece(text, True),))


def join(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Returns pieces without empty ones, neighbours of one kind as one piece.

    Example:
      >>> join([Piece("a", False), Piece("b", False), Piece("", True)])
      (Piece(text='ab', is_response=False, is_excluded=False),)
    """
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1][1:] == piece[1:]:
            merged[-1] = piece._replace(text=merged[-1].text + piece.text)
        elif piece.text:
            merged.append(piece)
    return tuple(merged)


@dataclass(frozen=True)
class PromptTemplate:
    """A text with places for `{instruction}` and `{input}`.

    Example:
      >>> template = PromptTemplate("{instruction}: {input} ->", "{instruction} ->")
      >>> template.fill("Add", "1, 2"), template.fill("Sing")
      ('Add: 1, 2 ->', 'Sing ->')
    """

    with_input: str
    without_input: str

    def fill(self, instruction: str, input: str = "") -> str:
        """Returns the prompt of an instruction."""
        template = self.with_input if input else self.without_input
        return template.format(instruction=instruction, input=input)


_TASK = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."

ALPACA = PromptTemplate(
    f"{_TASK}{_INPUT}{_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n"
    "### Input:\n{input}\n\n### Response:",
    f"{_TASK}{_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:",
)
"""The prompt of Stanford Alpaca (`train.py`); the response follows the colon."""

# The spaces are those of a triple-quoted string inside a function, blank lines and
# ends of lines included: published numbers were trained with them.
_INDENT = " " * 16
_GAP = f"\n{_INDENT}\n{_INDENT}"
LLM_ADAPTERS = PromptTemplate(
    f"{_TASK}{_INPUT}{_REQUEST} \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}"
    f"{_GAP}### Input:\n{_INDENT}{{input}}{_GAP}### Response:\n{_INDENT}",
    f"{_TASK}{_REQUEST}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}"
    f"{_GAP}### Response:\n{_INDENT}",
)
"""The prompt that the commonsense models of LLM-Adapters and IST were trained with.

Its first version had `# noqa: E501` in the text. The evaluation of LLM-Adapters has
no spaces in blank lines, and one after the first line.
"""

PROMPTS = MappingProxyType({"alpaca": ALPACA, "llm_adapters": LLM_ADAPTERS})
"""The prompts by their names on the command line."""

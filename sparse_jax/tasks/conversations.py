"""Conversations: texts in pieces, each trained on or only read."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Conversation", "Piece", "join", "plain_text", "prompt_and_response"]


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

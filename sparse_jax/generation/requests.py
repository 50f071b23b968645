"""What a decoder is asked to continue: texts, instructions and chats of a file."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sparse_jax.data.chat import render_prompt
from sparse_jax.data.conversations import ALPACA, PromptTemplate
from sparse_jax.data.examples import text_of
from sparse_jax.data.json_lines import id_of
from sparse_jax.data.read_rows import Record, read_objects
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.generation.choice import Choice
from sparse_jax.generation.generate import checked_prompts
from sparse_jax.generation.writer import (
    Stop,
    Writer,
    chat_tokens,
    encoded,
    text_tokens,
)

__all__ = ["Request", "Requests", "read_requests"]


class Request(NamedTuple):
    """One of many texts to continue."""

    id: object
    prompt: object  # as it stands in its record
    tokens: Sequence[int]


class Requests(NamedTuple):
    """Texts to continue, and how."""

    requests: Sequence[Request]
    writer: Writer
    choice: Choice
    max_new_tokens: int
    seed: int
    stop: Sequence[Stop]
    batch_size: int

    @property
    def identity(self) -> dict[str, str]:
        """What the texts depend on."""
        weights, prompts = hashlib.blake2b(), hashlib.blake2b()
        for leaf in jax.tree.leaves(
            (self.writer.params, self.writer.attachment.trained)
        ):
            weights.update(np.ascontiguousarray(leaf).tobytes())
        for one in self.requests:
            prompts.update(repr([*one.tokens]).encode())
        how = (self.choice, self.max_new_tokens, self.seed, [*self.stop])
        options = hashlib.blake2b(repr((*how, self.batch_size)).encode())
        found = {"model": weights, "input": prompts, "options": options}
        return {name: digest.hexdigest()[:32] for name, digest in found.items()}

    def texts(self, done: int = 0) -> Iterator[list[tuple[Request, str]]]:
        """Yields what is written, batch by batch, after the first `done` requests.

        Raises:
          InputError: before the first batch, if a prompt cannot be continued.
        """
        size = self.batch_size
        prompts = [one.tokens for one in self.requests]
        checked_prompts(self.writer.model, prompts, self.max_new_tokens)
        # Whole batches, so that the rounding is that of a run without interruption.
        for start in range(done // size * size, len(self.requests), size):
            part = self.requests[start : start + size]
            texts = self.writer.write(
                prompts[start : start + size],
                choice=self.choice,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                stop=self.stop,
                # A power of two, so that there are few programs.
                batch_size=min(size, 1 << (len(part) - 1).bit_length()),
                first=start,
            )
            pairs = [*zip(part, texts, strict=True)]
            yield pairs[max(0, done - start) :]


def read_requests(
    path: str | Path, writer: Writer, template: PromptTemplate | None, is_chat: bool
) -> list[Request]:
    """Returns the requests of a file of JSON lines, or of a list in JSON.

    A record has a `prompt`, a text or a list of messages; `messages`, of which a last
    one by the assistant is left out; an `instruction` and perhaps an `input`; or a
    `text`. It may have an `id`.

    Args:
      path: of the file, `.jsonl` or `.json`.
      writer: with the tokenizer.
      template: for texts that are instructions; None leaves them as they are, and
        writes an `instruction` as Alpaca does.
      is_chat: whether texts are messages of a user.

    Raises:
      InputError: if there is no such file, no record in it, or one that is none of
        these, with its line.
    """
    rows = read_objects(path)
    found = [
        _request(rows.source.at(number), i, record, writer, template, is_chat)
        for i, (number, record) in enumerate(rows.numbered)
    ]
    if not found:
        raise InputError(f"{rows.source.name} must have prompts, got an empty file.")
    return found


_COLUMNS = ("prompt", "messages", "conversations", "instruction", "text")


def _request(
    place: str,
    number: int,
    record: Record,
    writer: Writer,
    template: PromptTemplate | None,
    is_chat: bool,
) -> Request:
    """Returns the request of a record."""
    column = next((name for name in _COLUMNS if name in record), None)
    if column is None:
        raise InputError(
            f"{place} must have a column {', '.join(_COLUMNS)}, got the columns "
            f"{listed(record) or 'of an empty object'}."
        )
    asked, tokenizer = record[column], writer.tokenizer
    if isinstance(asked, list):
        asked = _asked(place, asked)
        ids = encoded(tokenizer, render_prompt(asked, tokenizer, place))
    elif column in ("messages", "conversations"):
        raise InputError(f"{place} must have a list in `{column}`, got {brief(asked)}.")
    elif column == "instruction":
        has_input = record.get("input") is not None
        given = text_of(place, record, ("input",)) if has_input else ""
        asked = (template or ALPACA).fill(text_of(place, record, (column,)), given)
        ids = text_tokens(asked, tokenizer)
    elif is_chat:
        ids = chat_tokens(text_of(place, record, (column,)), tokenizer)
    else:
        ids = text_tokens(text_of(place, record, (column,)), tokenizer, template)
    return Request(id_of(record, number), asked, ids)


def _asked(place: str, turns: list[object]) -> Sequence[Record]:
    """Returns the messages of a chat that the assistant is to go on with."""
    messages = [turn for turn in turns if isinstance(turn, dict)]
    if len(messages) < len(turns) or not messages:
        raise InputError(f"{place} must have messages as objects, got {brief(turns)}.")
    if messages[-1].get("role", messages[-1].get("from")) in ("assistant", "gpt"):
        messages = messages[:-1]
    return messages

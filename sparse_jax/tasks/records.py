"""Records: objects of a file as conversations, in any of the common layouts."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError, brief, listed
from sparse_jax.tasks.chat import render_chat
from sparse_jax.tasks.columns import text_of
from sparse_jax.tasks.conversations import (
    Conversation,
    plain_text,
    prompt_and_response,
)
from sparse_jax.tasks.prompts import PromptTemplate

__all__ = ["read_record"]

Record = Mapping[str, Any]


def read_record(
    place: str, record: Record, tokenizer: Any, template: PromptTemplate
) -> list[Conversation]:
    """Returns the conversations of a record, nearly always one.

    Its columns say the layout:

    - `messages` or `conversations`: a list of `{"role", "content"}`, or of
      `{"from", "value"}` as ShareGPT has them with the roles `human` and `gpt`,
      written by the chat template; perhaps `system` and `tools`.
    - `instruction`, `output` and perhaps `input`: Alpaca, written by `template`.
    - `prompt`, `completion`: as they stand, or both lists of messages.
    - `text`: a plain text, trained on from its beginning.

    Args:
      place: file and line, for messages of errors.
      record: values by column.
      tokenizer: for its chat template.
      template: for instructions.

    Raises:
      InputError: if there is no such column, or a value is not as described.
    """
    for column, reader in _LAYOUTS.items():
        if column in record:
            return reader(place, record, tokenizer, template)
    *names, last = (f"`{name}`" for name in _LAYOUTS)
    raise InputError(
        f"{place} must have a column {', '.join(names)} or {last}, got the columns "
        f"{listed(record) or 'of an empty object'}."
    )


def _chat(
    column: str, place: str, record: Record, tokenizer: Any, template: PromptTemplate
) -> list[Conversation]:
    """Returns a chat."""
    del template
    turns = _turns(place, record[column], column)
    if record.get("system"):
        content = text_of(place, record, ("system",))
        if turns[0].get("role", turns[0].get("from")) == "system":
            raise InputError(
                f"{place} must have one system message, got a column `system` and a "
                "turn. Leave one of them out."
            )
        turns.insert(0, {"role": "system", "content": content})
    return render_chat(turns, tokenizer, place, tools=record.get("tools"))


def _turns(place: str, turns: Any, column: str) -> list[Record]:
    """Returns the turns of a chat."""
    if not isinstance(turns, list) or not turns:
        raise InputError(
            f"{place} must have a list of turns in `{column}`, got {brief(turns)}."
        )
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise InputError(
                f"{place} turn {number} must be an object, got {type(turn).__name__}."
            )
    return list(turns)


def _alpaca(
    place: str, record: Record, tokenizer: Any, template: PromptTemplate
) -> list[Conversation]:
    """Returns an instruction with its output."""
    del tokenizer
    for column in ("history", "system"):
        if record.get(column):
            raise InputError(
                f"{place} must have no `{column}`: the prompt has no place for it. "
                "Write the record as `messages`."
            )
    instruction = text_of(place, record, ("instruction",))
    # The files have null for no input as well as an empty text.
    has_input = record.get("input") is not None
    given = text_of(place, record, ("input",)) if has_input else ""
    output = text_of(place, record, ("output",))
    return [prompt_and_response(template.fill(instruction, given), output)]


def _completion(
    place: str, record: Record, tokenizer: Any, template: PromptTemplate
) -> list[Conversation]:
    """Returns a prompt with its completion, both texts or both messages."""
    del template
    if isinstance(record["prompt"], list):
        read = _turns(place, record["prompt"], "prompt")
        turns = [*read, *_turns(place, record.get("completion"), "completion")]
        tools = record.get("tools")
        return render_chat(turns, tokenizer, place, tools=tools, first=len(read))
    prompt = text_of(place, record, ("prompt",))
    return [prompt_and_response(prompt, text_of(place, record, ("completion",)))]


def _text(
    place: str, record: Record, tokenizer: Any, template: PromptTemplate
) -> list[Conversation]:
    """Returns a plain text."""
    del tokenizer, template
    return [plain_text(text_of(place, record, ("text",)))]


# The Alpaca files also have a column `text`, the rendered prompt, so that `text` is
# the last one to look for.
_LAYOUTS: Mapping[str, Callable[..., list[Conversation]]] = MappingProxyType(
    {
        "messages": partial(_chat, "messages"),
        "conversations": partial(_chat, "conversations"),
        "instruction": _alpaca,
        "prompt": _completion,
        "text": _text,
    }
)

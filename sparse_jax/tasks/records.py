"""Records: objects of a file as conversations, in any of the common layouts."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError
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

_ROLES = MappingProxyType(
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
    }
)


def read_record(
    place: str, record: Record, tokenizer: Any, template: PromptTemplate
) -> list[Conversation]:
    """Returns the conversations of a record, nearly always one.

    Its columns say the layout:

    - `messages`: a list of `{"role", "content"}`, written by the chat template.
    - `conversations`: the same in ShareGPT's words, `{"from", "value"}`, with the
      roles `human` and `gpt`, and perhaps a column `system`.
    - `instruction`, `output` and perhaps `input`: Alpaca, written by `template`.
    - `prompt`, `completion`: as they stand.
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
        f"{', '.join(record) or 'of an empty object'}."
    )


def _messages(
    place: str, record: Record, tokenizer: Any, template: PromptTemplate
) -> list[Conversation]:
    """Returns a chat with `role` and `content`."""
    del template
    messages = []
    for message, spot in _turns(place, record, "messages"):
        role = text_of(spot, message, ("role",))
        content = text_of(spot, message, ("content",))
        messages.append({**message, "role": role, "content": content})
    return render_chat(messages, tokenizer, place)


def _share_gpt(
    place: str, record: Record, tokenizer: Any, template: PromptTemplate
) -> list[Conversation]:
    """Returns a chat with `from` and `value`."""
    del template
    messages = []
    if record.get("system"):
        content = text_of(place, record, ("system",))
        messages.append({"role": "system", "content": content})
    for turn, spot in _turns(place, record, "conversations"):
        role = text_of(spot, turn, ("from",))
        if role not in _ROLES:
            raise InputError(
                f"{spot} must be from {', '.join(_ROLES)}, got {role!r}. Write other "
                "roles as `messages`."
            )
        content = text_of(spot, turn, ("value",))
        messages.append({"role": _ROLES[role], "content": content})
    return render_chat(messages, tokenizer, place)


def _turns(place: str, record: Record, column: str) -> list[tuple[Record, str]]:
    """Returns the turns of a chat with their places."""
    if record.get("tools"):
        raise InputError(
            f"{place} must have no `tools`: their descriptions are not written. Put "
            "them into the system message."
        )
    turns = record[column]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{place} must have a list of turns in `{column}`.")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise InputError(
                f"{place} turn {number} must be an object, got {type(turn).__name__}."
            )
    return [(turn, f"{place} turn {i}") for i, turn in enumerate(turns, start=1)]


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
    """Returns a prompt with its completion."""
    del tokenizer, template
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
        "messages": _messages,
        "conversations": _share_gpt,
        "instruction": _alpaca,
        "prompt": _completion,
        "text": _text,
    }
)

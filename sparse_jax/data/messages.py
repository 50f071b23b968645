"""Messages of a chat: what a template gets to see of each, and which are trained on."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from sparse_jax.data.examples import text_of
from sparse_jax.errors import InputError, brief

__all__ = ["Message", "Turn", "function_name", "read_messages", "read_tools"]

Turn = Mapping[str, object]

# ShareGPT's words and those of templates, which may have more.
_ROLES = MappingProxyType(
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
    }
)
# Columns that are read here; a template gets the others as they stand.
_READ = ("role", "content", "from", "value", "tool_calls", "weight", "train")


class Message(NamedTuple):
    """A message and its place in the training."""

    fields: dict[str, object]  # for the template: role, content and what else there is
    content: str
    calls: tuple[str, ...]  # names of the functions that it calls
    place: str  # file, line and turn
    is_trained: bool  # whether the assistant learns to write it
    is_excluded: bool  # whether it is only read whatever else is trained on

    @property
    def is_answer(self) -> bool:
        """Whether the assistant wrote it."""
        return self.fields["role"] == "assistant"


def read_messages(
    turns: Sequence[Turn], place: str, *, first: int = 0
) -> list[Message]:
    """Returns the messages of a chat.

    A turn is `{"role", "content"}`, or `{"from", "value"}` in ShareGPT's words. Its
    text may come in parts, `[{"type": "text", "text": ...}]`. An assistant's turn with
    `weight` 0, or with `train` false, is read and not trained on.

    Args:
      turns: the objects of a record.
      place: file and line, for messages of errors.
      first: the number of the first turn that may be trained on.

    Raises:
      InputError: if a turn is not as described.
    """
    return [
        _message(turn, f"{place} turn {number}", may_train=number > first)
        for number, turn in enumerate(turns, start=1)
    ]


def read_tools(value: object, place: str) -> list[dict[str, object]]:
    """Returns the schemas of the functions that an assistant may call.

    Args:
      value: a list of objects, the same as JSON in a text, or nothing.
      place: file and line, for messages of errors.

    Raises:
      InputError: if they are something else, or a function has no name.
    """
    tools = _decoded(value) or []
    if not isinstance(tools, list) or not all(map(function_name, tools)):
        raise InputError(
            f"{place} must have a list of functions with names in `tools`, got "
            f"{brief(value)}."
        )
    return tools


def _message(turn: Turn, place: str, *, may_train: bool) -> Message:
    """Returns one message."""
    is_share_gpt = "from" in turn and "role" not in turn
    column = "value" if is_share_gpt else "content"
    role = text_of(place, turn, ("from" if is_share_gpt else "role",))
    if is_share_gpt and role not in _ROLES:
        raise InputError(
            f"{place} must be from {', '.join(_ROLES)}, got {brief(role)}. Write other "
            "roles as `messages`."
        )
    if role not in _ROLES and role.strip().lower() in _ROLES:
        raise InputError(f"{place} must have a role in lower case, got {brief(role)}.")
    role = _ROLES.get(role, role)
    calls = _tool_calls(turn, place)
    fields = {name: value for name, value in turn.items() if name not in _READ}
    content = _content(turn, place, column, bool(calls))
    fields |= {"role": role, "content": content}
    fields |= {"tool_calls": calls} if calls else {}
    is_answer = role == "assistant"
    is_wanted = _is_wanted(turn, place, is_answer)
    return Message(
        fields,
        content,
        tuple(map(function_name, calls)),
        place,
        is_trained=is_answer and may_train and is_wanted is not False,
        is_excluded=is_wanted is False,
    )


def _content(turn: Turn, place: str, column: str, may_be_absent: bool) -> str:
    """Returns the text of a turn; the parts of one follow each other at once."""
    value = turn.get(column)
    if value is None and may_be_absent:
        return ""
    if not isinstance(value, list):
        return text_of(place, turn, (column,))
    texts = []
    for number, part in enumerate(value, start=1):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            raise InputError(
                f"{place} part {number} must be of the type 'text', got {brief(kind)}. "
                "Nothing but text is read."
            )
        texts.append(text_of(f"{place} part {number}", part, ("text",)))
    return "".join(texts)


def _tool_calls(turn: Turn, place: str) -> list[dict[str, object]]:
    """Returns the calls of a turn, their arguments as objects."""
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list) or not all(map(function_name, calls)):
        raise InputError(
            f"{place} must have a list of functions with names in `tool_calls`, got "
            f"{brief(calls)}."
        )
    return [_with_arguments(call, place) for call in calls]


def _with_arguments(call: dict[str, object], place: str) -> dict[str, object]:
    """Returns a call whose arguments are an object, which templates write as JSON."""
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _with_arguments(function, place)}
    arguments = _decoded(call.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise InputError(
            f"{place} must have an object as the `arguments` of a call, got "
            f"{brief(call['arguments'])}."
        )
    return {**call, "arguments": arguments}


def function_name(call: object) -> str:
    """Returns the name of a function that is called or described, "" for none."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def _decoded(value: object) -> object:
    """Returns what a text says in JSON, and other values, and wrong texts, as given."""
    try:
        return json.loads(value) if isinstance(value, str) and value else value
    except (ValueError, RecursionError):
        return value


def _is_wanted(turn: Turn, place: str, is_answer: bool) -> bool | None:
    """Returns what a turn says about its training, None for nothing."""
    said = {}
    for name in ("weight", "train"):
        value = turn.get(name)
        if value is None:
            continue
        # Other weights would have to scale the loss; 0.0 and false are 0.
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise InputError(
                f"{place} must have 0 or 1 as `{name}`, got {brief(value)}."
            )
        said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise InputError(
            f"{place} must have a `weight` and a `train` that agree, got "
            f"{brief(turn['weight'])} and {brief(turn['train'])}."
        )
    wanted = next(iter(said.values()), None)
    if wanted and not is_answer:
        raise InputError(
            f"{place} must be the assistant's to be trained on, got the role "
            f"{brief(turn.get('role', turn.get('from')))}. Remove `{next(iter(said))}`."
        )
    return wanted

"""Messages for people who type options: arguments become the options they typed."""

import re
from collections.abc import Container, Mapping
from typing import Any

__all__ = ["as_in_file", "as_typed", "names_typed"]

# An argument in backticks, perhaps with a value: `seed` or `density=0.01`. What was got
# is a path, which may have the same name.
_ARGUMENT = re.compile(r"(?<!got )`(\w+)(?:=([^`\s]+))?`")
# What stands first is what is wrong. In a file it has the name that it has there.
_SUBJECT = re.compile(r"`(\w+)`(?! in | of | beside )")
# What options hand on under another name.
_ALSO = {"`rank` of the score": "`score_rank`"}
_FLAG_GIVEN = re.compile(r", got True(?=[.:])")


def names_typed(command: Any, adapter_is_run: bool = False) -> dict[str, str]:
    """Returns what people type for every argument of a Click command, by its name.

    Args:
      command: the command.
      adapter_is_run: whether what functions call an adapter is its argument RUN.
    """
    names = {
        one.name: one.opts[0] if one.opts[0].startswith("--") else one.name.upper()
        for one in command.params
    }
    if adapter_is_run and "run" in names:
        names["adapter"] = names["run"]
    return names


def as_in_file(message: str, names: Container[str], path: str) -> str:
    """Returns a message that names a file of settings, if that has what is wrong.

    Args:
      message: about an argument.
      names: of the arguments that the file has.
      path: of the file.

    Example:
      >>> as_in_file("`rank` must be positive, got 0.", {"rank"}, "run.yaml")
      '`rank` in `run.yaml` must be positive, got 0.'
    """
    subject = _SUBJECT.match(message)
    if subject is None or subject[1] not in names:
        return message
    return f"{subject[0]} in `{path}`{message[subject.end() :]}"


def as_typed(message: str, names: Mapping[str, str]) -> str:
    """Returns a message with options in place of the arguments that they set.

    Of a message about a file only the remedy has options: before, names in backticks
    are those of its columns and keys.

    Example:
      >>> names = {"seed": "--seed", "max_steps": "--max-steps", "output": "--output"}
      >>> as_typed("`seed` must be positive. Or raise `max_steps`.", names)
      '--seed must be positive. Or raise --max-steps.'
      >>> as_typed("`a.json` must have `output`. Or raise `max_steps`.", names)
      '`a.json` must have `output`. Or raise --max-steps.'
    """

    def option(found: re.Match[str]) -> str:
        name, value = names.get(found[1]), found[2]
        if name is None:
            return found[0]
        # An option without a value is True.
        return name if value in (None, "True") else f"{name} {value}"

    for ours, argument in _ALSO.items():
        message = message.replace(ours, argument)
    subject = _SUBJECT.match(message)
    if subject is not None and subject[1] in names:
        # Of an option without a value it says nothing.
        return _FLAG_GIVEN.sub("", _ARGUMENT.sub(option, message), count=1)
    rule, stop, remedy = message.partition(". ")
    return rule + stop + _ARGUMENT.sub(option, remedy)

"""Fields of dataclasses: options of the command line, and settings in files."""

import json
import numbers
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any, NamedTuple, TypeAlias, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as hints_of

from sparse_jax.errors import InputError, brief
from sparse_jax.params.pairs import PAIRS, read_pairs

__all__ = [
    "JSON_RULES",
    "TEXTS",
    "Json",
    "Option",
    "checked",
    "fields_of",
    "from_json",
    "one_of",
    "option",
    "options_of",
    "read_json",
    "require_new",
    "require_word",
    "required",
    "setting",
    "to_json",
]

Json: TypeAlias = (
    "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
)
Made = TypeVar("Made")

TEXTS = tuple[str, ...]  # one expression, or several
_KEY = "sparse_jax"  # of the metadata of a field
# What a whole number in a file never reaches; a batch of more fills any memory.
_LARGEST = 1 << 20


class _Facts(NamedTuple):
    """What is known of a field beside its type and default."""

    help: str = ""
    name: str = ""
    shown: str = ""
    words: Mapping[str, object] | None = None
    is_stored: bool = True


class Option(NamedTuple):
    """A field of a dataclass, as the command line and files see it."""

    field: str  # of the dataclass
    name: str  # of the option, mostly that of the field
    type: object  # int, float, bool, str, or `TEXTS`
    default: object  # `dataclasses.MISSING` if it must be given
    is_optional: bool  # whether None is a value
    help: str  # empty if it is no option of the command line
    shown: str  # what the help says of the default; empty: the default itself
    words: Mapping[str, object] | None  # word -> value, where values have words
    is_stored: bool  # whether a value without a word is an error in a file

    @property
    def is_required(self) -> bool:
        """Whether a file must have it, also where it is the default."""
        return self.is_stored or self.words is not None

    def read(self, value: Any) -> Any:
        """Returns the value of a word, or any other value as it is.

        Raises:
          InputError: if the word is not known.
        """
        if not isinstance(value, str) or self.words is None:
            return value
        require_word(self.name, value, self.words)
        return self.words[value]


def option(
    help: str = "",
    *,
    name: str = "",
    shown: str = "",
    words: Mapping[str, object] | None = None,
    is_stored: bool = True,
) -> dict[str, _Facts]:
    """Returns the metadata of a dataclass field that is an option.

    Args:
      help: sentence for the command line; without one the field is no option of it.
      name: of the option, if it is not that of the field.
      shown: what the help says of the default, if that does not explain itself.
      words: word -> value, if values are functions or objects.
      is_stored: whether a value must have a word to be stored in a file (without
        `words`: whether a default must be stored, which earlier files lack); otherwise
        one without is left out, and the default is read back.

    Example:
      >>> from dataclasses import dataclass, field
      >>> @dataclass(frozen=True)
      ... class Thin:
      ...     rank: int = field(default=8, metadata=option("Rank of the matrices."))
      >>> options_of(Thin)["rank"].help
      'Rank of the matrices.'
    """
    return {_KEY: _Facts(help, name, shown, words, is_stored)}


def setting(default: Made, help: str, shown: str = "") -> Made:
    """Returns a dataclass field with a default that is an option."""
    return field(default=default, metadata=option(help, shown=shown))


def required(help: str) -> Any:
    """Returns a dataclass field that is an option and has to be given."""
    return field(metadata=option(help))


def fields_of(kind: type, **types: type) -> list[Option]:
    """Returns the fields that a dataclass is made from.

    Args:
      kind: the class.
      **types: what stands for names in its annotations that are not imported.
    """
    hints, found = hints_of(kind, localns=types), []
    for one in fields(kind):
        if not one.init:
            continue
        facts = one.metadata.get(_KEY) or _Facts()
        plain, is_optional = _plain(hints[one.name])
        plain = str if facts.words is not None else plain
        name = facts.name or one.name
        found.append(
            Option(
                one.name, name, plain, one.default, is_optional, facts.help,
                facts.shown, facts.words, facts.is_stored,
            )
        )  # fmt: skip
    return found


def options_of(kind: type, **types: type) -> dict[str, Option]:
    """Returns the options of the command line among the fields, by their names."""
    return {one.name: one for one in fields_of(kind, **types) if one.help}


def one_of(words: Iterable[str]) -> str:
    """Returns words for a sentence.

    Example:
      >>> one_of(["none", "frozen", "all"])
      'none, frozen or all'
    """
    *first, last = words
    return f"{', '.join(first)} or {last}"


def require_word(name: str, word: object, words: Iterable[str]) -> None:
    """Raises `InputError` unless a value is one of some words.

    Example:
      >>> require_word("dtype", "float32", ("float32", "bfloat16"))
    """
    words = tuple(words)
    if word not in words:
        raise InputError(
            f"`{name}` must be one of {', '.join(words)}, got {brief(word)}."
        )


def require_new(word: object, words: Iterable[str]) -> None:
    """Raises `InputError` unless a value can be a name, and is none of some words.

    Example:
      >>> require_new("in-pairs", ("cyclic", "gradient/magnitude"))
    """
    is_name = isinstance(word, str) and re.fullmatch("[a-z0-9_/-]+", word)
    if not is_name or word in tuple(words):
        raise InputError(
            "`word` must be new, and of lower-case letters, digits, `_`, `-` and `/`, "
            f"got {brief(word)}. Names in use: {', '.join(words)}."
        )


def checked(one: Option, value: Any, place: str = "") -> Any:
    """Returns the value of an option in its type: a tuple for a list, plain numbers.

    Args:
      one: the option.
      value: of Python, of NumPy, or of a file; a text is a list of one.
      place: what it stands in, for messages, such as " in `run.yaml`".

    Raises:
      InputError: naming the option, if the value is of another type.

    Example:
      >>> from sparse_jax.training.settings import setting_options
      >>> checked(setting_options()["dense"], "bias$")
      ('bias$',)
    """
    if value is None and one.is_optional:
        return None
    if one.type == PAIRS:
        return read_pairs(f"`{one.name}`{place}", value)
    items = get_args(one.type)
    kind = items[0] if items else one.type
    try:
        if not items:
            return _checked(kind, value)
        listed = [value] if isinstance(value, _TYPES[kind][0]) else value
        if isinstance(listed, list | tuple):
            return tuple(_checked(kind, item) for item in listed)
        raise TypeError
    # An integer may be more than any number with a fraction.
    except (TypeError, OverflowError) as error:
        rule = f"a list, each item {_TYPES[kind][1]}" if items else _TYPES[kind][1]
        raise InputError(
            f"`{one.name}`{place} must be {rule}, got {brief(value)}."
        ) from error


def to_json(made: Any) -> dict[str, Json]:
    """Returns the fields of a dataclass as values of JSON.

    Raises:
      InputError: naming the field, if a file cannot hold its value.
    """
    said = lambda one: one.is_required or getattr(made, one.field) != one.default
    return {
        one.field: _written(made, one) for one in filter(said, fields_of(type(made)))
    }


def from_json(kind: type[Made], settings: Mapping[str, Json], place: str) -> Made:
    """Returns a dataclass from what `to_json` returned.

    Args:
      kind: the class.
      settings: its fields.
      place: what holds them, for messages.

    Raises:
      InputError: naming a field that is missing, unknown, or of another type.
    """
    # Files of methods name fields, and not options.
    known = {one.field: one._replace(name=one.field) for one in fields_of(kind)}
    for name in known:
        if name not in settings and known[name].is_required:
            raise InputError(
                f"{place} must have `{name}`, which `{kind.__name__}` needs, and does "
                "not. Add it, or copy the file again."
            )
    if unknown := sorted({*settings} - {*known}, key=str):
        raise InputError(
            f"{place} must have only what `{kind.__name__}` has, got "
            f"{brief(unknown[0])}. Read it with the version that wrote it."
        )
    return kind(**{name: read_json(one, settings[name], place)
                   for name, one in known.items() if name in settings})  # fmt: skip


def read_json(one: Option, value: Json, place: str) -> Any:
    """Returns the value of a field from what a file says.

    Raises:
      InputError: naming the field, if it is of another type.
    """
    if value is None:
        if one.is_optional:
            return None
        if not one.is_stored:
            return one.default
    check, rule = JSON_RULES.get(one.type, (_is_json, "a value of JSON"))
    if one.words is not None:
        known = {**one.words}
        check, rule = (lambda value: value in [*known]), f"one of {', '.join(known)}"
    if not check(value):
        raise InputError(
            f"`{one.name}` in {place} must be {rule}, got {brief(value)}. "
            "Correct it, or copy the file again."
        )
    if one.words is not None:
        return one.words[str(value)]
    return tuple(value) if isinstance(value, list) else value


def _written(made: Any, one: Option) -> Json:
    """Returns the value of a field as a value of JSON."""
    value = getattr(made, one.field)
    if one.words is not None:
        # Functions and objects are compared by identity, or by their name.
        for word, known in one.words.items():
            if value is known or value == word:
                return word
        if not one.is_stored:
            return None
        raise InputError(
            f"`{one.field}` must be one of {', '.join(one.words)} to be stored in a "
            f"file, got {brief(value)}."
        )
    if isinstance(value, tuple):
        value = list(value)
    elif isinstance(value, numbers.Real):
        value = _without_numpy(value)
    check, rule = JSON_RULES.get(one.type, (_is_json, "a value of JSON"))
    if not (check(value) or (value is None and one.is_optional)):
        raise InputError(
            f"`{one.field}` must be {rule} to be stored in a file, got {brief(value)}."
        )
    return value


def _checked(kind: Any, value: Any) -> Any:
    """Returns a value of a type as plain Python; raises if it has another type."""
    if not isinstance(value, _TYPES[kind][0]) or (
        isinstance(value, bool) and kind is not bool
    ):
        raise TypeError
    if kind is float:
        float(value)
    return _without_numpy(value) if isinstance(value, numbers.Real) else value


def _without_numpy(value: numbers.Real) -> bool | int | float:
    """Returns a number that is a value of JSON, which those of NumPy are not."""
    if isinstance(value, bool | int | float):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _plain(hint: Any) -> tuple[object, bool]:
    """Returns the type that stands for an annotation, and whether it has None."""
    is_union = get_origin(hint) in (Union, types.UnionType)
    parts = {*get_args(hint)} if is_union else {hint}
    is_optional = type(None) in parts
    parts -= {type(None)}
    if len(parts) == 1:
        return parts.pop(), is_optional
    if parts == {str, Sequence[str]}:
        return TEXTS, is_optional
    return (float if parts == {int, float} else object), is_optional


def _is_json(value: Any) -> bool:
    """Returns whether JSON has a value."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _is_number(value: Any) -> bool:
    """Returns whether a value is a finite number."""
    return type(value) in (int, float) and abs(value) < 1e300


def _all(kind: type, value: Any) -> bool:
    """Returns whether a value is a list, and each item one of a type."""
    return isinstance(value, list) and all(map(JSON_RULES[kind][0], value))


def _is_rule(value: Any) -> bool:
    """Returns whether a value is an expression, or a list of them."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(one, str) for one in value)
    )


# type of an option -> the class of its values, and the rule in messages
_TYPES: dict[object, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
}
# type -> whether a value of a file has it, and the rule in messages
JSON_RULES: dict[object, tuple[Callable[[Any], bool], str]] = {
    int: (
        lambda value: type(value) is int and 0 <= value <= _LARGEST,
        f"a whole number from 0 to {_LARGEST}",
    ),
    float: (_is_number, "a number"),
    bool: (lambda value: type(value) is bool, "true or false"),
    str: (lambda value: isinstance(value, str), "text"),
    TEXTS: (_is_rule, "a regular expression, or a list of them"),
    tuple[int, ...]: (lambda value: _all(int, value), "a list of whole numbers"),
    tuple[float, ...]: (lambda value: _all(float, value), "a list of numbers"),
}

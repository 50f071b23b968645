"""Settings in a file: the `config.json` of a run, or one's own in YAML or JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sparse_jax.errors import InputError, brief, listed, reason_of
from sparse_jax.methods.registry import METHODS
from sparse_jax.params.fields import Json, Option, fields_of, from_json
from sparse_jax.samplers.registry import SAMPLERS, sampler_class
from sparse_jax.training.settings import setting_options

if TYPE_CHECKING:
    from sparse_jax.methods.method import Method
    from sparse_jax.samplers.sampler import Sampler

__all__ = ["read_settings"]

_WORDS: dict[object, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false",
}  # fmt: skip


def read_settings(path: str | Path) -> dict[str, Any]:
    """Returns the settings that a file names, by the fields of `Settings`.

    Args:
      path: YAML or JSON: a mapping of settings, or one that has them under `settings`,
        as the `config.json` of a run directory, whose `overwrite` is left out.

    Raises:
      InputError: naming the file, and the setting that is unknown or of a wrong type.
    """
    found = _mapping(Path(path))
    if isinstance(inner := found.get("settings"), Mapping):
        # Replacing the folder was meant for the run that recorded it, and no other.
        found = {name: one for name, one in inner.items() if name != "overwrite"}
    known = setting_options()
    for name in found:
        if name not in (*known, "optimizer"):
            raise InputError(
                f"`{path}` must have settings such as {listed(known, 3)}, got "
                f"{brief(name)}. They are the options of `sparse-jax finetune`, with "
                "`_` for `-`."
            )
    if found.get("optimizer") is not None:
        raise InputError(
            f"`optimizer` in `{path}` must be null, got {brief(found['optimizer'])}. A "
            "file cannot hold an optimizer: pass it to the function `finetune`."
        )
    place, objects = f"`{path}`", {}
    for name in ("method", "sampler"):
        if isinstance(one := found.get(name), Mapping):
            objects[name] = _object(name, one, place)
    return objects | {
        name: _value(place, one, found[name])
        for name, one in known.items()
        if name in found and name not in objects
    }


def _object(name: str, found: Mapping[str, Json], place: str) -> "Method | Sampler":
    """Returns the method or the sampler that a file describes."""
    settings = {**found}
    word = settings.pop("name", None)
    words = METHODS if name == "method" else SAMPLERS
    if not isinstance(word, str) or word not in words:
        raise InputError(
            f"`name` of `{name}` in {place} must be one of {', '.join(words)}, got "
            f"{brief(word)}."
        )
    if name == "method":
        kind = METHODS[word].kind
        for one in fields_of(kind):
            if not one.is_stored and settings.get(one.field, "") is None:
                raise InputError(
                    f"`{one.field}` of `{name}` in {place} must be one of "
                    f"{', '.join(one.words or ())}, got None: the run had one without "
                    "a name, which a file cannot hold. Pass the method to the function "
                    "`finetune`."
                )
        return kind.from_settings(settings, place)
    return from_json(sampler_class(word), settings, place)


def _mapping(path: Path) -> Mapping[str, Json]:
    """Returns what a file holds."""
    # Only this reads YAML, and it takes a while to import.
    import yaml

    # JSON is YAML but for numbers such as 1e-05, which YAML takes for texts.
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        found = read(path.read_text(encoding="utf-8"))
    # A file that is not YAML may raise anything at all.
    except Exception as error:
        raise InputError(
            f"`config` must be a YAML or JSON file, got {brief(str(path))}: "
            f"{reason_of(error)}."
        ) from error
    if not isinstance(found, Mapping):
        raise InputError(
            f"`config` must be a file of settings such as `density: 0.01`, got "
            f"{brief(str(path))}, which holds {brief(found)}."
        )
    return found


def _value(place: str, one: Option, value: object) -> object:
    """Returns the value of a setting in its type."""
    if value is None and one.is_optional:
        return None
    try:
        return _converted(value, one.type)
    except (TypeError, ValueError, OverflowError) as error:
        items = get_args(one.type)
        rule = f"a list, each item {_WORDS[items[0]]}" if items else _WORDS[one.type]
        raise InputError(
            f"`{one.name}` in {place} must be {rule}, got {brief(value)}."
        ) from error


def _converted(value: Any, kind: Any) -> Any:
    """Returns a value of a file in a type; raises if it has another one."""
    if (items := get_args(kind)) and isinstance(value, list):
        return tuple(_converted(item, items[0]) for item in value)
    # YAML takes 3e-5 for a text, and 1 is a number like 1.0.
    if kind is float and type(value) in (int, float, str):
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value

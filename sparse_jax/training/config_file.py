"""Settings in a file: the `config.json` of a run, or one's own in YAML or JSON."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sparse_jax.errors import InputError, brief, listed, reason_of
from sparse_jax.methods.registry import METHODS
from sparse_jax.params.fields import Json, checked, fields_of, from_json
from sparse_jax.samplers.registry import SAMPLERS, sampler_class
from sparse_jax.training.settings import setting_options

if TYPE_CHECKING:
    from sparse_jax.methods.method import Method
    from sparse_jax.samplers.sampler import Sampler

__all__ = ["read_settings"]


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
        name: checked(one, _number(one.type, found[name]), f" in {place}")
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


def _number(kind: object, value: object) -> object:
    """Returns the number of a text such as 3e-5, which YAML takes for no number."""
    items = get_args(kind)
    if items and isinstance(value, list):
        return [_number(items[0], item) for item in value]
    if kind is float and isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value

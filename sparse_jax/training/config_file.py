"""Settings in a file: the `config.json` of a run, or your own in YAML or JSON."""

import json
import re
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparse_jax.data.sources import as_source
from sparse_jax.errors import InputError, brief, listed, reason_of
from sparse_jax.methods.lookup import learning_rate_of
from sparse_jax.methods.registry import METHODS, USUAL
from sparse_jax.params.fields import Json, checked, fields_of, from_json
from sparse_jax.samplers.registry import SAMPLERS, sampler_class
from sparse_jax.training.other_names import name_hint
from sparse_jax.training.output_folder import WITHOUT
from sparse_jax.training.settings import OWN, setting_options

if TYPE_CHECKING:
    from sparse_jax.methods.method import Method
    from sparse_jax.samplers.sampler import Sampler

__all__ = ["read_settings"]

_RESOLVED = ("learning_rate", "max_length", "dense")
_EARLIER_RANDOM = 7e-4  # the usual learning rate of random entries


def read_settings(path: str | Path, given: Container[str] = ()) -> dict[str, Any]:
    """Returns the settings that a file names, by the fields of `Settings`.

    Args:
      path: YAML or JSON: a mapping of settings, or one that has them under `settings`,
        as the `config.json` of a run directory, whose `overwrite` is left out.
      given: settings to leave out, as the caller has others.

    Raises:
      InputError: naming the file, and the setting that is unknown, of a wrong type, or
        contradicted by another one.
    """
    found = _mapping(Path(path))
    if isinstance(inner := found.get("settings"), Mapping):
        if _is_earlier(found):
            inner = _as_earlier(found, inner)
        _require_same(found, inner, f"`{path}`")
        # Replacing the folder was meant for the run that recorded it, and no other.
        inner = {name: one for name, one in inner.items() if name != "overwrite"}
        if isinstance(inner.get("method"), Mapping) and "versions" in found:
            # Earlier versions recorded the usual options beside an object, too.
            inner = {k: v for k, v in inner.items() if (k, v) not in USUAL.items()}
        found = inner
    found = {name: one for name, one in found.items() if name not in given}
    known = setting_options()
    for name in found:
        if name not in known:
            raise InputError(
                f"`{path}` must have settings such as {listed(known, 3)}, got "
                f"{brief(name)}.{name_hint(str(name), known, joined=': ')} They are "
                "the options of `sparse-jax finetune`, with `_` for `-`."
            )
    # What earlier versions recorded of the only one that had a name.
    if found.get("optimizer", "") is None:
        found = {name: one for name, one in found.items() if name != "optimizer"}
    if found.get("optimizer") == OWN:
        raise InputError(
            f"`optimizer` in `{path}` must be a name such as adamw, got {OWN!r}. A "
            "file cannot hold an optimizer: pass it to the function `finetune`."
        )
    if found.get("data") == OWN:
        raise InputError(
            f"`data` in `{path}` must be a place, got 'own'. A file cannot hold rows: "
            "pass them to the function `finetune`, or name their file."
        )
    place, objects = f"`{path}`", {}
    if isinstance(mixture := found.get("data"), Mapping):
        objects["data"] = as_source(mixture)
    for name in ("method", "sampler"):
        if isinstance(one := found.get(name), Mapping):
            objects[name] = _object(name, one, place)
    return objects | {
        name: checked(one, found[name], f" in {place}")
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
        made = kind.from_settings(settings, place)
        if field := METHODS[word].changed_by(made):
            raise InputError(
                f"`{field}` of `{name}` in {place} must be "
                f"{METHODS[word].defaults[field]!r} with the name {word!r}, got "
                f"{brief(settings[field])}. Choose another name."
            )
        return made
    return from_json(sampler_class(word), settings, place)


def _mapping(path: Path) -> Mapping[str, Json]:
    """Returns what a file holds."""
    try:
        # Editors on Windows begin a file with a mark.
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            found = json.loads(text, object_pairs_hook=_once)
        else:
            found = yaml.load(text, _Loader)
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


def _is_earlier(found: Mapping[str, Json]) -> bool:
    """Returns whether a run recorded what its settings came to beside them."""
    return "versions" in found and {*_RESOLVED} <= found.keys()


def _as_earlier(
    found: Mapping[str, Json], settings: Mapping[str, Json]
) -> Mapping[str, Json]:
    """Returns the settings of an earlier run, and what it did where they lack it."""
    settings = {"head_bias": WITHOUT["head_bias"], **settings}
    rate, is_silent = found["learning_rate"], settings.get("learning_rate") is None
    is_random = _usual_rate(settings) == METHODS["random"].learning_rate
    if is_silent and is_random and rate == _EARLIER_RANDOM:
        settings["learning_rate"] = rate
    return settings


def _usual_rate(settings: Mapping[str, Json]) -> float | None:
    """Returns the usual learning rate of the method that settings name, if any."""
    method = settings.get("method")
    word = method.get("name") if isinstance(method, Mapping) else method
    if not isinstance(word, str) or word not in METHODS:
        return None
    return learning_rate_of(word, method if isinstance(method, Mapping) else settings)


def _require_same(
    found: Mapping[str, Json], settings: Mapping[str, Json], place: str
) -> None:
    """Raises if a setting stands beside others with another value than among them."""
    is_earlier = _is_earlier(found)
    for name in found.keys() & {*setting_options()}:
        said = settings.get(name)
        if is_earlier and name == "learning_rate" and said is None:
            rate = _usual_rate(settings)
            said = found[name] if rate is None else rate
        elif is_earlier and name in _RESOLVED and (said is None or name == "dense"):
            continue
        if found[name] not in (said, None):
            raise InputError(
                f"`{name}` beside `settings` in {place} must be {brief(said)} as "
                f"they say, got {brief(found[name])}. Set it under `settings`."
            )


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a mapping of names, which come once."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {brief(name)} twice")
        found[name] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2, and names that come once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        _once((str(name.value), value) for name, value in node.value)
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float | str:
    """Returns a number: 010 is ten as in YAML 1.2, and 1:30 a text."""
    del loader
    for kind in (int, float):
        with suppress(ValueError):
            return kind(node.value)
    return node.value


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_constructor(_tag, _number)
# Without a point or a sign: 1e-3, 1.5e3.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver(_tag, _EXPONENT, [*"-+0123456789"])

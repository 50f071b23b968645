"""A folder that PEFT wrote: its configuration and its tensors, checked."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors import safe_open

from sparse_jax.adapter.adapter import Arrays
from sparse_jax.adapter.file import ADAPTER
from sparse_jax.errors import InputError, brief, reason_of
from sparse_jax.interchange.peft_save import ABOUT, PREFIX, WEIGHTS
from sparse_jax.models.functional import Model
from sparse_jax.models.hf.model_files import PEFT_CONFIG, read_object
from sparse_jax.models.hf.tensor_names import (
    has_tensor,
    is_stacked,
    tensor_name,
    with_full_names,
)
from sparse_jax.params.fields import JSON_RULES, TEXTS, Json
from sparse_jax.params.names import leaf_names

__all__ = [
    "ModuleParts",
    "PeftFolder",
    "Place",
    "find_peft",
    "modules_and_rest",
    "open_peft",
    "places_of",
    "require_options",
]

_PICKLE = "adapter_model.bin"
# Options that name modules, versions and models, and change no number.
_COMMON = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "modules_to_save", "peft_type", "peft_version", "revision", "target_modules",
    "task_type",
)  # fmt: skip
# Copies that PEFT keeps of a module that it saves.
_COPIES = re.compile(r"\.(original_module|modules_to_save)(\.default)?\.")


class PeftFolder(NamedTuple):
    """What a folder of PEFT holds."""

    path: Path
    config: Mapping[str, Json]
    tensors: Arrays  # by their names in the model that was adapted
    about: Mapping[str, Json]  # what `save_peft` added; empty if PEFT wrote it

    def option(self, name: str, kind: object, default: Json) -> Json:
        """Returns an option of the configuration, or its default.

        Raises:
          InputError: if it is of another type.
        """
        value = self.config.get(name, default)
        check, rule = JSON_RULES[kind]
        if value != default and not check(value):
            raise self.refused(name, rule)
        return value

    def number(self, name: str, default: float) -> float:
        """Returns an option that is a number."""
        value = self.option(name, float, default)
        assert isinstance(value, int | float)
        return value

    def refused(self, name: str, rule: str, remedy: str = "") -> InputError:
        """Returns the error for an option that cannot be followed."""
        remedy = remedy or "Merge it in PEFT with `merge_and_unload`, and save that."
        return InputError(
            f"`{name}` in `{self.path / PEFT_CONFIG}` must be {rule}, got "
            f"{brief(self.config.get(name))}. {remedy}"
        )


class Place(NamedTuple):
    """A leaf that a tensor holds, or one layer of it."""

    leaf: str
    layer: int


class ModuleParts(NamedTuple):
    """What PEFT stores of one module of the base."""

    name: str  # as the folder spells it
    arrays: Arrays  # by suffix
    places: tuple[Place, ...]  # of its kernel; several if it is fused

    def take(self, *suffixes: str) -> list[np.ndarray]:
        """Returns some arrays.

        Raises:
          InputError: if one is missing.
        """
        for suffix in suffixes:
            if suffix not in self.arrays:
                raise InputError(
                    f"`{WEIGHTS}` must have `{PREFIX}{self.name}.{suffix}`, and does "
                    "not. Copy the folder again."
                )
        return [self.arrays[suffix] for suffix in suffixes]


def find_peft(path: str | Path) -> Path | None:
    """Returns the folder of a PEFT adapter, None if it is something else.

    Args:
      path: folder, or a file in it.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    is_ours = path.is_dir() and (path / ADAPTER).is_file()
    is_other = not path.is_dir() and path.name not in (PEFT_CONFIG, WEIGHTS, _PICKLE)
    if is_ours or is_other or not (folder / PEFT_CONFIG).is_file():
        return None
    return folder


def open_peft(folder: str | Path) -> PeftFolder:
    """Reads a folder of PEFT.

    Raises:
      InputError: if there is none, its weights are a pickle, a file is damaged, or a
        number is not finite.
    """
    path = find_peft(folder)
    if path is None:
        raise InputError(
            f"`folder` must be a folder with an `{PEFT_CONFIG}` that PEFT wrote, got "
            f"`{folder}`. Pass what `save_pretrained` of a `PeftModel` wrote."
        )
    config = read_object(path / PEFT_CONFIG)
    weights = path / WEIGHTS
    if not weights.is_file():
        rule = f"`folder` must have an `{WEIGHTS}`, got `{path}`, which has"
        if not (path / _PICKLE).is_file():
            raise InputError(f"{rule} none. Copy the folder again.")
        raise InputError(
            f"{rule} only the pickle {_PICKLE}; loading a pickle runs the code in it. "
            "Load it in PEFT and call `save_pretrained`, which writes safetensors."
        )
    try:
        with safe_open(weights, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    # A damaged file may raise anything at all.
    except Exception as error:
        raise InputError(
            f"`{weights}` must be a complete safetensors file: {reason_of(error)}. "
            "Copy it again."
        ) from error
    for name, array in tensors.items():
        is_whole = np.issubdtype(array.dtype, np.integer)
        if not is_whole and not np.isfinite(array.astype(np.float32)).all():
            raise InputError(
                f"`{name}` in `{weights}` must be finite, got NaN or infinite values. "
                "Save the adapter from before its training diverged."
            )
    _require_about(weights, about)
    tensors = {name.removeprefix(PREFIX): array for name, array in tensors.items()}
    return PeftFolder(path, config, tensors, about)


def require_options(
    found: PeftFolder, handled: Collection[str], harmless: Collection[str] = ()
) -> None:
    """Raises if an option is set that nothing here follows.

    Args:
      found: the folder.
      handled: options that are followed.
      harmless: options that only matter for others, which are refused.
    """
    known = {*_COMMON, *handled, *harmless}
    for name in sorted(found.config):
        if name not in known and found.config[name]:
            raise found.refused(name, "left out, as it is not understood here")


def places_of(model: Model) -> dict[str, tuple[Place, ...]]:
    """Returns the leaves that every tensor of a model holds, by its name."""
    found: dict[str, list[Place]] = {}
    for leaf in jax.tree.leaves(leaf_names(model.abstract())):
        layers = model.config.num_layers if is_stacked(leaf) else 1
        for layer in range(layers):
            if not has_tensor(model.family, leaf, layer):
                continue
            name = tensor_name(model.family, leaf, layer)
            found.setdefault(name, []).append(Place(leaf, layer))
    return {name: tuple(places) for name, places in found.items()}


def modules_and_rest(
    found: PeftFolder, suffixes: Collection[str], model: Model
) -> tuple[list[ModuleParts], Arrays]:
    """Returns what is stored of modules, and the tensors of the base that were saved.

    Args:
      found: the folder.
      suffixes: ends of names that belong to the type of the adapter.
      model: the base.

    Raises:
      InputError: naming a module that the base does not have.
    """
    places = places_of(model)
    parts: dict[str, Arrays] = {}
    rest: Arrays = {}
    for name, array in found.tensors.items():
        for suffix in suffixes:
            if name.endswith(f".{suffix}"):
                parts.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = array
                break
        else:
            plain = _COPIES.sub(".", name)
            if plain == name or plain not in found.tensors:
                rest[name.replace(".base_layer.", ".")] = array
    full = with_full_names(model.family, [f"{name}.weight" for name in parts])
    modules = []
    for weight, theirs in full.items():
        name = theirs.removesuffix(".weight")
        if weight not in places or not places[weight][0].leaf.endswith("/kernel"):
            raise InputError(
                f"`folder` must be for modules of the model, linear maps, got the "
                f"tensors of `{name}`, for which this {model.family.name!r} has no "
                "such module. Pass the base that the adapter was trained on."
            )
        modules.append(ModuleParts(name, parts[name], places[weight]))
    _require_targets(found, modules, places)
    renamed = with_full_names(model.family, rest)
    return modules, {full: rest[name] for full, name in renamed.items()}


def _require_targets(
    found: PeftFolder, modules: list[ModuleParts], places: Mapping[str, Sequence[Place]]
) -> None:
    """Raises if a module that the configuration lists has no tensors."""
    if not modules:
        raise InputError(
            f"`{found.path / WEIGHTS}` must have tensors of the type "
            f"{brief(found.config.get('peft_type'))}, and has none. Copy it again."
        )
    targets = found.config.get("target_modules")
    if not isinstance(targets, list) or found.config.get("layers_to_transform"):
        return
    have = {one.name for one in modules}
    others = [*_texts(found, "modules_to_save"), *_texts(found, "exclude_modules")]
    for weight, (first, *_) in places.items():
        name = weight.removesuffix(".weight")
        matches = lambda words, name=name: any(
            f".{name}".endswith(f".{word}") for word in words
        )
        part = any(word in name.split(".") for word in others) or matches(others)
        is_here = any(name.endswith(one) for one in have)
        is_linear = first.leaf.endswith("/kernel")
        if is_linear and matches(targets) and not part and not is_here:
            raise InputError(
                f"`{found.path / WEIGHTS}` must have tensors of `{name}`, which "
                "`target_modules` names, and has none. Copy it again."
            )


def _texts(found: PeftFolder, name: str) -> Iterator[str]:
    """Yields the words of an option that is a list or an expression."""
    value = found.config.get(name)
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (word for word in value if isinstance(word, str))


def _require_about(path: Path, about: Mapping[str, Json]) -> None:
    """Raises unless what `save_peft` adds is of the right types."""
    rules = {"task": str, "labels": TEXTS, "base_hash": str, "dtype": str}
    is_right = isinstance(about, dict) and all(
        JSON_RULES[kind][0](about[name])
        for name, kind in rules.items()
        if name in about
    )
    if not is_right:
        raise InputError(
            f"`{ABOUT}` in the metadata of `{path}` must have only texts, got "
            f"{brief(about)}. Copy the file again."
        )

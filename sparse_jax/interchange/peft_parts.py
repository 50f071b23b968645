"""What each kind of trained values becomes in a folder of PEFT."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from sparse_jax.adapter.adapter import Adapter, Arrays
from sparse_jax.errors import InputError
from sparse_jax.interchange.peft_prefix import prefix_config, prefix_tensor
from sparse_jax.interchange.peft_sparse import SparseForm
from sparse_jax.methods.method import PeftForm
from sparse_jax.models.attachment import MEMORY
from sparse_jax.models.functional import Model
from sparse_jax.models.hf.tensor_names import is_stacked
from sparse_jax.params.fields import Json
from sparse_jax.supports.positions import fetch, read_entries

__all__ = [
    "MERGE",
    "Part",
    "added_part",
    "expression",
    "module_of",
    "no_place",
    "prefix_part",
    "sparse_part",
]

_log = logging.getLogger(__name__)

MERGE = "Merge it with `merge_adapter` and write the model with `save_pretrained`"


class Part(NamedTuple):
    """What one kind of trained values becomes."""

    config: dict[str, Json]
    tensors: Arrays  # by their names in the base model
    targets: tuple[str, ...]  # modules that PEFT replaces, with a place for the layer
    wholes: Arrays = {}  # leaves that are written whole


def added_part(adapter: Adapter, form: PeftForm, model: Model) -> Part:
    """Returns arrays beside the modules, those of several sites of one module fused."""
    layout = model.family.layout
    sites: dict[str, list[str]] = {}
    for site in adapter.added:
        sites.setdefault(module_of(model, f"layers/{site}"), []).append(site)
    config: dict[str, Json] = {
        **form.config,
        "fan_in_fan_out": layout.is_upright,
    }
    patterns: dict[str, dict[str, Json]] = {}
    tensors: Arrays = {}
    for module, ours in sites.items():
        leaf = f"layers/{ours[0]}/bias"
        fused = [one.removeprefix("layers/") for one in layout.modules_with(leaf)]
        widths = layout.widths(leaf, model.config)
        join = lambda arrays, leaf=leaf: layout.fuse(leaf, arrays, model.config)
        for name in sorted({part for site in ours for part in adapter.added[site]}):
            behind, turn, fuse = form.parts[name]
            if fused and fuse is None:
                raise no_place(f"layers/{ours[0]}/kernel", model)
            stacks = [adapter.added.get(site, {}).get(name) for site in (fused or ours)]
            for layer in range(model.config.num_layers):
                arrays = [None if stack is None else stack[layer] for stack in stacks]
                one = fuse(arrays, widths, join) if fused and fuse else arrays[0]
                assert one is not None
                tensors[f"{module.format(layer)}.{behind}"] = turn(one)
        if fused:
            for field, value in form.patterns(len(ours)).items():
                patterns.setdefault(field, {})[expression([module])] = value
    for field, found in form.sites.items():
        config[field] = expression(module_of(model, f"layers/{site}") for site in found)
    return Part({**config, **patterns}, tensors, tuple(sites))


def sparse_part(
    adapter: Adapter,
    model: Model,
    base: Mapping[str, jax.Array] | None,
    form: SparseForm,
) -> Part:
    """Returns differences at entries of kernels, and other leaves as a whole."""
    if base is None:
        raise InputError(
            "`params` must be the parameters of the base for a sparse adapter, got "
            "none: PEFT stores differences to them. Pass what `from_pretrained` "
            "returned, in the dtype that was trained."
        )
    layout = model.family.layout
    wholes: Arrays = {}
    kernels: list[tuple[str, int, tuple[int, int]]] = []
    for leaf, support in adapter.support.items():
        module, _, kind = leaf.rpartition("/")
        is_small = kind == "scale" or leaf.startswith("classifier/") or kind == "bias"
        is_upright = layout.is_upright and is_stacked(leaf)
        if layout.part_of(leaf) is not None or not (is_small or kind == "kernel"):
            raise no_place(leaf, model)
        if is_small:
            wholes[leaf] = _with_entries(base[leaf], support, adapter.values[leaf])
        elif is_upright:
            raise no_place(leaf, model)
        else:
            width, height = base[leaf].shape[-2:]
            kernels.append((leaf, support.shape[-1], (width, height)))
    if not kernels:
        raise InputError(
            "`adapter` must have entries of a linear map to be written for PEFT, got "
            f"none. {MERGE}."
        )
    size, counts = form.sized([one[2] for one in kernels], [one[1] for one in kernels])
    tensors: Arrays = {}
    inexact = 0
    for (leaf, _, shape), count in zip(kernels, counts, strict=True):
        new, support = adapter.values[leaf], adapter.support[leaf]
        old = read_entries(base[leaf], support)
        if old.dtype != new.dtype:
            raise InputError(
                f"`params` must be in the dtype that was trained, {new.dtype}, got "
                f"{old.dtype} for `{leaf}`. Load the base with `dtype={new.dtype}`."
            )
        deltas = new.astype(np.float32) - old.astype(np.float32)
        # In float32 the last of 24 digits may differ as well, which nothing shows.
        if new.dtype != np.float32:
            inexact += int((form.add(old, deltas) != new).sum())
        stacks = (np.atleast_2d(x) for x in (support, old, new))
        for layer, (at, was, now) in enumerate(zip(*stacks, strict=True)):
            stored = form.store(at, was, now, shape, count)
            module = module_of(model, leaf.removesuffix("/kernel")).format(layer)
            tensors[f"{module}.{form.values}"] = stored.values
            tensors[f"{module}.{form.indices}"] = stored.indices
    if inexact:
        _log.warning(
            "%d entries differ from the trained ones in their last digits where PEFT "
            "adds the difference to the base",
            inexact,
        )
    targets = [module_of(model, leaf.removesuffix("/kernel")) for leaf, *_ in kernels]
    config = {"peft_type": form.peft_type, **form.config, **size}
    return Part(config, tensors, tuple(targets), wholes)


def prefix_part(adapter: Adapter, model: Model) -> Part:
    """Returns the keys and values in front of the tokens."""
    tensor = prefix_tensor(adapter.added[MEMORY], model)
    return Part(prefix_config(tensor, model), {"prompt_embeddings": tensor}, ())


def _with_entries(
    leaf: jax.Array, support: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Returns a leaf of the base with trained entries."""
    whole = fetch(leaf).copy()
    rows = whole.reshape(*support.shape[:-1], -1)
    np.put_along_axis(rows, support.astype(np.int64), values, axis=-1)
    return whole


def expression(modules: Iterable[str]) -> str:
    """Returns the regular expression of some modules, in any layer.

    A list of names would not do: PEFT compares the ends of names, and that of
    "output.dense" is also the end of "attention.output.dense".
    """
    escaped = [re.escape(module) for module in modules]
    return "|".join(one.replace(re.escape("{}"), r"\d+") for one in escaped)


def no_place(leaf: str, model: Model) -> InputError:
    """Returns the error for a leaf that PEFT cannot hold what was trained of."""
    return InputError(
        f"`adapter` must be at modules that PEFT can hold it for, linear maps of their "
        f"own in PyTorch, got one for `{leaf}` of a {model.family.name!r}. {MERGE}, "
        "or keep it as an adapter file."
    )


def module_of(model: Model, ours: str) -> str:
    """Returns the name of a module in PyTorch, with a place for the layer."""
    return model.family.names[ours]

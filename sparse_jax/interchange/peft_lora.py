"""LoRA and DoRA as PEFT stores them: ranks and scales may differ from map to map."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sparse_jax.adapter.adapter import Arrays
from sparse_jax.errors import InputError, brief
from sparse_jax.interchange.peft_folder import PeftFolder
from sparse_jax.interchange.peft_source import (
    PeftSource,
    Trained,
    require_shape,
    site_of,
)
from sparse_jax.methods.lora import DoRA, LoRA
from sparse_jax.models.hf.tensor_names import is_stacked
from sparse_jax.params.fields import Json

__all__ = ["read_lora"]


class _Low(NamedTuple):
    """LoRA at one place."""

    a: np.ndarray  # shape=(in, r)
    b: np.ndarray  # shape=(r, out)
    m: np.ndarray | None  # shape=(out,)
    scale: float


def read_lora(source: PeftSource) -> Trained:
    """Returns LoRA or DoRA."""
    found, layout = source.found, source.model.family.layout
    _require_plain_lora(found)
    is_dora, is_rs = (
        bool(found.config.get("use_dora")),
        bool(found.config.get("use_rslora")),
    )
    sites: dict[str, dict[int, _Low]] = {}
    alphas: set[tuple[int, float]] = set()
    for module in source.modules:
        a, b = module.take("lora_A.weight", "lora_B.weight")
        rank = int(_pattern(found, "rank_pattern", "r", 8, module.name))
        alpha = _pattern(found, "alpha_pattern", "lora_alpha", 8, module.name)
        alphas.add((rank, alpha))
        width = source.shapes[module.places[0].leaf][-2]
        height = sum(source.shapes[place.leaf][-1] for place in module.places)
        lengths = module.take("lora_magnitude_vector") if is_dora else []
        if is_dora:
            site_of(module.places[0].leaf, module)
        likes = [(rank, width), (height, rank), (height,)]
        for array, like in zip((a, b, *lengths), likes, strict=False):
            require_shape(module.name, array.shape, like)
        for place in module.places:
            part = lambda array, place=place: layout.split(
                f"{place.leaf.removesuffix('kernel')}bias",
                array,
                source.model.config,
            ).astype(np.float32)
            low = _Low(
                a.T.astype(np.float32),
                part(b.T),
                part(lengths[0]) if lengths else None,
                alpha / (math.sqrt(rank) if is_rs else rank),
            )
            sites.setdefault(place.leaf, {})[place.layer] = low
    most = max(rank for rank, _ in alphas)
    if len(alphas) == 1:
        options = {"alpha": next(iter(alphas))[1], "rslora": is_rs}
        common = None
    else:
        scales = Counter(
            low.scale for stack in sites.values() for low in stack.values()
        )
        common = scales.most_common(1)[0][0]
        options = {"alpha": common * most, "rslora": False}
    dense = {
        leaf: _with_low(source, leaf, stack[0])
        for leaf, stack in sites.items()
        if not is_stacked(leaf)
    }
    added = {
        leaf.removeprefix("layers/").removesuffix("/kernel"): _stacked(
            source, leaf, stack, most, common, is_dora
        )
        for leaf, stack in sites.items()
        if is_stacked(leaf)
    }
    where = tuple(f"^{site}$" for site in sorted(added))
    dropout = found.number("lora_dropout", 0.0)
    make = DoRA if is_dora else LoRA
    method = make(rank=most, where=where, dropout=dropout, **options)
    return Trained(method, added, dense=dense)


def _with_low(source: PeftSource, leaf: str, low: _Low) -> np.ndarray:
    """Returns the kernel of a linear map that is in no layer, with LoRA added."""
    base = source.need_base(f"`{leaf}` is in no layer, so that LoRA is added to it")
    kernel = base.read(leaf)
    changed = kernel.astype(np.float32) + np.float32(low.scale) * (low.a @ low.b)
    return changed.astype(kernel.dtype)


def _stacked(
    source: PeftSource,
    leaf: str,
    stack: Mapping[int, _Low],
    rank: int,
    common: float | None,
    is_dora: bool,
) -> Arrays:
    """Returns the arrays of a site, layers without any as zeros."""
    layers, width, height = source.shapes[leaf]
    arrays: Arrays = {
        "a": np.zeros((layers, width, rank), np.float32),
        "b": np.zeros((layers, rank, height), np.float32),
    }
    if is_dora:
        arrays["m"] = np.zeros((layers, height), np.float32)
    for layer in range(layers):
        low = stack.get(layer)
        if low is not None:
            arrays["a"][layer, :, : low.a.shape[1]] = low.a
            factor = 1.0 if common is None else low.scale / common
            arrays["b"][layer, : low.b.shape[0]] = low.b * np.float32(factor)
            if low.m is not None:
                arrays["m"][layer] = low.m
        elif is_dora:
            base = source.need_base(
                "DoRA of some layers keeps the lengths of the others"
            )
            kernel = base.read(leaf)[layer].astype(np.float32)
            arrays["m"][layer] = np.sqrt(np.square(kernel).sum(axis=-2))
    return arrays


def _require_plain_lora(found: PeftFolder) -> None:
    """Raises if options of LoRA ask for what is not done here."""
    if found.config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise found.refused("bias", "none, all or lora_only")
    # Others change the weights of the base, or need data to be made again.
    init = found.config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "eva", "orthogonal"):
        raise found.refused(
            "init_lora_weights",
            "true, false, gaussian, eva or orthogonal, which leave the base as it is",
            "Save it in PEFT with `path_initial_model_for_weight_conversion`, which "
            "makes it an adapter of the base itself.",
        )


def _pattern(
    found: PeftFolder, field: str, name: str, default: float, module: str
) -> float:
    """Returns the rank or alpha of a module, as PEFT finds it."""
    value: Json = found.number(name, default)
    patterns = found.config.get(field) or {}
    if not isinstance(patterns, dict):
        raise found.refused(field, "an object from modules to numbers")
    for key, one in patterns.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                value = one
                break
        except re.error as error:
            raise found.refused(
                field, f"regular expressions of modules ({error})"
            ) from error
    if not isinstance(value, int | float) or not 0 < value < 1e9:
        raise InputError(
            f"`{name}` of `{module}` in `{found.path}` must be positive and below "
            f"1e9, got {brief(value)}. Correct it, or copy the folder again."
        )
    return value

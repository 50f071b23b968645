"""Read an adapter in the layout of Hugging Face PEFT."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from sparse_jax.adapter.adapter import Adapter, Arrays
from sparse_jax.errors import InputError, listed
from sparse_jax.interchange.peft_folder import (
    PeftFolder,
    modules_and_rest,
    open_peft,
    places_of,
    require_options,
)
from sparse_jax.interchange.peft_lora import read_lora
from sparse_jax.interchange.peft_readers import read_ia3, read_prefix, sparse_reader
from sparse_jax.interchange.peft_save import WEIGHTS, WORDS
from sparse_jax.interchange.peft_source import Base, PeftSource, Trained, require_shape
from sparse_jax.interchange.peft_sparse import SPARSE
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.hf.pretrained import base_config
from sparse_jax.models.hf.tensor_names import is_stacked
from sparse_jax.params.names import leaves_by_name
from sparse_jax.supports.positions import fetch

__all__ = ["load_peft", "read_adapter"]


def load_peft(
    folder: str | Path, model: Model, params: Params | None = None
) -> Adapter:
    """Reads an adapter that PEFT wrote: LoRA, DoRA, (IA)3, SHiRA, Super-Tuning, prefix.

    Different ranks are padded with zeros to the largest, different scales are
    multiplied into B, and layers without tensors get arrays that change nothing, so
    that the outputs are equal. LoRA of a linear map that is in no layer, such as a
    pooler, is added to its kernel, which is then trained in full. Sparse entries become
    absolute values in the dtype of the base, as PEFT merges them; a kernel with fewer
    entries than the others is filled up with entries of the base.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      model: the base, with as many labels as the adapter.
      params: parameters of the base. They are needed for sparse entries, and where
        only some layers were trained.

    Raises:
      InputError: naming a type, an option or a tensor that is not understood or
        cannot be followed exactly; a module that the model does not have; a shape that
        does not fit; or numbers that are not finite.
    """
    base = None
    if params is not None:
        leaves = leaves_by_name(params)
        first = next(iter(leaves.values()))
        base = Base(lambda leaf: fetch(leaves[leaf]), np.dtype(first.dtype))
    return read_adapter(open_peft(folder), model, base)


def read_adapter(found: PeftFolder, model: Model, base: Base | None) -> Adapter:
    """Returns the adapter in a folder; the arguments and errors of `load_peft`."""
    name = found.config.get("peft_type")
    if not isinstance(name, str) or name not in _TYPES:
        raise found.refused("peft_type", f"one of {', '.join(_TYPES)}")
    kind = _TYPES[name]
    require_options(found, kind.options, kind.harmless)
    leaves = leaves_by_name(model.abstract())
    shapes = {leaf: like.shape for leaf, like in leaves.items()}
    modules, rest = [], dict(found.tensors)
    if kind.suffixes:
        modules, rest = modules_and_rest(found, kind.suffixes, model)
    else:
        rest.pop("prompt_embeddings", None)
    source = PeftSource(found, model, base, modules, shapes)
    trained = kind.read(source)
    dense = {**_own(source, trained, _dense(source, rest)), **trained.dense}
    rules = tuple(f"^{re.escape(leaf)}$" for leaf in sorted(dense))
    about = found.about
    dtype = about.get("dtype")
    return Adapter(
        trained.support,
        trained.values,
        dense,
        trained.added,
        replace(trained.method, dense=rules or None),
        settings={"dtype": dtype} if dtype else {},
        base_model=str(found.config.get("base_model_name_or_path") or ""),
        base_hash=str(about.get("base_hash", "")),
        base_config=base_config(model),
        task=str(about.get("task", "")),
        labels=tuple(about.get("labels", ())),  # type: ignore[arg-type]
    )


def _own(source: PeftSource, trained: Trained, dense: Arrays) -> Arrays:
    """Returns leaves that were saved whole, without those that something is added to.

    Of a table or a head that it adds to, PEFT saves the base as well.
    """
    twice = {*dense} & {*trained.dense, *trained.support}
    for leaf in sorted(twice):
        base = source.need_base(f"it adds to `{leaf}`")
        if not np.array_equal(dense[leaf], base.read(leaf)):
            raise InputError(
                f"`{leaf}` must be that of the base, as entries or ranks are added to "
                f"it, got another one in `{source.found.path}`. Pass the base that the "
                "adapter was trained on."
            )
    return {leaf: array for leaf, array in dense.items() if leaf not in twice}


def _dense(source: PeftSource, rest: Arrays) -> Arrays:
    """Returns the leaves that were saved whole, stacked over the layers."""
    model, layout = source.model, source.model.family.layout
    rest = _without_tied_head(source, rest)
    places = places_of(model)
    if unknown := sorted({*rest} - {*places}):
        raise InputError(
            f"`{source.found.path / WEIGHTS}` must have only what is understood here, "
            f"got {listed(unknown, most=3)}. Merge it in PEFT with `merge_and_unload`, "
            "and save that."
        )
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in rest.items():
        for leaf, layer in places[name]:
            like = source.shapes[leaf][1:] if is_stacked(leaf) else source.shapes[leaf]
            expected = layout.tensor_shape(leaf, like, model.config)
            require_shape(name, tensor.shape, expected)
            one = layout.split(leaf, tensor, model.config)
            if source.base is not None:
                one = one.astype(source.base.dtype)
            stacks.setdefault(leaf, {})[layer] = np.ascontiguousarray(one)
    found = {}
    for leaf, stack in stacks.items():
        layers = range(source.shapes[leaf][0] if is_stacked(leaf) else 1)
        if len(stack) < len(layers):
            base = source.need_base(f"`{leaf}` was trained in some layers only")
            stack = {**dict(enumerate(base.read(leaf))), **stack}
        arrays = [stack[layer] for layer in layers]
        found[leaf] = np.stack(arrays) if is_stacked(leaf) else arrays[0]
    return found


def _without_tied_head(source: PeftSource, rest: Arrays) -> Arrays:
    """Returns the tensors without the copy of a word table that is the head as well."""
    names = source.model.family.names
    if source.model.head is not CausalLM or not source.model.config.tied:
        return rest
    words, head = (f"{names[module]}.weight" for module in (WORDS[:-10], "lm_head"))
    if head not in rest and words not in rest:
        return rest
    is_tied = source.found.config.get("ensure_weight_tying") is True
    if words in rest and head in rest:
        is_tied = np.array_equal(rest[words], rest[head])
    if words in rest and is_tied:
        return {name: one for name, one in rest.items() if name != head}
    raise InputError(
        f"`modules_to_save` in `{source.found.path}` must keep `{words}` and `{head}` "
        "equal, as they are one in the base, got different ones. Merge it in PEFT with "
        "`merge_and_unload`, and save that with `tie_word_embeddings` false."
    )


class _Type(NamedTuple):
    """A type of PEFT."""

    suffixes: tuple[str, ...]  # ends of the names of its tensors
    options: tuple[str, ...]  # that are followed
    harmless: tuple[str, ...]  # that start a training, or belong to what is refused
    read: Callable[[PeftSource], Trained]


_TYPES: Mapping[str, _Type] = MappingProxyType(
    {
        "LORA": _Type(
            ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
            (
                "alpha_pattern", "bias", "init_lora_weights", "lora_alpha",
                "lora_dropout", "r", "rank_pattern", "use_dora", "use_rslora",
                "ensure_weight_tying",
            ),
            (
                "eva_config", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
                "megatron_core", "qalora_group_size", "runtime_config",
            ),
            read_lora,
        ),
        "IA3": _Type(
            ("ia3_l",),
            ("feedforward_modules",),
            ("fan_in_fan_out", "init_ia3_weights"),
            read_ia3,
        ),
        "SHIRA": _Type(
            ("shira_weight", "shira_indices"),
            ("r",),
            ("fan_in_fan_out", "init_weights", "mask_type", "random_seed"),
            sparse_reader(SPARSE["shira"]),
        ),
        "SUPERTUNING": _Type(
            ("supertuning_values", "supertuning_indices"),
            ("sparsity",),
            ("init_weights", "save_precomputed_indices", "select_top"),
            sparse_reader(SPARSE["supertuning"]),
        ),
        "PREFIX_TUNING": _Type(
            (),
            ("num_virtual_tokens",),
            (
                "encoder_hidden_size", "init_weights", "num_attention_heads",
                "num_layers", "num_transformer_submodules", "prefix_projection",
                "token_dim",
            ),
            read_prefix,
        ),
    }
)  # fmt: skip

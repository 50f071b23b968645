"""Write an adapter in the layout of Hugging Face PEFT."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from sparse_jax.adapter.adapter import Adapter, Arrays
from sparse_jax.adapter.whole import require_whole
from sparse_jax.errors import InputError
from sparse_jax.interchange.peft_parts import (
    MERGE,
    Part,
    added_part,
    expression,
    module_of,
    no_place,
    prefix_part,
    sparse_part,
)
from sparse_jax.interchange.peft_sparse import SPARSE
from sparse_jax.methods.method import Method
from sparse_jax.methods.registry import METHODS
from sparse_jax.models.attachment import MEMORY
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.model_files import PEFT_CONFIG
from sparse_jax.models.hf.tensor_names import has_tensor, is_stacked, tensor_name
from sparse_jax.models.hf.tensors import save_tensors
from sparse_jax.params.fields import Json, require_word
from sparse_jax.params.names import leaf_names, leaves_by_name
from sparse_jax.supports.positions import fetch

__all__ = ["ABOUT", "PREFIX", "WEIGHTS", "WORDS", "needs_base", "save_peft"]

WEIGHTS = "adapter_model.safetensors"
# What PEFT puts before the name of every module of the base.
PREFIX = "base_model.model."
WORDS = "embeddings/word/embedding"
# Key of what PEFT's files have no place for, in the metadata that PEFT does not read.
ABOUT = "sparse_jax"


def save_peft(
    folder: str | Path,
    adapter: Adapter,
    model: Model,
    *,
    sparse: str = "shira",
    params: Params | None = None,
) -> None:
    """Writes an adapter as PEFT reads it.

        PeftModel.from_pretrained(base, folder)

    `base` is the transformers model that was adapted, with as many labels. Parameters
    trained in full, such as the classifier, become PEFT's `modules_to_save`, and
    biases absolute values in the file. Sparse entries of linear maps become SHiRA or
    Super-Tuning, those of biases, norms and the classifier whole arrays.

    PEFT adds differences in its own way: SHiRA in float32, so that in bfloat16 the
    merged weights are the trained ones unless a value shrank by a factor of more than
    2^15; Super-Tuning in the dtype of the model, exact for values that changed by less
    than a factor of two. A line is logged if some entries are not.

    Args:
      folder: folder for `adapter_config.json` and `adapter_model.safetensors`, made if
        absent.
      adapter: as `load_adapter` returns it.
      model: model that the adapter belongs to.
      sparse: format of sparse entries, "shira" or "supertuning". The first has as many
        entries in a kernel as LoRA of one rank, the second a share of all, so that it
        is padded with fewer zeros.
      params: parameters of the base, needed for sparse entries: PEFT stores
        differences.

    Raises:
      InputError: if a part of the adapter is missing, PEFT has no method with the same
        equation, saves more than what was trained in full, or has no place for entries
        of a leaf; or if `params` is needed and not given.
    """
    require_word("sparse", sparse, SPARSE)
    base = None if params is None else leaves_by_name(params)
    form = adapter.method.to_peft(adapter.added)
    if adapter.support and not adapter.added:
        part = sparse_part(adapter, model, base, SPARSE[sparse])
    elif MEMORY in adapter.added and len(adapter.added) == 1:
        part = prefix_part(adapter, model)
    elif form is not None and adapter.added and not adapter.support:
        part = added_part(adapter, form, model)
    else:
        ours = [w for w, e in METHODS.items() if e.kind.to_peft is not Method.to_peft]
        raise InputError(
            f"`adapter` must be of {', '.join(ours)}, prefix or sparse to be "
            f"written for PEFT, got {adapter.word!r}. {MERGE}, if the method allows "
            "it."
        )
    require_whole(model.abstract(), adapter)
    wholes = _completed({**adapter.dense, **part.wholes}, model, base)
    _require_own_tensors(wholes, model)
    modules = _saved_modules(wholes, model)
    tensors = {**part.tensors, **dict(_plain(wholes, part.targets, model))}
    if _has_tied_table(wholes, model):
        tensors[f"{model.family.names['lm_head']}.weight"] = wholes[WORDS]
        modules.add(model.family.names["lm_head"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors writes the memory of an array, whatever the strides say, and every
    # name needs a memory of its own.
    named = {f"{PREFIX}{name}": np.array(x, order="C") for name, x in tensors.items()}
    if MEMORY in adapter.added:
        named = {name.removeprefix(PREFIX): array for name, array in named.items()}
    save_tensors(named, folder / WEIGHTS, {"format": "pt", ABOUT: _about(adapter)})
    config = {**part.config, **_common(adapter, model, part, modules)}
    if "bias" in config:
        config["bias"] = _bias(wholes, part.targets, model)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")


def needs_base(adapter: Adapter, model: Model) -> bool:
    """Returns whether `save_peft` needs the parameters of the base."""
    saved = _saved_modules(adapter.dense, model)
    leaves = jax.tree.leaves(leaf_names(model.abstract()))
    whole = {leaf for leaf in leaves if _saved_module(leaf, model) in saved}
    return bool(adapter.support) or not whole <= {*adapter.dense}


def _plain(
    wholes: Mapping[str, np.ndarray], targets: Iterable[str], model: Model
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields leaves that are written whole, by the names of their tensors."""
    family, targets = model.family, {*targets}
    for leaf, array in wholes.items():
        module, _, kind = leaf.rpartition("/")
        inside = ".base_layer" if module_of(model, module) in targets else ""
        for layer, one in enumerate(array if is_stacked(leaf) else array[None]):
            if not has_tensor(family, leaf, layer):
                continue
            name, _, last = tensor_name(family, leaf, layer).rpartition(".")
            yield f"{name}{inside}.{last}", family.layout.turned(leaf, one)


def _common(
    adapter: Adapter, model: Model, part: Part, modules: set[str]
) -> dict[str, Json]:
    """Returns what every `adapter_config.json` holds."""
    layers = range(model.config.num_layers)
    saved = {
        module.format(layer)
        for module in modules
        for layer in (layers if "{}" in module else range(1))
    }
    # With this task PEFT wants the classifier, trained or not.
    is_classifier = model.head is SequenceClassifier and _head_of(model) in saved
    is_causal = model.head is CausalLM
    common: dict[str, Json] = {
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "modules_to_save": sorted(saved),
        "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM" if is_causal else None,
    }
    if part.targets:
        common["target_modules"] = expression(sorted(part.targets))
    return common


def _about(adapter: Adapter) -> str:
    """Returns what an adapter says of itself and PEFT's files have no place for."""
    words = {
        "task": adapter.task,
        "labels": list(adapter.labels),
        "base_hash": adapter.base_hash,
        "dtype": adapter.settings.get("dtype"),
    }
    return json.dumps({name: word for name, word in words.items() if word})


def _completed(
    wholes: Mapping[str, np.ndarray], model: Model, base: Mapping[str, jax.Array] | None
) -> Arrays:
    """Returns leaves with all others of the modules that PEFT saves.

    Raises:
      InputError: if some are missing and there is no base to take them from.
    """
    found, saved = dict(wholes), _saved_modules(wholes, model)
    for leaf in jax.tree.leaves(leaf_names(model.abstract())):
        module = _saved_module(leaf, model)
        if module not in saved or leaf in found:
            continue
        if base is None:
            raise InputError(
                f"`adapter` must have all parameters of `{module}` to be written for "
                f"PEFT, got some without `{leaf}`. Pass the parameters of the base as "
                "`params`, or train the whole module."
            )
        found[leaf] = fetch(base[leaf])
    return found


def _saved_modules(wholes: Iterable[str], model: Model) -> set[str]:
    """Returns the modules that PEFT saves, with a place for the layer.

    It loads a bias alone as it is.
    """
    modules = {_saved_module(leaf, model) for leaf in wholes if not _is_bias(leaf)}
    # With DistilBERT's `classifier` also its `pre_classifier`: ends of names count.
    alike = {name for name in model.family.names.values() if name.endswith((*modules,))}
    return modules | alike


def _is_bias(leaf: str) -> bool:
    """Returns whether a leaf is a bias."""
    return leaf.endswith("/bias")


def _saved_module(leaf: str, model: Model) -> str:
    """Returns the module that PEFT saves for a leaf, with a place for the layer."""
    # PEFT takes the whole classifier for one module.
    is_head = leaf.startswith("classifier/")
    return _head_of(model) if is_head else module_of(model, leaf.rpartition("/")[0])


def _head_of(model: Model) -> str:
    """Returns the module of a classifier that PEFT saves whatever is trained."""
    return model.family.names.get("classifier", "classifier")


def _bias(
    wholes: Mapping[str, np.ndarray], targets: Iterable[str], model: Model
) -> str:
    """Returns which biases were trained beside LoRA, in PEFT's words."""
    alone = {
        module_of(model, leaf.rpartition("/")[0])
        for leaf in wholes
        if _is_bias(leaf)
        and _saved_module(leaf, model) not in _saved_modules(wholes, model)
    }
    leaves = jax.tree.leaves(leaf_names(model.abstract()))
    biased = {
        module_of(model, leaf.rpartition("/")[0]) for leaf in leaves if _is_bias(leaf)
    }
    if not alone:
        return "none"
    return "lora_only" if alone == biased & {*targets} else "all"


def _has_tied_table(wholes: Mapping[str, np.ndarray], model: Model) -> bool:
    """Returns whether a word table was trained that is the head of a decoder as well.

    PEFT trains a copy of a module and leaves the head to the table of the base.
    """
    return model.head is CausalLM and model.config.tied and WORDS in wholes


def _require_own_tensors(wholes: Iterable[str], model: Model) -> None:
    """Raises unless every leaf has a tensor of its own in PyTorch."""
    for leaf in wholes:
        if model.family.layout.part_of(leaf) is not None:
            raise no_place(leaf, model)

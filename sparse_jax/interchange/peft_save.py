"""Write an adapter in the layout of Hugging Face PEFT."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.whole import require_whole
from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method, PeftForm
from sparse_jax.methods.registry import METHODS
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.family import PLAIN, DecoderFamily, Family
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.model_files import PEFT_CONFIG
from sparse_jax.models.hf.tensor_names import is_stacked, tensor_name
from sparse_jax.models.hf.tensors import save_tensors
from sparse_jax.params.fields import Json
from sparse_jax.params.names import leaf_names

__all__ = ["save_peft"]

WEIGHTS = "adapter_model.safetensors"

# What PEFT puts before the name of every module of the base.
_PREFIX = "base_model.model."
_WORDS = "embeddings/word/embedding"


def save_peft(folder: str | Path, adapter: Adapter, model: Model) -> None:
    """Writes a LoRA, DoRA or (IA)3 adapter as PEFT reads it.

        PeftModel.from_pretrained(base, folder)

    `base` is the transformers model that was adapted, with as many labels. Parameters
    trained in full, such as the classifier, become PEFT's `modules_to_save`.

    Args:
      folder: folder for `adapter_config.json` and `adapter_model.safetensors`, made if
        absent.
      adapter: as `load_adapter` returns it.
      model: model that the adapter belongs to.

    Raises:
      InputError: if a part of the adapter is missing, or PEFT has no method with the
        same equation, saves more than what was trained in full, or knows a module only
        as a part of a larger one.
    """
    form = adapter.method.to_peft(adapter.added)
    if adapter.support or form is None:
        ours = [w for w, e in METHODS.items() if e.kind.to_peft is not Method.to_peft]
        raise InputError(
            f"`adapter` must be of {', '.join(ours[:-1])} or {ours[-1]} to be written "
            f"for PEFT, got {adapter.word!r}. Merge it with `merge_adapter` and write "
            "the model with `save_pretrained`, if the method allows it."
        )
    _require_plain_tensors(adapter, model.family)
    require_whole(model.abstract(), adapter)
    _require_whole_modules(adapter, model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensors(adapter, form, model.family))
    if _has_tied_table(adapter, model):
        head = f"{_PREFIX}{model.family.names['lm_head']}.weight"
        tensors[head] = adapter.dense[_WORDS].copy()
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
    text = json.dumps(_config(adapter, form, model), indent=2, sort_keys=True)
    (folder / PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")


def _tensors(
    adapter: Adapter, form: PeftForm, family: Family
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors by their names, layer by layer."""
    for site, parts in adapter.added.items():
        for part, stack in parts.items():
            behind, turn = form.parts[part]
            for layer, array in enumerate(stack):
                name = f"{_PREFIX}{_module(family, site).format(layer)}.{behind}"
                # safetensors writes the memory of an array, whatever the strides say.
                yield name, np.ascontiguousarray(turn(array))
    for leaf, array in adapter.dense.items():
        stack = array if is_stacked(leaf) else array[None]
        for layer, one in enumerate(stack):
            tensor = np.ascontiguousarray(PLAIN.turned(leaf, one))
            yield f"{_PREFIX}{tensor_name(family, leaf, layer)}", tensor


def _has_tied_table(adapter: Adapter, model: Model) -> bool:
    """Returns whether a word table was trained that is the head of a decoder as well.

    PEFT trains a copy of a module and leaves the head to the table of the base.
    """
    return model.head is CausalLM and model.config.tied and _WORDS in adapter.dense


def _config(adapter: Adapter, form: PeftForm, model: Model) -> dict[str, Json]:
    """Returns what `adapter_config.json` holds."""
    modules = {
        module.format(layer)
        for leaf, module in _saved_modules(adapter.dense, model.family).items()
        for layer in range(model.config.num_layers if is_stacked(leaf) else 1)
    }
    if _has_tied_table(adapter, model):
        modules.add(model.family.names["lm_head"])
    # With this task PEFT wants the classifier, trained or not.
    is_classifier = model.head is SequenceClassifier and "classifier" in modules
    is_causal = model.head is CausalLM
    return {
        **form.config,
        **{name: _pattern(model.family, sites) for name, sites in form.sites.items()},
        "base_model_name_or_path": adapter.base_model,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": sorted(modules),
        "target_modules": _pattern(model.family, sorted(adapter.added)),
        "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM" if is_causal else None,
    }


def _pattern(family: Family, sites: Iterable[str]) -> str:
    """Returns the expression of the modules at some sites, in any layer.

    A list of names would not do: PEFT compares the ends of names, and that of
    "output.dense" is also the end of "attention.output.dense".
    """
    modules = [re.escape(_module(family, site)) for site in sites]
    return "|".join(module.replace(re.escape("{}"), r"\d+") for module in modules)


def _saved_modules(leaves: Iterable[str], family: Family) -> dict[str, str]:
    """Returns the module that PEFT saves for each leaf, with a place for the layer."""
    modules = {leaf: family.names[leaf.rpartition("/")[0]] for leaf in leaves}
    # PEFT takes the whole classifier for one module.
    return {
        leaf: "classifier" if leaf.startswith("classifier/") else module
        for leaf, module in modules.items()
    }


def _require_plain_tensors(adapter: Adapter, family: Family | DecoderFamily) -> None:
    """Raises unless every module is one in PyTorch, with kernels [out, in]."""
    layout = family.layout
    leaves = [*(f"layers/{site}/kernel" for site in adapter.added), *adapter.dense]
    for leaf in leaves:
        is_odd = layout.is_upright and is_stacked(leaf) and leaf.endswith("/kernel")
        if is_odd or layout.part_of(leaf) is not None:
            raise InputError(
                f"`adapter` must be at modules that are linear maps of their own in "
                f"PyTorch to be written for PEFT, got one for `{leaf}` of a "
                f"{family.name!r}. Merge it with `merge_adapter` and write the model "
                "with `save_pretrained`."
            )


def _require_whole_modules(adapter: Adapter, model: Model) -> None:
    """Raises unless the modules that PEFT saves have been trained as a whole."""
    leaves = jax.tree.leaves(leaf_names(model.abstract()))
    saved = {*_saved_modules(adapter.dense, model.family).values()}
    for leaf, module in _saved_modules(leaves, model.family).items():
        if module in saved and leaf not in adapter.dense:
            raise InputError(
                f"`adapter` must have all parameters of `{module}` to be written for "
                f"PEFT, got some without `{leaf}`. Train the whole module, or none of "
                "it."
            )


def _module(family: Family, site: str) -> str:
    """Returns the name of the module at a site, with a place for the layer."""
    return family.names[f"layers/{site}"]

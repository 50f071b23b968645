"""Our leaves and Hugging Face tensors: names and layout."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from sparse_jax.errors import InputError
from sparse_jax.models.family import DecoderFamily, Family

__all__ = [
    "has_tensor",
    "is_stacked",
    "modules_called",
    "tensor_name",
    "with_full_names",
]

_SUFFIXES = MappingProxyType(
    {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
)
# What PyTorch puts before the names of a model that is wrapped or compiled.
_WRAPPERS = r"^(module\.|_orig_mod\.)+"


def is_stacked(leaf: str) -> bool:
    """Tells whether a leaf has the layer as leading axis.

    Example:
      >>> is_stacked("layers/mlp/up/bias"), is_stacked("pooler/bias")
      (True, False)
    """
    return leaf.startswith("layers/")


def tensor_name(family: Family | DecoderFamily, leaf: str, layer: int = 0) -> str:
    """Returns the name of the tensor that holds a leaf, or one layer of it.

    Example:
      >>> from sparse_jax.models.families.bert import BERT
      >>> tensor_name(BERT, "layers/mlp/up/kernel", 3)
      'bert.encoder.layer.3.intermediate.dense.weight'
    """
    module, _, kind = leaf.rpartition("/")
    return f"{family.names[module].format(layer)}.{_SUFFIXES[kind]}"


def has_tensor(family: Family | DecoderFamily, leaf: str, layer: int) -> bool:
    """Returns whether a layer of a leaf is in a file; what is not is all ones.

    Example:
      >>> from sparse_jax.models.families.modernbert import MODERNBERT
      >>> leaf = "layers/attention/norm/scale"
      >>> has_tensor(MODERNBERT, leaf, 0), has_tensor(MODERNBERT, leaf, 1)
      (False, True)
    """
    return layer > 0 or leaf not in family.absent


def modules_called(family: Family | DecoderFamily, pattern: str) -> list[str]:
    """Returns our names of the modules whose Hugging Face name matches a pattern.

    Example:
      >>> from sparse_jax.models.families.llama import LLAMA
      >>> modules_called(LLAMA, "layers.5.self_attn.[qk]_proj")
      ['attention/query', 'attention/key']
    """
    # All layers are one module of ours.
    pattern = re.sub(r"(?<![A-Za-z_\d])\d+(?![A-Za-z_\d])", "0", pattern)
    try:
        expression = re.compile(pattern)
    except re.error:
        return []
    return [
        module.removeprefix("layers/")
        for module, theirs in family.names.items()
        if any(expression.search(theirs.format(0) + end) for end in ("", ".weight"))
    ]


def with_full_names(
    family: Family | DecoderFamily, names: Iterable[str]
) -> Mapping[str, str]:
    """Returns a map from the names a checkpoint should have to those it has.

    A bare model has no `bert.` or `model.` before its names, one that was saved from
    inside `DistributedDataParallel` has `module.` there, and old checkpoints call the
    scale and bias of a norm `gamma` and `beta`.

    Raises:
      InputError: if two tensors have one name.

    Example:
      >>> from sparse_jax.models.families.bert import BERT
      >>> dict(with_full_names(BERT, ["embeddings.LayerNorm.gamma"]))
      {'bert.embeddings.LayerNorm.weight': 'embeddings.LayerNorm.gamma'}
    """
    full: dict[str, str] = {}
    for name in names:
        modern = _full_name(family, name)
        if modern in full:
            raise InputError(
                f"`model` must hold every tensor once, got both `{full[modern]}` and "
                f"`{name}`. Keep one of them."
            )
        full[modern] = name
    return full


def _full_name(family: Family | DecoderFamily, name: str) -> str:
    """Returns the modern name of a tensor, with its prefix."""
    name = re.sub(_WRAPPERS, "", name)
    name = re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", name))
    return f"{family.prefix}.{name}" if re.match(family.bare, name) else name

"""Our leaves and Hugging Face tensors: names and layout."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from sparse_jax.models.decoder_family import DecoderFamily
from sparse_jax.models.family import Family

__all__ = ["is_stacked", "tensor_name", "to_tensor_layout", "with_full_names"]

_SUFFIXES = MappingProxyType(
    {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
)


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
      >>> from sparse_jax.models.bert import BERT
      >>> tensor_name(BERT, "layers/mlp/up/kernel", 3)
      'bert.encoder.layer.3.intermediate.dense.weight'
    """
    module, _, kind = leaf.rpartition("/")
    return f"{family.names[module].format(layer)}.{_SUFFIXES[kind]}"


def to_tensor_layout(leaf: str, array: np.ndarray) -> np.ndarray:
    """Turns a kernel `[in, out]` to `[out, in]`; the same call turns it back.

    Example:
      >>> to_tensor_layout("pooler/kernel", np.zeros((2, 3))).shape
      (3, 2)
    """
    return array.T if leaf.endswith("/kernel") else array


def with_full_names(
    family: Family | DecoderFamily, names: Iterable[str]
) -> Mapping[str, str]:
    """Returns a map from the names a checkpoint should have to those it has.

    A bare model has no `bert.` or `model.` before its names, and old checkpoints call
    the scale and bias of a norm `gamma` and `beta`.

    Example:
      >>> from sparse_jax.models.bert import BERT
      >>> dict(with_full_names(BERT, ["embeddings.LayerNorm.gamma"]))
      {'bert.embeddings.LayerNorm.weight': 'embeddings.LayerNorm.gamma'}
    """
    full = {_full_name(family, name): name for name in names}
    words, head = (
        f"{family.names.get(module)}.weight"
        for module in ("embeddings/word", "lm_head")
    )
    # Of a table that is also the last linear map, some files hold only the latter.
    if words not in full and head in full:
        full[words] = full[head]
    return full


def _full_name(family: Family | DecoderFamily, name: str) -> str:
    """Returns the modern name of a tensor, with its prefix."""
    name = re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", name))
    return f"{family.prefix}.{name}" if re.match(family.bare, name) else name

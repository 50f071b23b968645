"""Prefixes as PEFT stores them: one row of numbers for every token of the prefix.

PEFT puts a prefix in the cache of a model, as if it were the tokens before those of a
batch: the first token has the position `length`. Here the tokens begin at 0. Where
positions are rotations, scores depend on differences only, and the keys of the prefix
are turned by `length` positions to make up for it. Where positions are added to the
word vectors or to the scores, nothing makes up for it.
"""

import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.family import GATED
from sparse_jax.models.functional import Model
from sparse_jax.models.position_embeddings import rotate, turn_of
from sparse_jax.params.fields import Json

__all__ = ["prefix_arrays", "prefix_config", "prefix_tensor"]

_log = logging.getLogger(__name__)


def prefix_tensor(parts: Mapping[str, np.ndarray], model: Model) -> np.ndarray:
    """Returns PEFT's `prompt_embeddings` (P, L * 2 * H * K) of keys and values.

    Raises:
      InputError: if the model has no rotary positions, or windows without room for the
        prefix.
    """
    length = parts["keys"].shape[1]
    _require_rotary(model, length)
    stacks = [_turned(parts["keys"], model, length), parts["values"]]
    whole = np.stack(stacks, axis=1)  # (L, 2, P, H * K)
    return np.moveaxis(whole, 2, 0).reshape(length, -1)


def prefix_arrays(tensor: np.ndarray, model: Model) -> dict[str, np.ndarray]:
    """Returns keys and values (L, P, H * K) of PEFT's `prompt_embeddings`.

    Raises:
      InputError: if the model has no rotary positions, or windows without room for the
        prefix, or the tensor is for another.
    """
    _require_rotary(model, len(tensor))
    layers, width = model.config.num_layers, _width(model.config)
    if tensor.ndim != 2 or tensor.shape[1] != 2 * layers * width:
        raise InputError(
            f"`prompt_embeddings` must have {2 * layers * width} columns for this "
            f"model, got shape {list(tensor.shape)}. Pass the base that it was trained "
            "on."
        )
    whole = tensor.astype(np.float32).reshape(len(tensor), layers, 2, width)
    keys, values = (np.array(whole[:, :, part].swapaxes(0, 1)) for part in (0, 1))
    return {"keys": _turned(keys, model, -len(tensor)), "values": values}


def prefix_config(tensor: np.ndarray, model: Model) -> dict[str, Json]:
    """Returns the fields of `adapter_config.json` for a prefix."""
    width, heads = _width(model.config), model.config.num_kv_heads
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": len(tensor),
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": model.config.num_layers,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": width,
        "prefix_projection": False,
    }


def _width(config: Any) -> int:
    """Returns the width of the keys of a layer."""
    return config.num_kv_heads * config.head_size


def _turned(keys: np.ndarray, model: Model, positions: int) -> np.ndarray:
    """Returns keys (L, P, H * K) turned by some positions."""
    config = model.config
    heads = keys.reshape(*keys.shape[:2], config.num_kv_heads, config.head_size)
    where = jnp.full((1, 1), positions, jnp.int32)
    turns = [turn_of(kind, config.turned_size, where) for kind in config.kinds]
    layers = config.layer_kinds or [0] * len(heads)
    turned = [
        rotate(jnp.asarray(one[None]), turns[kind])
        for one, kind in zip(heads, layers, strict=True)
    ]
    return np.concatenate(turned).reshape(keys.shape)


def _require_rotary(model: Model, length: int) -> None:
    """Raises unless a prefix of some length gives the outputs that it gives in PEFT."""
    parts = getattr(model.family, "parts", None)
    if model.head is not CausalLM or parts is not GATED:
        raise InputError(
            "`model` must have rotary positions for a prefix of PEFT, as Llama, got "
            f"{model.family.name!r}: PEFT counts the positions of tokens from the "
            "length of the prefix, and sparse_jax from 0. Keep it as an adapter file."
        )
    windows = [kind.sliding_window for kind in model.config.kinds]
    room = min((window - length for window in windows if window), default=None)
    if room is None:
        return
    if room < 1:
        raise InputError(
            f"`model` must have windows longer than a prefix of PEFT, {length} tokens, "
            f"got {length + room}: PEFT's windows hide the prefix, and those of "
            "sparse_jax do not. Keep it as an adapter file."
        )
    _log.warning(
        "the prefix has the outputs of PEFT for texts of at most %d tokens: from later "
        "ones, the windows of PEFT hide it", room,
    )  # fmt: skip

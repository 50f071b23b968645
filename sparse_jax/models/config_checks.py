"""What the fields of a configuration may hold, whatever file they come from."""

import dataclasses
from collections.abc import Callable
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypeGuard

from sparse_jax.errors import InputError, brief
from sparse_jax.models.activations import ACTIVATIONS

__all__ = ["MOST_LAYERS", "MOST_SIZE", "check_fields", "is_size"]

MOST_SIZE = 2**31 - 1  # what JAX counts to
MOST_LAYERS = 2**16  # some lists of transformers have an item for every layer


def is_size(value: object, most: int = MOST_SIZE) -> bool:
    """Returns whether a value counts something that is there.

    Example:
      >>> [is_size(value) for value in (1, 0, 1.0, True, "1", 2**31)]
      [True, False, False, False, False, False]
    """
    return _is_whole(value) and 1 <= value <= most


def check_fields(config: Any) -> None:
    """Raises unless every field of a configuration is what its name says.

    Fields whose default is None may be that.

    Raises:
      InputError: with the name and the value of a field.

    Example:
      >>> @dataclasses.dataclass
      ... class Config:
      ...     num_layers: int
      ...     tied: bool
      >>> check_fields(Config(num_layers=2, tied=False))
      >>> check_fields(Config(num_layers=2, tied=0))
      Traceback (most recent call last):
      sparse_jax.errors.InputError: `tied` must be true or false, got 0.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _RULES or (value is None and field.default is None):
            continue
        rule, holds = _RULES[field.name]
        if not holds(value):
            raise InputError(f"`{field.name}` must be {rule}, got {brief(value)}.")


def _is_whole(value: object) -> TypeGuard[int]:
    """Returns whether a value is an int32, which True is not meant to be."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        return False
    return -MOST_SIZE <= int(value) <= MOST_SIZE


def _is_number(value: object) -> TypeGuard[float]:
    """Returns whether a value is a number that a float32 can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return -(2.0**127) < float(value) < 2.0**127


Rule = tuple[str, Callable[[object], bool]]

_SIZE: Rule = (f"a whole number from 1 to {MOST_SIZE}", is_size)
_LAYERS: Rule = (
    f"a whole number from 1 to {MOST_LAYERS}", lambda x: is_size(x, MOST_LAYERS)
)  # fmt: skip
_COUNT: Rule = (
    f"a whole number from 0 to {MOST_SIZE}",
    lambda x: _is_whole(x) and 0 <= x <= MOST_SIZE,
)  # fmt: skip
_RATE: Rule = ("at least 0 and less than 1", lambda x: _is_number(x) and 0 <= x < 1)
_POSITIVE: Rule = ("a positive number", lambda x: _is_number(x) and x > 0)
_NUMBER: Rule = ("a number", _is_number)
_SMALL: Rule = ("a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1)
_FLAG: Rule = ("true or false", lambda x: isinstance(x, bool))
_ID: Rule = ("a whole number", _is_whole)
_IDS: Rule = (
    "whole numbers",
    lambda x: isinstance(x, tuple) and all(map(_is_whole, x)),
)
_ACTIVATION: Rule = (
    f"one of {', '.join(sorted(ACTIVATIONS))}",
    lambda x: isinstance(x, str) and x in ACTIVATIONS,
)

# field of any of our configurations -> what it must be, and whether a value is that
_RULES: MappingProxyType[str, Rule] = MappingProxyType(
    {
        "vocab_size": _SIZE,
        "hidden_size": _SIZE,
        "num_layers": _LAYERS,
        "num_heads": _SIZE,
        "num_kv_heads": _SIZE,
        "head_size": _SIZE,
        "intermediate_size": _SIZE,
        "max_positions": _SIZE,
        "num_labels": _SIZE,
        "sliding_window": _SIZE,
        "original_positions": _SIZE,
        "type_vocab_size": _COUNT,
        "position_offset": _COUNT,
        "rotary_size": _COUNT,
        "hidden_dropout": _RATE,
        "attention_dropout": _RATE,
        "classifier_dropout": _RATE,
        "embedding_dropout": _RATE,
        "output_dropout": _RATE,
        "layer_norm_eps": _SMALL,
        "norm_eps": _SMALL,
        "initializer_range": _SMALL,
        "rope_theta": _POSITIVE,
        "query_pre_attn_scalar": _POSITIVE,
        "attention_softcap": _POSITIVE,
        "logit_softcap": _POSITIVE,
        "factor": _POSITIVE,
        "low": _POSITIVE,
        "high": _POSITIVE,
        "norm_offset": _NUMBER,
        "tied": _FLAG,
        "attention_bias": _FLAG,
        "qkv_bias": _FLAG,
        "output_bias": _FLAG,
        "mlp_bias": _FLAG,
        "norm_bias": _FLAG,
        "head_bias": _FLAG,
        "norms_heads": _FLAG,
        "scales_words": _FLAG,
        "has_post_norms": _FLAG,
        "pad_id": _ID,
        "bos_id": _ID,
        "eos_ids": _IDS,
        "layer_kinds": _IDS,
        "hidden_act": _ACTIVATION,
        "head_act": _ACTIVATION,
        "pooling": ("cls or mean", lambda x: x in ("cls", "mean")),
    }
)

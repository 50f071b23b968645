"""What one family of encoders does in its own way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.layout import PLAIN, Layout

__all__ = ["Create", "Family"]

Create = Callable[[EncoderConfig, nnx.Rngs], Any]


# Families are compared by identity, which also makes them hashable.
@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """The differences between two encoders of the same layers."""

    name: str  # `model_type` in a Hugging Face configuration
    prefix: str  # what a bare model's tensors lack in front
    position_offset: Callable[[int], int]  # unused rows of the table, from the pad id
    position_ids: Callable[[jax.Array, int], jax.Array]  # input ids, pad id -> [B, T]
    pooler: Create | None  # linear map of the first token, under tanh
    classifier: Create  # called as `classifier(pooled, key=key)`
    lm_activation: str | None  # None is the activation of the layers
    architectures: Mapping[str, str]  # our module -> Hugging Face class
    names: Mapping[str, str]  # our module path -> Hugging Face module path
    layout: Layout = PLAIN
    bare: str = r"(embeddings|encoder|pooler)\."  # how names without a prefix begin

"""What a decoder is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

__all__ = ["Parts"]

Create = Callable[[Any, nnx.Rngs], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Functions that create the parts of a decoder from its configuration."""

    # Module called as (input_ids, positions, key), with the table `word`.
    embeddings: Create
    layer: Create  # module with the methods that `run_layers` and its sibling call
    norm: Create  # of the last hidden states
    # What layers know of where tokens are, from the configuration and the positions of
    # queries `[B, T]` and of keys `[B, S]`.
    place: Callable[[Any, jax.Array, jax.Array], Any]
    has_head_bias: bool = False  # of a head that is not tied

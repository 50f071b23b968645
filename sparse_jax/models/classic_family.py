"""What one family of decoders with layer norms does in its own way."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sparse_jax.models.decoder_family import DecoderFamily

__all__ = ["ClassicFamily", "mlp_size"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassicFamily(DecoderFamily):
    """The differences between two decoders that share a `ClassicConfig`."""

    # Fields of a Hugging Face configuration that must have these values.
    required: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    prefix: str = "transformer"


def mlp_size(theirs: Any) -> int:
    """Returns the hidden size of the MLP, four times that of the model if not given."""
    return 4 * theirs.n_embd if theirs.n_inner is None else theirs.n_inner

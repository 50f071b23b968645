"""What one family of decoders with layer norms does in its own way."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sparse_jax.models.decoder_family import DecoderFamily

__all__ = ["ClassicFamily"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassicFamily(DecoderFamily):
    """The differences between two decoders that share a `ClassicConfig`."""

    # Fields of a Hugging Face configuration that must have these values.
    required: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    prefix: str = "transformer"

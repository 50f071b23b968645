"""GPT-J: rotary positions in a part of every head, attention and MLP side by side.

References:
  Wang and Komatsuzaki, 2021. https://github.com/kingoflolz/mesh-transformer-jax
"""

from functools import partial
from types import MappingProxyType
from typing import Any

import jax

from sparse_jax.errors import InputError
from sparse_jax.models.classic_decoder import (
    ClassicEmbeddings,
    ClassicLayer,
    PositionInfo,
)
from sparse_jax.models.config import ClassicConfig, LayerKind
from sparse_jax.models.family import (
    ClassicFamily,
    Parts,
    gpt_fields,
    heads_of,
    their_gpt_fields,
)
from sparse_jax.models.modules import layer_norm
from sparse_jax.models.position_embeddings import angles, base_frequencies

__all__ = ["GPTJ"]


def _position_info(
    config: ClassicConfig, kind: LayerKind, positions: jax.Array, seen: jax.Array
) -> PositionInfo:
    """Returns the angles of the tokens."""
    del kind, seen
    return PositionInfo(
        turn=angles(positions, base_frequencies(config.rotary_size, 10000.0))
    )


def _rotary_size(theirs: Any) -> int:
    """Returns how many entries of every head are turned."""
    if theirs.rotary_dim == 0:
        raise InputError(
            "`rotary_dim` must be positive, or null for whole heads, got 0."
        )
    return theirs.rotary_dim or theirs.n_embd // theirs.n_head


GPTJ = ClassicFamily(
    name="gptj",
    parts=Parts(
        embeddings=ClassicEmbeddings,
        layer=partial(ClassicLayer, is_parallel=True),
        norm=layer_norm,
        position_info=_position_info,
        has_head_bias=True,
    ),
    # A tied head would have a bias and no kernel.
    required=MappingProxyType({"tie_word_embeddings": False}),
    fields=lambda theirs: {
        **gpt_fields(theirs),
        "attention_bias": False,
        "rotary_size": _rotary_size(theirs),
    },
    their_fields=lambda config: {
        **their_gpt_fields(config),
        "rotary_dim": config.rotary_size,
    },
    architectures=heads_of("GPTJ"),
    names=MappingProxyType(
        {
            "embeddings/word": "transformer.wte",
            "layers/attention/norm": "transformer.h.{}.ln_1",
            "layers/attention/query": "transformer.h.{}.attn.q_proj",
            "layers/attention/key": "transformer.h.{}.attn.k_proj",
            "layers/attention/value": "transformer.h.{}.attn.v_proj",
            "layers/attention/output": "transformer.h.{}.attn.out_proj",
            "layers/mlp/up": "transformer.h.{}.mlp.fc_in",
            "layers/mlp/down": "transformer.h.{}.mlp.fc_out",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
            "classifier": "score",
        }
    ),
    bare=r"(wte|h|ln_f)\.",
)

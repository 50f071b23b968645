"""GPT-2: learned positions, layer norms before attention and MLP.

References:
  Radford et al., 2019. Language Models are Unsupervised Multitask Learners.
"""

from functools import partial
from types import MappingProxyType

from sparse_jax.models.classic_decoder import (
    ClassicEmbeddings,
    ClassicLayer,
    PositionInfo,
)
from sparse_jax.models.family import (
    FUSED,
    ClassicFamily,
    Layout,
    Parts,
    gpt_fields,
    heads_of,
    their_gpt_fields,
)
from sparse_jax.models.modules import layer_norm

__all__ = ["GPT2"]

GPT2 = ClassicFamily(
    name="gpt2",
    parts=Parts(
        embeddings=partial(ClassicEmbeddings, has_positions=True),
        layer=ClassicLayer,
        norm=layer_norm,
        position_info=lambda config, kind, positions, seen: PositionInfo(),
    ),
    # Its linear maps are PyTorch's `Conv1D`, and the first makes all three of these.
    layout=Layout(is_upright=True, fused=(FUSED,)),
    required=MappingProxyType(
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        }
    ),
    fields=gpt_fields,
    their_fields=their_gpt_fields,
    architectures=heads_of("GPT2", "GPT2LMHeadModel"),
    names=MappingProxyType(
        {
            "embeddings/word": "transformer.wte",
            "embeddings/position": "transformer.wpe",
            "layers/attention/norm": "transformer.h.{}.ln_1",
            "layers/attention/query": "transformer.h.{}.attn.c_attn",
            "layers/attention/key": "transformer.h.{}.attn.c_attn",
            "layers/attention/value": "transformer.h.{}.attn.c_attn",
            "layers/attention/output": "transformer.h.{}.attn.c_proj",
            "layers/mlp/norm": "transformer.h.{}.ln_2",
            "layers/mlp/up": "transformer.h.{}.mlp.c_fc",
            "layers/mlp/down": "transformer.h.{}.mlp.c_proj",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
            "classifier": "score",
        }
    ),
    bare=r"(wte|wpe|h|ln_f)\.",
)

"""Tiny random encoders, in PyTorch and in JAX, for the tests of the models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.models.config import EncoderConfig, LayerKind
from sparse_jax.models.families.bert import BERT, CAMEMBERT, ROBERTA, XLM_ROBERTA
from sparse_jax.models.families.distilbert import DISTILBERT
from sparse_jax.models.families.modernbert import MODERNBERT
from sparse_jax.models.functional import Model
from sparse_jax.params.names import map_named

FAMILIES = {
    family.name: family
    for family in (BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, MODERNBERT)
}
PAD_IDS = {
    "bert": 0, "roberta": 1, "xlm-roberta": 1, "camembert": 1, "distilbert": 0,
    "modernbert": 0,
}  # fmt: skip
NO_BIASES = dict.fromkeys(
    ("attention_bias", "mlp_bias", "norm_bias", "head_bias"), False
)
# What a family has beside the sizes, in our configuration and in that of transformers.
OURS = {
    "modernbert": {
        "kinds": (
            LayerKind(rope_theta=160000.0),
            LayerKind(rope_theta=10000.0, sliding_window=2),
        ),
        "layer_kinds": (0, 1),
        "head_act": "gelu",
        **NO_BIASES,
    }
}
THEIRS = {"modernbert": {"local_attention": 4, "classifier_pooling": "mean"}}


def tiny_config(name, **changes):
    """Returns our configuration of a two-layer encoder."""
    pad_id = PAD_IDS[name]
    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 48,
        "max_positions": 20,
        "position_offset": FAMILIES[name].position_offset(pad_id),
        "pad_id": pad_id,
        "num_labels": 3,
        **FAMILIES[name].constants,
        **OURS.get(name, {}),
    }
    return EncoderConfig(**{**fields, **changes})


def tiny_params(name, head):
    """Returns parameters of the tiny encoder, none of which is zero or one."""
    # A copy of the dictionaries, so that a test may replace leaves in them.
    return jax.tree.map(lambda leaf: leaf, _drawn(name, head))


@functools.cache
def _drawn(name, head):
    """Draws the parameters once, without compiling an initializer."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)
    params = jax.tree.map(
        draw, Model(head, FAMILIES[name], tiny_config(name)).abstract()
    )
    is_scale = lambda leaf: leaf.endswith("/scale")
    return map_named(lambda n, leaf: leaf + 1 if is_scale(n) else leaf, params)


def hugging_face_config(name, **changes):
    """Returns the transformers configuration of the same encoder."""
    from transformers import AutoConfig

    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 20 + FAMILIES[name].position_offset(PAD_IDS[name]),
        "pad_token_id": PAD_IDS[name],
        "num_labels": 3,
    }
    renamed = FAMILIES[name].renamed
    fields = {**fields, **THEIRS.get(name, {}), **changes}
    fields = {renamed.get(key, key): x for key, x in fields.items()}
    return AutoConfig.for_model(name, **fields)


def hugging_face_model(auto_class, config):
    """Returns a PyTorch model none of whose parameters is zero or one."""
    import torch

    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch(name, lengths=(9, 4, 7)):
    """Returns a numpy batch of random sentences with padding and two token types."""
    rng = np.random.default_rng(0)
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int32)
    ids = rng.integers(4, 50, shape, dtype=np.int32)
    types = rng.integers(0, 2, shape, dtype=np.int32)
    batch = {
        "input_ids": np.where(mask, ids, PAD_IDS[name]).astype(np.int32),
        "attention_mask": mask,
    }
    if "type_vocab_size" in FAMILIES[name].constants:
        return batch
    return {**batch, "token_type_ids": types * mask}


def torch_output(model, batch):
    """Returns what a PyTorch model gives for a numpy batch."""
    import torch

    with torch.no_grad():
        return model(**{name: torch.tensor(x).long() for name, x in batch.items()})


def jax_batch(batch):
    """Returns a batch of JAX arrays."""
    return {name: jnp.asarray(x) for name, x in batch.items()}

"""Tiny random decoders in PyTorch, and batches for them and for ours."""

import jax.numpy as jnp
import numpy as np


def random_model(family, fields, folder, head="CausalLM"):
    """Writes a PyTorch model without a parameter that is zero or one, returns it."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            if leaf.ndim == 1:
                leaf.add_(0.1 * torch.randn_like(leaf))
    model.save_pretrained(folder)
    return model


def torch_logits(model, ids, mask):
    """Returns the logits of a PyTorch model, positions counted from the first token."""
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    # BLOOM counts them itself.
    counts = model.config.model_type == "bloom"
    options = {} if counts else {"position_ids": torch.tensor(positions)}
    with torch.no_grad():
        return model(
            torch.tensor(ids), attention_mask=torch.tensor(mask), **options
        ).logits.numpy()


def padded(side):
    """Returns ids and a mask of 11, 7 and 4 tokens."""
    ids = np.random.default_rng(1).integers(3, 61, (3, 11))
    mask = np.zeros((3, 11), np.int64)
    for row, length in enumerate((11, 7, 4)):
        mask[row, slice(0, length) if side == "right" else slice(11 - length, 11)] = 1
    return np.where(mask, ids, 0), mask


def batch_of(ids, mask):
    """Returns a batch of ours."""
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "attention_mask": jnp.asarray(mask, jnp.int32),
    }

"""SIFT inside google-tunix: its `PeftTrainer` takes `sift` as the optimizer.

    pip install google-tunix  # Python 3.12
    python -m experiments.examples.tunix_trainer

A small Llama 3 of tunix learns to count. Prints the loss before and after, and the
bytes of optimizer state beside those of AdamW on all parameters.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_jax import sift


def state_bytes(tx: optax.GradientTransformation, model: nnx.Module) -> int:
    """Returns the bytes of an optimizer's state for a model."""
    state = jax.eval_shape(tx.init, nnx.state(model, nnx.Param))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def make_model(llama: Any) -> nnx.Module:
    """Returns a random Llama; that of tunix starts with feed-forward layers of zero."""
    config = llama.ModelConfig(
        num_layers=2, vocab_size=64, embed_dim=64, hidden_dim=256, num_heads=4,
        head_dim=16, num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
    )  # fmt: skip
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 6))
    for layer in model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            kernel = linear.kernel[...]
            linear.kernel[...] = 0.1 * jax.random.normal(next(keys), kernel.shape)
    return model


def main() -> tuple[float, float]:
    """Fine-tunes the model and returns the loss before and after."""
    # Imported here, so that the module can be read where tunix is not installed.
    from tunix.models.llama3 import model as llama  # pyright: ignore
    from tunix.sft import peft_trainer, utils  # pyright: ignore

    model = make_model(llama)
    starts = jax.random.randint(jax.random.key(0), (16, 1), 0, 64)
    tokens = (starts + jnp.arange(24)) % 64
    mask = jnp.ones_like(tokens, bool)
    batch = {
        "input_tokens": tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }

    adamw = optax.adamw(1e-2)
    # 5 % of the entries of every projection; embeddings and norms stay as they are.
    tx = sift(adamw, density=0.05, where=r"^layers/\d+/(attn|mlp)/", dense="lm_head")
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=100)
    trainer = peft_trainer.PeftTrainer(model, tx, config)
    losses = []
    _, evaluate = trainer.jit_train_and_eval_step()
    losses.append(float(evaluate(batch)[0]))
    trainer.train([batch] * 100)
    losses.append(float(evaluate(batch)[0]))
    trainer.close()

    print(f"loss {losses[0]:.3f} -> {losses[1]:.3f}")
    print(f"optimizer state {state_bytes(tx, model):,} bytes, ", end="")
    print(f"AdamW on all parameters {state_bytes(adamw, model):,}")
    return losses[0], losses[1]


if __name__ == "__main__":
    main()

"""The compact tier: `Compact` with a loss of your own.

    python -m experiments.examples.compact_loss

The gradients, the optimizer state and the updates have one number for each trained
entry. The dense gradient of a weight exists only while its entries are read from it.
"""

import jax
import jax.numpy as jnp
import optax

from sparse_jax import Compact, Sparse


def loss_fn(params: dict, batch: tuple, key: jax.Array, attachment: object) -> tuple:
    """Returns the sum of the losses, and the number to divide it by."""
    x, y = batch
    # Models that run their layers in one stack pass the attachment on to it. With
    # `stack=None` every weight is wrapped where it is, and nobody needs to.
    del key, attachment
    hidden = jnp.tanh(x @ params["up"])
    return jnp.sum((hidden @ params["down"] - y) ** 2), len(y)


def main() -> tuple[float, float]:
    """Fine-tunes two matrices and returns the loss before and after."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (8, 256)) / 8**0.5,
        "down": jax.random.normal(keys[1], (256,)) / 256**0.5,
    }
    x = jax.random.normal(keys[2], (64, 8))
    batch = x, jnp.sin(x.sum(axis=1))

    method = Sparse(density=0.02, where="up", dense="down", stack=None)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    tuner = Compact(loss_fn, method, tx)
    key = jax.random.key(1)
    state = tuner.init(params, key)
    state, finite = tuner.select(state, batch, key)  # one backward pass
    assert finite, "the gradient of the first batch is not finite: try another"
    step = jax.jit(tuner.step, donate_argnums=0)  # updates the weights in place

    losses = []
    for _ in range(100):
        key, dropout_key = jax.random.split(key)
        state, metrics = step(state, batch, dropout_key)
        losses.append(float(metrics["loss"]))

    support = state.support["up"]  # positions in the flat array, sorted
    moments = optax.tree.get(state.opt_state, "mu")["leaves"]["up"]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(
        f"{support.size} of {params['up'].size} entries; Adam's mu is {moments.shape}"
    )
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

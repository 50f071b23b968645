"""The Optax tier: `sift` in a plain loop, on an NNX model of your own.

    python -m experiments.examples.nnx_model

`sift` wraps any Optax optimizer. It needs nothing from the model but a pytree of
parameters, whose leaves it names by their path: `layers/0/kernel`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_jax import sift


class Net(nnx.Module):
    """A small network, which stands for a pre-trained one."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 256, rngs=rngs)
        self.down = nnx.Linear(256, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns one prediction for each row of `x`."""
        return self.down(nnx.gelu(self.up(x)))[:, 0]


def main() -> tuple[float, float]:
    """Fine-tunes the network and returns the loss before and after."""
    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = jnp.sin(x.sum(axis=1))

    # 1 % of the entries of `up` and `down`; both biases in full; nothing else.
    tx = sift(optax.adamw(1e-2), density=0.01, where="kernel", dense="bias")
    state = tx.init(params)

    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

    @jax.jit
    def step(params: Any, state: Any) -> tuple:
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    before = params
    losses = []
    for _ in range(100):
        params, state, loss = step(params, state)
        losses.append(float(loss))

    moved = int(jnp.sum(params["up"]["kernel"][...] != before["up"]["kernel"][...]))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"{moved} of {params['up']['kernel'].size} entries of `up` have moved")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

"""`flax.nnx.Optimizer` takes `sift` like any other Optax optimizer.

    python -m experiments.examples.nnx_optimizer

Prints the bytes of optimizer state beside those of AdamW on all parameters.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.examples.nnx_model import Net
from sparse_jax import sift


def state_bytes(optimizer: nnx.Optimizer) -> int:
    """Returns the bytes of an optimizer's state: moments, positions and counts."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(optimizer)))


def main() -> tuple[float, float]:
    """Fine-tunes the network and returns the loss before and after."""
    model = Net(nnx.Rngs(0))
    full = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    tx = sift(optax.adamw(1e-2), density=0.01, where="kernel", dense="bias")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = jnp.sin(x.sum(axis=1))

    @nnx.jit
    def step(model: Net, optimizer: nnx.Optimizer) -> jax.Array:
        loss_fn = lambda model: jnp.mean((model(x) - y) ** 2)
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(100)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"optimizer state {state_bytes(optimizer):,} bytes, ", end="")
    print(f"AdamW on all parameters {state_bytes(full):,}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

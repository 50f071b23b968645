"""The Optax tier on a Linen model: `ist` trains two of eight layers at a time.

    python -m experiments.examples.linen_model

The layers are one stack, made by `nn.scan`: the first axis of their parameters counts
them. With separate modules (`layers_0`, `layers_1`, ...) only the expression changes:
`layer_of=r"layers_(\\d+)/"` reads the number of the layer from the name of the leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from sparse_jax import ist, ist_value_fn


class Block(nn.Module):
    """One residual layer."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Returns the next `x`, as `nn.scan` asks for it."""
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.LayerNorm()(x))), None


class Net(nn.Module):
    """Eight layers and a head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns one prediction for each row of `x`."""
        layers = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=8
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(1, name="head")(x)[:, 0]


def main() -> tuple[float, float]:
    """Fine-tunes the network and returns the loss before and after."""
    x = jax.random.normal(jax.random.key(0), (64, 16))
    y = jnp.sin(x.sum(axis=1))
    model = Net()
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        predicted: Any = model.apply({"params": params}, x)
        return jnp.mean((predicted - y) ** 2)

    key = jax.random.key(2)
    which = {"layer_of": "^layers/", "num_layers": 8}
    tx = ist(optax.adamw(1e-2), num_active=2, probe_every=5, key=key, **which)
    # Probes measure the loss with a layer's progress since `params` damped.
    value_fn = ist_value_fn(loss_fn, params, layer_of="^layers/")
    state: Any = tx.init(params)  # an `IstState`

    @jax.jit
    def step(params: Any, state: Any) -> tuple:
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        probe = value_fn(params, x, y)
        updates, state = tx.update(grads, state, params, value_fn=probe)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))

    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"active now: layers {state.sampler.active.tolist()} of 8")
    importance = [round(float(x), 3) for x in state.sampler.memory.importance]
    print(f"importance: {importance}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

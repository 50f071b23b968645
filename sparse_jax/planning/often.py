"""How often an update runs what depends on its data: sampled layers, and probes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.samplers.sampler import Sampler

__all__ = ["ALWAYS", "Often", "often_of"]

# Draws that are averaged over.
_TURNS = 64


class Often(NamedTuple):
    """Means over the updates of a run."""

    layers: float = 1.0  # that the backward pass comes to
    trained: float = 1.0  # share of these that are trained
    probes: float = 1.0  # of an update


ALWAYS = Often()


def often_of(sampler: Sampler | None, seed: int = 0) -> Often:
    """Returns how often an update runs what a sampler decides, before it has learned.

    The backward pass ends at the lowest active layer.

    Example:
      >>> from sparse_jax import Static
      >>> often_of(Static.of(2, 3, num_layers=4))
      Often(layers=2.0, trained=1.0, probes=0.0)
    """
    if sampler is None:
        return ALWAYS
    memory, key = sampler.start(), jax.random.key(seed)
    first = lambda turn: sampler.draw(memory, key, turn).min()
    lowest = float(jax.lax.map(first, jnp.arange(_TURNS)).mean())
    layers = sampler.num_layers - lowest
    probes = 0.0 if sampler.period is None else 1 / sampler.period
    return Often(layers, sampler.num_active / layers, probes)

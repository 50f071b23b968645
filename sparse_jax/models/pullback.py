"""Pullbacks taken apart, so that what a backward pass needs can be kept anywhere."""

from collections.abc import Callable
from typing import Any

import jax

from sparse_jax.models.attachment import Arrays

__all__ = ["Pull", "Pullback"]

Pull = Callable[[jax.Array], tuple[Any, ...]]


class Pullback:
    """The pullback of a layer as `jax.vjp` returns it, without its arrays.

    Those that the layer was given, such as its weights, can be had again.

    Example:
      >>> import jax.numpy as jnp
      >>> w, x = jnp.float32(3.0), jnp.float32(2.0)
      >>> y, vjp = jax.vjp(lambda x: w * x, x)
      >>> pullback = Pullback(vjp, [w])
      >>> pullback.residuals(vjp)
      []
      >>> pullback.rebuild([], [w])(jnp.float32(1.0))
      (Array(3., dtype=float32),)
    """

    def __init__(self, vjp: Pull, inputs: Arrays):
        leaves, self.treedef = jax.tree.flatten(vjp)
        found = list(enumerate(jax.tree.leaves(inputs)))
        self.sources = [
            next((i for i, one in found if one is leaf), None) for leaf in leaves
        ]

    def residuals(self, vjp: Pull) -> list[jax.Array]:
        """Returns the arrays that have to be kept."""
        leaves = zip(jax.tree.leaves(vjp), self.sources, strict=True)
        return [leaf for leaf, source in leaves if source is None]

    def rebuild(self, residuals: list[jax.Array], inputs: Arrays) -> Pull:
        """Returns the pullback from what was kept and what the layer was given."""
        had, kept = jax.tree.leaves(inputs), iter(residuals)
        leaves = [
            next(kept) if source is None else had[source] for source in self.sources
        ]
        return jax.tree.unflatten(self.treedef, leaves)

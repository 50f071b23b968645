"""Counts: trained parameters as the paper counts them, and the optimizer's bytes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sparse_jax.compact.compact import CompactState
from sparse_jax.methods.method import Method
from sparse_jax.params.names import first_match
from sparse_jax.supports.roles import FROZEN, SPARSE, Role, map_roles

__all__ = ["Counts", "count_trained", "optimizer_bytes"]


class Counts(NamedTuple):
    """Numbers of parameters."""

    trained: int
    trained_without_head: int  # as tables in papers give it
    total: int  # of the model with its head


def count_trained(
    method: Method, params: Any, added: Any, head: Sequence[str]
) -> Counts:
    """Counts what a method trains.

    Args:
      method: the method.
      params: parameters, or their shapes.
      added: arrays that the method adds, or their shapes.
      head: rules of the leaves that belong to the head.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparse_jax.methods.sparse import Sparse
      >>> params = {"w": jnp.zeros((10, 10)), "classifier": jnp.zeros(7)}
      >>> method = Sparse(density=0.05, dense="classifier", stack=None)
      >>> count_trained(method, params, {}, head=["^classifier"])
      Counts(trained=12, trained_without_head=5, total=107)
    """
    extra = sum(leaf.size for leaf in jax.tree.leaves(added))
    sizes = {True: 0, False: extra}

    def add(role: Role, leaf: Any) -> None:
        is_head = first_match({"head": head}, role.name, "") == "head"
        sizes[is_head] += _trained_size(method, role, leaf)

    map_roles(add, method.roles(params), params)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Counts(sizes[True] + sizes[False], sizes[False], total)


def optimizer_bytes(state: CompactState) -> int:
    """Returns the bytes kept for training beside the model and what it adds.

    These are the optimizer's state, float32 masters, and supports.
    """
    kept = (state.opt_state, state.masters, state.support)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(kept))


def _trained_size(method: Method, role: Role, leaf: Any) -> int:
    """Returns the trained entries of a leaf."""
    if role.kind == FROZEN:
        return 0
    if role.kind == SPARSE:
        return math.prod(role.packed_shape(leaf.shape, method.support_size(role)))
    return leaf.size

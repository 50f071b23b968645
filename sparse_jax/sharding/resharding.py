"""Moving a state from the mesh that wrote it to another."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sparse_jax.compact.compact import CompactState
from sparse_jax.params.names import leaf_names
from sparse_jax.supports.layout import Shards
from sparse_jax.supports.roles import SPARSE, Role, map_roles

__all__ = ["moved"]


def moved(
    state: CompactState,
    roles: Any,
    params: Any,
    old: Mapping[str, Shards],
    new: Mapping[str, Shards],
) -> CompactState:
    """Returns a state on the host with its supports sharded in another way.

    Packed values, masters and what the optimizer keeps move with the entries that they
    belong to.

    Args:
      state: arrays of the host, with packed values for parameters.
      roles: of all leaves in one piece.
      params: the whole leaves, or their shapes.
      old: how leaves were sharded, by name; those that were not are left out.
      new: how they are to be sharded.
    """
    supports: dict[str, np.ndarray] = {}
    note = lambda role, support: supports.update({role.name: support})
    map_roles(note, roles, state.support, only=(SPARSE,))
    rest = state._replace(support=())
    leaves, tree = jax.tree.flatten(rest)
    owners = [
        _owner(path, np.shape(leaf), supports)
        for path, leaf in zip(jax.tree.leaves(leaf_names(rest)), leaves, strict=True)
    ]

    def move(role: Role, support: np.ndarray, leaf: Any) -> np.ndarray:
        before, after = (role.layout.sharded(way.get(role.name)) for way in (old, new))
        if before == after:
            return support
        places = [i for i, owner in enumerate(owners) if owner == role.name]
        packed = [leaves[i] for i in places]
        whole = before.to_positions(support, leaf.shape, *packed)
        found = after.from_positions(whole[0], leaf.shape, *whole[1:])
        for i, leaf in zip(places, found[1:], strict=True):
            leaves[i] = leaf
        return found[0]

    support = map_roles(move, roles, state.support, params, only=(SPARSE,))
    return jax.tree.unflatten(tree, leaves)._replace(support=support)


def _owner(path: str, shape: tuple[int, ...], supports: Mapping[str, Any]) -> str:
    """Returns the leaf that a packed array belongs to, "" for other arrays."""
    parts = path.split("/")
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        if name in supports:
            return name if supports[name].shape == shape else ""
    return ""

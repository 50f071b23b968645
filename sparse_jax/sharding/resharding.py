"""Moving: a state that one mesh wrote, in the tables of another."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sparse_jax.compact.compact import CompactState
from sparse_jax.params.names import leaf_names
from sparse_jax.supports.lanes import LaneSupport
from sparse_jax.supports.positions import canonical, tables_of
from sparse_jax.supports.sharded import Cut, LocalSupport, map_supports

__all__ = ["moved"]


def moved(
    state: CompactState,
    shapes: Mapping[str, tuple[int, ...]],
    old: Mapping[str, Cut],
    new: Mapping[str, Cut],
) -> CompactState:
    """Returns a state on the host with its supports cut in another way.

    Packed values, masters and what the optimiser keeps move with the positions that
    they belong to.

    Args:
      state: arrays of the host; the kind of its supports says nothing, `old` does.
      shapes: of the whole leaves, by name.
      old: how leaves were cut, by name; leaves that were not are left out.
      new: how they are to be cut.
    """
    supports: dict[str, Any] = {}

    def note(name: str, node: Any) -> None:
        # Lanes are the same on every mesh.
        if isinstance(node, LaneSupport):
            return
        positions = node.positions if isinstance(node, LocalSupport) else node
        cut = old.get(name)
        supports[name] = LocalSupport(positions, cut) if cut else positions

    map_supports(note, state.support)
    rest = state._replace(support=())
    leaves, tree = jax.tree.flatten(rest)
    owners = [
        _owner(path, np.shape(leaf), supports)
        for path, leaf in zip(jax.tree.leaves(leaf_names(rest)), leaves, strict=True)
    ]
    found: dict[str, np.ndarray] = {}
    for name, support in supports.items():
        places = [i for i, owner in enumerate(owners) if owner == name]
        packed = [leaves[i] for i in places]
        whole = canonical(support, shapes[name], *packed)
        if name in new:
            whole = tables_of(whole[0], new[name], shapes[name], *whole[1:])
        found[name], *packed = whole
        for i, leaf in zip(places, packed, strict=True):
            leaves[i] = leaf

    def support_of(name: str, node: Any) -> Any:
        if isinstance(node, LaneSupport):
            return node
        positions: Any = found[name]
        return LocalSupport(positions, new[name]) if name in new else positions

    moved = jax.tree.unflatten(tree, leaves)
    return moved._replace(support=map_supports(support_of, state.support))


def _owner(path: str, shape: tuple[int, ...], supports: Mapping[str, Any]) -> str:
    """Returns the leaf that a packed array belongs to, "" for other arrays."""
    parts = path.split("/")
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        if name in supports:
            return name if supports[name].shape == shape else ""
    return ""

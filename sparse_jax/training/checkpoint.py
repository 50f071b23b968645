"""Checkpoints of a run: what the base model does not already hold."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.compact import Compact, CompactState
from sparse_jax.packing import current_values, keep_masters
from sparse_jax.roles import FROZEN, SPARSE, TRAINED, Role, map_roles
from sparse_jax.support import scatter

__all__ = ["Checkpoints", "Position"]

_KEEP = 2


class Position(NamedTuple):
    """Where a run stands between two batches."""

    batches: int = 0  # used so far
    skipped: int = 0  # of these, because their gradient was not finite
    is_selected: bool = False  # whether the supports are chosen


class Checkpoints:
    """The checkpoints in a folder, of which the last two are kept.

    One holds trained values, supports and the optimiser's state: O(k), not the model.
    """

    def __init__(self, folder: Path, tuner: Compact):
        # Orbax takes seconds to import, so it is imported where it is used.
        import orbax.checkpoint as ocp

        # It reports every file that it writes.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._ocp, self._tuner = ocp, tuner
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEEP, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: CompactState, position: Position) -> None:
        """Writes the state between two batches, whole or not at all."""
        leaves = jax.tree.leaves(_trained(self._tuner, state))
        args = self._ocp.args.Composite(
            trained=self._ocp.args.StandardSave(_numbered(leaves)),
            position=self._ocp.args.JsonSave(position._asdict()),
        )
        self._manager.save(position.batches, args=args)

    def restore(self, state: CompactState) -> tuple[CompactState, Position]:
        """Returns the newest checkpoint on the parameters of a fresh state.

        Args:
          state: as `Compact.init` returns it for the base model; returned as it is
            if there is no checkpoint.
        """
        newest = self._manager.latest_step()
        if newest is None:
            return state, Position()
        like = _trained(self._tuner, state)
        leaves = _numbered(jax.tree.leaves(like))
        args = self._ocp.args.Composite(
            trained=self._ocp.args.StandardRestore(leaves),
            position=self._ocp.args.JsonRestore(),
        )
        found = self._manager.restore(newest, args=args)
        ordered = [found["trained"][name] for name in leaves]
        trained = jax.tree.unflatten(jax.tree.structure(like), ordered)
        return _rebuilt(self._tuner, state, trained), Position(**found["position"])

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    """Returns leaves by their place, which Orbax stores whatever tree they are in."""
    return {str(index): leaf for index, leaf in enumerate(leaves)}


def _trained(tuner: Compact, state: CompactState) -> CompactState:
    """Returns the state with its parameters reduced to the trained values, float32."""
    roles = tuner.method.roles(state.params)
    values = current_values(roles, state.support, state.masters, state.params)
    return state._replace(params=values, masters=())


def _rebuilt(tuner: Compact, state: CompactState, trained: CompactState) -> Any:
    """Returns the state whose reduced form is `trained`."""
    roles = tuner.method.roles(state.params)
    values: Any = trained.params

    def write(role: Role, leaf: jax.Array, support: Any, values: Any) -> jax.Array:
        if role.kind == FROZEN:
            return leaf
        if role.kind == SPARSE:
            return scatter(leaf, support, values)
        # A copy, because the step gives away what it gets.
        return jnp.array(values, leaf.dtype)

    params = map_roles(write, roles, state.params, trained.support, values)
    only = {"only": TRAINED}
    masters = keep_masters(
        roles, map_roles(lambda _, v: v, roles, values, **only), params
    )
    return trained._replace(params=params, masters=masters)

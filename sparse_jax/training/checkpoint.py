"""Checkpoints of a run: what the base model does not already hold."""

import logging
import textwrap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.compact import Compact, CompactState
from sparse_jax.errors import InputError
from sparse_jax.local_support import Cut
from sparse_jax.names import leaf_names
from sparse_jax.packing import current_values, keep_masters
from sparse_jax.roles import FROZEN, SPARSE, TRAINED, Role, map_roles
from sparse_jax.sharding.devices import Devices
from sparse_jax.sharding.moving import moved
from sparse_jax.support import scatter

__all__ = ["Checkpoints", "Position"]

_log = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where a run stands between two batches."""

    batches: int = 0  # used so far
    skipped: int = 0  # of these, because their gradient was not finite
    is_selected: bool = False  # whether the supports are chosen


class Checkpoints:
    """The checkpoints in a folder, of which the newest are kept.

    One holds trained values, supports and the optimiser's state: O(k), not the model.
    Files are written while training goes on, under a temporary name and then moved. A
    checkpoint may be read by a run on another mesh.

    Args:
      folder: where they are.
      tuner: made the states.
      devices: where states lie.
      keep: how many to keep; the one before the newest serves if that is damaged.
    """

    def __init__(self, folder: Path, tuner: Compact, devices: Devices, keep: int = 2):
        # Orbax takes seconds to import, so it is imported where it is used.
        import orbax.checkpoint as ocp

        # It reports every file that it writes.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._ocp, self._tuner, self._devices = ocp, tuner, devices
        self._folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        # Compiled, because on a mesh every operation by itself is a program to compile.
        self._copied = jax.jit(lambda s: jax.tree.map(jnp.copy, self._trained(s)))

    def save(self, state: CompactState, position: Position) -> None:
        """Begins to write the state between two batches, whole or not at all.

        A checkpoint that cannot be written is reported, and the run goes on: the one
        before stays as it is.
        """
        # The next step overwrites the arrays of the state: these are copies.
        leaves = jax.tree.leaves(self._copied(state))
        stored = {str(i): _plain(leaf) for i, leaf in enumerate(leaves)}
        cuts = {name: [*cut] for name, cut in self._tuner.cuts.items()}
        told = {
            "position": position._asdict(),
            "cuts": cuts,
            "arrays": {
                name: [list(leaf.shape), str(leaf.dtype)]
                for name, leaf in stored.items()
            },
            "checksums": _checksums(stored),
        }
        args = self._ocp.args.Composite(
            trained=self._ocp.args.StandardSave(stored),
            told=self._ocp.args.JsonSave(told),
        )
        self._reported(lambda: self._manager.save(position.batches, args=args))

    def restore(self, state: CompactState) -> tuple[CompactState, Position]:
        """Returns the newest checkpoint on the parameters of a fresh state.

        Args:
          state: as `Runner.init` returns it for the base model; returned as it is if
            there is no checkpoint.

        Raises:
          InputError: if there are checkpoints, and all of them are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for tried, step in enumerate(steps):
            try:
                restored = self._read(step, state)
            # A damaged file may raise anything at all.
            except Exception as error:
                _log.warning(
                    "the checkpoint %s is damaged (%s); trying the one before",
                    self._folder / str(step),
                    _reason(error),
                )
                continue
            # The run will come to these again, and Orbax overwrites nothing.
            for damaged in steps[:tried]:
                self._manager.delete(damaged)
            return restored
        if steps:
            raise InputError(
                f"`{self._folder}` must have a checkpoint that can be read, got "
                f"{len(steps)} that cannot. Start anew with --overwrite."
            )
        return state, Position()

    def close(self) -> None:
        """Waits until all is written, and lets go of the folder."""
        self._reported(self._manager.wait_until_finished)
        self._manager.close()

    def _read(self, step: int, state: CompactState) -> tuple[CompactState, Position]:
        """Returns a checkpoint on the parameters of a state."""
        args = self._ocp.args
        json = args.Composite(told=args.JsonRestore())
        told = self._manager.restore(step, args=json)["told"]
        like = jax.eval_shape(self._trained, state)
        tree = jax.tree.structure(like)
        # Templates of the host: the arrays may come from another mesh.
        host = {
            name: np.empty(shape, dtype)
            for name, (shape, dtype) in told["arrays"].items()
        }
        standard = args.Composite(trained=args.StandardRestore(host))
        found = self._manager.restore(step, args=standard)["trained"]
        written, read = told["checksums"], _checksums(found)
        if any(read[name] != written[name] for name in written):
            raise ValueError("its arrays are not those that were written")
        leaves = [
            _typed(np.asarray(found[str(i)]), leaf)
            for i, leaf in enumerate(jax.tree.leaves(like))
        ]
        trained = jax.tree.unflatten(tree, leaves)
        cuts = {name: _cut(*cut) for name, cut in told["cuts"].items()}
        shapes = _shapes(state.params)
        trained = moved(trained, shapes, cuts, self._tuner.cuts)
        trained = self._devices.hold(trained)
        return self._rebuilt(state, trained), Position(**told["position"])

    def _reported(self, write: Any) -> None:
        """Calls what writes files, and tells if it fails."""
        try:
            write()
        # Orbax passes on what its threads met, most of all a full disk.
        except (OSError, ValueError, RuntimeError) as error:
            _log.warning(
                "a checkpoint in %s could not be written (%s); the run goes on",
                self._folder,
                _reason(error),
            )

    def _trained(self, state: CompactState) -> CompactState:
        """Returns the state with its parameters reduced to the trained values."""
        roles = self._tuner.method.roles(state.params)
        values = current_values(roles, state.support, state.masters, state.params)
        return state._replace(params=values, masters=())

    def _rebuilt(self, state: CompactState, trained: CompactState) -> CompactState:
        """Returns the state whose reduced form is `trained`; `state` is given away."""
        roles = self._tuner.method.roles(state.params)
        values: Any = trained.params

        def write(role: Role, leaf: jax.Array, support: Any, values: Any) -> jax.Array:
            if role.kind == FROZEN:
                return leaf
            if role.kind == SPARSE:
                return scatter(leaf, support, values)
            # A copy, because the step gives away what it gets.
            return jnp.array(values, leaf.dtype)

        def rebuild(params: Any, trained: CompactState) -> Any:
            return map_roles(write, roles, params, trained.support, trained.params)

        where = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        rebuild = jax.jit(rebuild, donate_argnums=0, out_shardings=where)
        params = rebuild(state.params, trained)
        only = {"only": TRAINED}
        masters = keep_masters(
            roles, map_roles(lambda _, v: v, roles, values, **only), params
        )
        return trained._replace(params=params, masters=masters)


def _reason(error: Exception) -> str:
    """Returns the beginning of a message, which of Orbax's may be pages long."""
    words = str(error).partition("[tensorstore_spec")[0]
    return textwrap.shorten(words, 200) or type(error).__name__


def _plain(leaf: jax.Array) -> jax.Array:
    """Returns an array of numbers, also for a key."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _typed(array: np.ndarray, like: Any) -> Any:
    """Returns numbers as what they were, a key or an array."""
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(jnp.asarray(array)) if is_key else array


def _checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Returns a checksum of every array that this process holds all of."""
    whole = {
        name: np.asarray(array)
        for name, array in arrays.items()
        if isinstance(array, np.ndarray) or array.is_fully_addressable
    }
    return {name: zlib.crc32(array.tobytes()) for name, array in whole.items()}


def _cut(names: Any, counts: Any) -> Cut:
    """Returns a cut that was stored as lists."""
    return Cut(tuple(map(tuple, names)), tuple(counts))


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of leaves by name."""
    names, leaves = (jax.tree.leaves(tree) for tree in (leaf_names(params), params))
    return {name: leaf.shape for name, leaf in zip(names, leaves, strict=True)}

"""Checkpoints of a run: what the base model does not already hold."""

import contextlib
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.compact import Compact, CompactState
from sparse_jax.errors import InputError, reason_of
from sparse_jax.local_support import Cut
from sparse_jax.names import leaf_names
from sparse_jax.packing import current_values, keep_masters
from sparse_jax.roles import FROZEN, SPARSE, TRAINED, Role, map_roles
from sparse_jax.sharding.devices import Devices
from sparse_jax.sharding.moving import moved
from sparse_jax.sharding.processes import is_first_process, require_agreement
from sparse_jax.support import scatter
from sparse_jax.training.checkpoint_file import (
    Part,
    Position,
    Record,
    has_parts,
    read_arrays,
    read_record,
    write_parts,
)
from sparse_jax.training.orbax_checkpoint import is_orbax, read_orbax
from sparse_jax.training.output_folder import CONFIG, ROWS
from sparse_jax.training.run_directory import RunDirectory

__all__ = ["Checkpoints", "Position"]

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a folder, of which the newest are kept.

    One holds trained values, supports and the optimiser's state: O(k), not the model.
    Files are written while training goes on, under a temporary name and then moved; of
    several processes each writes what it holds. Checksums cover all of it: arrays with
    their names, the position, and which run and rows it belongs to. A checkpoint may be
    read by a run on another mesh.

    Args:
      directory: of the run.
      tuner: made the states.
      devices: where states lie.
      keep: how many to keep; the one before the newest serves if that is damaged.
    """

    def __init__(
        self, directory: RunDirectory, tuner: Compact, devices: Devices, keep: int = 2
    ):
        self._directory, self._folder = directory, directory.checkpoints
        self._tuner, self._devices, self._keep = tuner, devices, keep
        self._writer: threading.Thread | None = None
        # Compiled, because on a mesh every operation by itself is a program to compile.
        self._copied = jax.jit(lambda s: jax.tree.map(jnp.copy, self._trained(s)))

    def save(self, state: CompactState, position: Position) -> None:
        """Begins to write the state between two batches, whole or not at all.

        A checkpoint that cannot be written is reported, and the run goes on: the one
        before stays as it is.
        """
        self._wait()
        if not self._directory.write_rows():
            self._report(f"its rows in {ROWS} could not")
            return
        step = position.batches
        # The next step overwrites the arrays of the state: these are copies.
        names, leaves = _named(self._copied(state))
        leaves = [_plain(leaf) for leaf in leaves]
        record = Record(
            position=position,
            names=names,
            shapes=[list(leaf.shape) for leaf in leaves],
            dtypes=[str(leaf.dtype) for leaf in leaves],
            cuts={name: [*cut] for name, cut in self._tuner.cuts.items()},
            processes=jax.process_count(),
            run=self._directory.identity,
            # The rows of the others have other durations.
            rows=self._directory.rows_digest(step) if is_first_process() else "",
        )
        write = lambda: self._write(record, leaves)
        self._writer = threading.Thread(target=write, name="checkpoint")
        self._writer.start()

    def restore(self, state: CompactState) -> tuple[CompactState, Position]:
        """Returns the newest checkpoint on the parameters of a fresh state.

        Args:
          state: as `Runner.init` returns it for the base model; returned as it is if
            there is no checkpoint.

        Raises:
          InputError: if there are checkpoints, and all of them are damaged.
        """
        steps = self._steps()
        for tried, step in enumerate(steps):
            try:
                trained, position = self._read(step, state)
            # A damaged file may raise anything at all.
            except Exception as error:
                _log.warning(
                    "the checkpoint %s is damaged (%s); trying the one before",
                    self._folder / str(step),
                    _reason(error),
                )
                continue
            require_agreement("checkpoint", position)
            # The run will come to these again.
            for damaged in steps[:tried]:
                self._remove(damaged)
            return self._rebuilt(state, self._devices.hold(trained)), position
        require_agreement("checkpoint", None)
        if steps:
            raise InputError(
                f"`{self._folder}` must have a checkpoint that can be read, got "
                f"{len(steps)} that cannot. Start anew with --overwrite."
            )
        return state, Position()

    def close(self) -> None:
        """Waits until all is written."""
        self._wait()

    def _wait(self) -> None:
        """Waits until what was begun is written, and removes what is too old."""
        if self._writer is not None:
            self._writer.join()
        self._writer = None
        self._prune()

    def _write(self, record: Record, leaves: list[jax.Array]) -> None:
        """Writes what this process holds of a checkpoint, or reports why it cannot."""
        step, process = record.position.batches, jax.process_index()
        folder = self._folder / str(step)
        try:
            write_parts(folder, process, record, list(_parts(leaves, process)))
        # Also what JAX or safetensors raise: the run can do without a checkpoint.
        except Exception as error:
            self._report(_reason(error))
            with contextlib.suppress(OSError):
                folder.rmdir()
        # Of several processes the others may still be writing.
        if record.processes == 1:
            self._prune()

    def _read(self, step: int, state: CompactState) -> tuple[CompactState, Position]:
        """Returns the reduced state in a checkpoint of this run."""
        folder = self._folder / str(step)
        if has_parts(folder):
            record = read_record(folder)
            self._require_own(step, record)
            arrays = read_arrays(folder, record)
        else:
            record, arrays = read_orbax(folder)
            self._require_own(step, record)
        like = jax.eval_shape(self._trained, state)
        names, leaves = _named(like)
        cuts = {name: _cut(*cut) for name, cut in record.cuts.items()}
        # Another mesh may have others: supports are tables there.
        if cuts == dict(self._tuner.cuts) and record.names not in ([], names):
            raise ValueError("another version of the program wrote it")
        typed = [_typed(*pair) for pair in zip(arrays, leaves, strict=True)]
        trained = jax.tree.unflatten(jax.tree.structure(like), typed)
        trained = moved(trained, _shapes(state.params), cuts, self._tuner.cuts)
        for found, leaf in zip(jax.tree.leaves(trained), leaves, strict=True):
            if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(f"it has an array of {found.shape} for {leaf.shape}")
        return trained, record.position

    def _require_own(self, step: int, record: Record) -> None:
        """Raises `ValueError` unless a checkpoint is one of this run at a step."""
        if record.run not in ("", self._directory.identity):
            raise ValueError(f"it belongs to another run, or {CONFIG} was changed")
        if record.rows not in ("", self._directory.rows_digest(step)):
            raise ValueError(f"it does not belong to the rows in {ROWS}")
        batches, skipped, is_selected = record.position
        # An update may be skipped after the supports were chosen; earlier versions knew
        # no such updates, and wrote no digest of the rows.
        possible = {batches > skipped} | ({True} if record.rows else set())
        if batches != step or is_selected not in possible:
            raise ValueError(f"its position is not one after {step} batches")
        if not record.rows:
            self._directory.require_steps(step, skipped)

    def _steps(self) -> list[int]:
        """Returns the steps of the checkpoints, the newest first."""
        places = self._folder.iterdir() if self._folder.is_dir() else ()
        steps = [int(p.name) for p in places if re.fullmatch("0|[1-9][0-9]*", p.name)]
        is_begun = lambda folder: has_parts(folder) or is_orbax(folder)
        steps = [step for step in steps if is_begun(self._folder / str(step))]
        return sorted(steps, reverse=True)

    def _prune(self) -> None:
        """Removes checkpoints that are older than the newest ones."""
        processes = jax.process_count()
        is_whole = lambda folder: has_parts(folder, processes) or is_orbax(folder)
        steps = [s for s in self._steps() if is_whole(self._folder / str(s))]
        for step in steps[self._keep :]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint."""
        if is_first_process():
            shutil.rmtree(self._folder / str(step), ignore_errors=True)

    def _report(self, reason: str) -> None:
        """Warns that a checkpoint is missing."""
        _log.warning(
            "a checkpoint in %s could not be written (%s); the run goes on, and "
            "--resume would continue from the one before",
            self._folder,
            reason,
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
        # What was saved has its supports.
        return CompactState(*trained._replace(params=params, masters=masters))


def _reason(error: Exception) -> str:
    """Returns the beginning of a message, which of Orbax's may be pages long."""
    words = str(error).partition("[tensorstore_spec")[0]
    return reason_of(ValueError(words or type(error).__name__))


def _plain(leaf: jax.Array) -> jax.Array:
    """Returns an array of numbers, also for a key."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _typed(array: np.ndarray, like: Any) -> Any:
    """Returns numbers as what they were, a key or an array."""
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(jnp.asarray(array)) if is_key else array


def _named(state: Any) -> tuple[list[str], list[Any]]:
    """Returns the places of the leaves in a state, and the leaves."""
    found, _ = jax.tree.flatten_with_path(state)
    return [jax.tree_util.keystr(path) for path, _ in found], [x for _, x in found]


def _parts(leaves: list[jax.Array], process: int) -> Iterator[Part]:
    """Yields what a process writes of arrays: each part is written once."""
    for i, leaf in enumerate(leaves):
        if leaf.is_fully_addressable:
            if process == 0:
                yield Part(i, (0,) * leaf.ndim, np.asarray(leaf))
            continue
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                start = tuple(place.start or 0 for place in shard.index)
                yield Part(i, start, np.asarray(shard.data))


def _cut(names: Any, counts: Any) -> Cut:
    """Returns a cut that was stored as lists."""
    return Cut(tuple(map(tuple, names)), tuple(counts))


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of leaves by name."""
    names, leaves = (jax.tree.leaves(tree) for tree in (leaf_names(params), params))
    return {name: leaf.shape for name, leaf in zip(names, leaves, strict=True)}

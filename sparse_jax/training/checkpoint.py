"""Checkpoints of a run: what the base model does not already hold."""

import functools
import logging
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.compact.layerwise import Layerwise
from sparse_jax.errors import InputError
from sparse_jax.params.names import leaves_by_name, map_named
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.sharding.placement import Placement, moved
from sparse_jax.sharding.processes import is_first_process, require_agreement
from sparse_jax.supports.layout import Shards
from sparse_jax.supports.masters import current_values, keep_masters
from sparse_jax.supports.positions import read_entries, write_entries
from sparse_jax.supports.roles import FROZEN, SPARSE, TRAINED, Role, map_roles
from sparse_jax.training.checkpoint_file import (
    UNFINISHED,
    Position,
    Record,
    read_checkpoint,
    reason_of_orbax,
    write_checkpoint,
)
from sparse_jax.training.output_folder import CONFIG, ROWS
from sparse_jax.training.run_directory import RunDirectory

__all__ = ["Checkpoints", "Position"]

_log = logging.getLogger(__name__)

Begin = Callable[[optax.Params, optax.Params], None]
# Before the name of a leaf, of which the positions and values of entries follow.
_EARLIER = "earlier/"
# Leaf -> positions and values.
Entries: TypeAlias = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Checkpoints:
    """The checkpoints in a folder, of which the newest are kept.

    One holds trained values, supports and the optimizer's state: O(k), not the model.
    Orbax writes it while training goes on, under a temporary name and then moved; of
    several processes the first one writes. Checksums cover all of it: arrays with
    their names, the position, and which run and rows it belongs to. A checkpoint may be
    read by a run on another mesh. Values are float32, however masters are kept, so that
    a run may go on with the other kind.

    Attributes:
      earlier: positions of the entries that earlier selections chose, by leaf; saved
        and restored with their values.
      pinned: step of a checkpoint to keep beside the newest; None is none.

    Args:
      directory: of the run.
      tuner: made the states.
      placement: of the states.
      keep: how many to keep; the one before the newest serves if that is damaged.
      before: made the states before the selection, if another tuner did.
    """

    def __init__(
        self,
        directory: RunDirectory,
        tuner: Tuner,
        placement: Placement,
        keep: int = 2,
        before: Tuner | None = None,
    ):
        self._directory, self._folder = directory, directory.checkpoints
        self._tuner, self._placement, self._keep = tuner, placement, keep
        self._before = before
        self.earlier: dict[str, np.ndarray] = {}
        self.pinned: int | None = None
        self._writer: threading.Thread | None = None
        # Compiled, because on a mesh every operation by itself is a program to compile.
        self._copied = {
            is_selected: jax.jit(functools.partial(_copied, self._maker(is_selected)))
            for is_selected in (False, True)
        }
        self._everywhere = placement.compiled(lambda leaf: leaf)

    def save(self, state: CompactState, position: Position) -> None:
        """Begins to write the state between two batches, atomically.

        A checkpoint that cannot be written is reported, and the run goes on: the one
        before stays as it is.
        """
        self.close()
        # The next step overwrites the arrays of the state: these are copies.
        names, leaves = _named(self._copied[position.is_selected](state))
        # Of several processes all take part, also if the first cannot write.
        leaves = [self._whole(_plain(leaf)) for leaf in leaves]
        params = leaves_by_name(state.params)
        for name, positions in self.earlier.items():
            names += [f"{_EARLIER}{name}"] * 2
            leaves += [positions, read_entries(params[name], positions)]
        if not is_first_process():
            return
        if not self._directory.write_rows():
            self._report(f"its rows in {ROWS} could not")
            return
        record = Record(
            position=position,
            cuts={name: [*parts] for name, parts in self._tuner.shards.items()},
            names=names,
            run=self._directory.identity,
            rows=self._directory.rows_digest(position.batches),
        )
        write = lambda: self._write(record, leaves)
        self._writer = threading.Thread(target=write, name="checkpoint")
        self._writer.start()
        self._directory.callbacks.saved(position.batches)

    def restore(
        self, state: CompactState, begin: Begin | None = None
    ) -> tuple[CompactState, Position]:
        """Returns the newest checkpoint on the parameters of a fresh state.

        Args:
          state: as `MeshRunner.init` returns it for the base model; returned as it is
            if there is no checkpoint.
          begin: is called with the parameters and the supports of a checkpoint before
            anything is written to them.

        Raises:
          InputError: if all checkpoints are damaged, or of another optimizer.
        """
        if is_first_process():
            self._remove_unfinished()
        steps = self._steps()
        for tried, step in enumerate(steps):
            try:
                trained, position, left = self._read(step, state)
            except InputError:
                raise
            # A damaged file may raise anything at all.
            except Exception as error:
                _log.warning(
                    "the checkpoint %s is damaged (%s); trying the one before",
                    self._folder / str(step),
                    reason_of_orbax(error),
                )
                continue
            require_agreement("checkpoint", position)
            # The run will come to these again.
            for damaged in steps[:tried] if is_first_process() else ():
                self._remove(str(damaged))
            begin = begin if position.is_selected else None
            self.earlier.update({name: entries[0] for name, entries in left.items()})
            state = _with(state, left)
            return self._rebuilt(state, trained, position, begin), position
        require_agreement("checkpoint", None)
        if steps:
            raise InputError(
                f"`{self._folder}` must have a checkpoint that can be read, got "
                f"{len(steps)} that cannot. Start over with `overwrite=True`."
            )
        return state, Position()

    def at_pinned(self, state: CompactState) -> CompactState | None:
        """Returns the state of the pinned checkpoint, for which `state` is donated.

        It is None, and `state` is left, if the checkpoint cannot be read, which is
        reported.
        """
        self.close()
        assert self.pinned is not None
        found = None
        try:
            found = self._read(self.pinned, state)
        # A damaged file may raise anything at all.
        except Exception as error:
            _log.warning(
                "the best model, %s, cannot be read (%s): the last one is kept",
                self._folder / str(self.pinned),
                reason_of_orbax(error),
            )
        require_agreement("best model", found and found[1])
        return found and self._rebuilt(state, found[0], found[1], None)

    def close(self) -> None:
        """Waits until what was begun is written."""
        if self._writer is not None:
            self._writer.join()
        self._writer = None

    def _whole(self, leaf: jax.Array) -> jax.Array | np.ndarray:
        """Returns an array of which the first process has all."""
        if leaf.is_fully_addressable:
            return leaf
        # One at a time: programs that run at once may meet in another order elsewhere.
        whole = jax.block_until_ready(self._everywhere(leaf))
        return np.asarray(whole) if is_first_process() else leaf

    def _write(self, record: Record, leaves: Sequence[jax.Array | np.ndarray]) -> None:
        """Writes a checkpoint, or reports why it cannot."""
        folder = self._folder / str(record.position.batches)
        try:
            try:
                write_checkpoint(folder, record, [np.asarray(leaf) for leaf in leaves])
            finally:
                self._remove_unfinished()
            for step in self._steps()[self._keep :]:
                if step != self.pinned:
                    self._remove(str(step))
        # Orbax passes on what its threads met: the run can do without a checkpoint.
        except Exception as error:
            self._report(reason_of_orbax(error))

    def _read(
        self, step: int, state: CompactState
    ) -> tuple[CompactState, Position, Entries]:
        """Returns the reduced state in a checkpoint, and what was trained earlier."""
        record, arrays = read_checkpoint(self._folder / str(step))
        self._require_own(step, record)
        tuner, key = self._maker(record.position.is_selected), jax.random.key(0)
        fresh = lambda params: _trained(tuner, tuner.init(params, key))
        like = jax.eval_shape(fresh, state.params)
        names, leaves = _named(like)
        shards = {
            name: Shards(tuple(map(tuple, axes)), tuple(counts))
            for name, (axes, counts) in record.cuts.items()
        }
        # Earlier versions kept supports in classes with a field.
        written = [name.removesuffix(".positions") for name in record.names]
        count = sum(not name.startswith(_EARLIER) for name in written)
        owners = [name.removeprefix(_EARLIER) for name in written[count::2]]
        pairs = zip(arrays[count::2], arrays[count + 1 :: 2], strict=True)
        left = dict(zip(owners, pairs, strict=True)) if written else {}
        written, arrays = written[:count], arrays[: count or None]
        if written not in ([], names):
            raise InputError(
                "`optimizer` must be that of the run to resume, got one with other "
                "state. Pass the same one, resume with the version that began the "
                "run, or pass `overwrite=True` to start over."
            )
        if isinstance(tuner, Layerwise):
            rule = tuner.sampler_for(state.params)
            pairs = zip(arrays, leaves, strict=True)
            arrays = [_reachable(rule, *pair) for pair in pairs]
        typed = [_typed(*pair) for pair in zip(arrays, leaves, strict=True)]
        trained = jax.tree.unflatten(jax.tree.structure(like), typed)
        roles = tuner.method.roles(state.params)
        ways = (shards, self._tuner.shards)
        trained = moved(trained, roles, state.params, *ways, tuner.begin)
        for found, leaf in zip(jax.tree.leaves(trained), leaves, strict=True):
            # Supports of shards are as long as the fullest needs, which the selection
            # decides.
            of = np.ndim if self._tuner.shards else np.shape
            if of(found) != of(leaf) or found.dtype != leaf.dtype:
                raise ValueError(f"it has an array of {found.shape} for {leaf.shape}")
        return trained, record.position, left

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
        possible |= set() if self._before is None else {False}
        if batches != step or is_selected not in possible:
            raise ValueError(f"its position is not one after {step} batches")
        if not record.rows:
            self._directory.require_steps(step, skipped)

    def _steps(self) -> list[int]:
        """Returns the steps of the checkpoints, the newest first."""
        places = self._folder.iterdir() if self._folder.is_dir() else ()
        steps = [int(p.name) for p in places if re.fullmatch("0|[1-9][0-9]*", p.name)]
        return sorted(steps, reverse=True)

    def _remove_unfinished(self) -> None:
        """Removes what was left of checkpoints that were not written to their end."""
        for place in list(self._folder.glob(UNFINISHED)):
            self._remove(place.name)

    def _remove(self, name: str) -> None:
        """Removes a checkpoint."""
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def _report(self, reason: str) -> None:
        """Warns that a checkpoint is missing."""
        _log.warning(
            "a checkpoint in %s could not be written (%s); the run continues. "
            "`resume=True` would continue from the previous one",
            self._folder,
            reason,
        )

    def _maker(self, is_selected: bool) -> Tuner:
        """Returns the tuner that makes the states after the selection, or before."""
        before = self._before
        return self._tuner if before is None or is_selected else before

    def _rebuilt(
        self,
        state: CompactState,
        trained: CompactState,
        at: Position,
        begin: Begin | None,
    ) -> CompactState:
        """Returns the state whose reduced form is `trained`; `state` is donated."""
        tuner = self._maker(at.is_selected)
        roles = tuner.roles(state.params)
        trained = self._placement.hold(roles, trained)
        if begin is not None:
            begin(state.params, trained.support)

        def write(
            role: Role, leaf: jax.Array, support: jax.Array, values: jax.Array
        ) -> jax.Array:
            if role.kind == FROZEN:
                return leaf
            if role.kind == SPARSE:
                return role.layout.scatter(leaf, support, values)
            # A copy, because the step gives away what it gets.
            return jnp.array(values, leaf.dtype)

        def rebuild(params: optax.Params, trained: CompactState) -> optax.Params:
            return map_roles(write, roles, params, trained.support, trained.params)

        where = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        rebuild = jax.jit(rebuild, donate_argnums=0, out_shardings=where)
        params = rebuild(state.params, trained)
        only = {"only": TRAINED}
        values = map_roles(lambda _, v: v, roles, trained.params, **only)
        masters = keep_masters(roles, values, params, tuner.split_masters)
        # What was saved has its supports.
        return CompactState(*trained._replace(params=params, masters=masters))


def _trained(tuner: Tuner, state: CompactState) -> CompactState:
    """Returns the state with its parameters reduced to the trained values."""
    roles = tuner.roles(state.params)
    values = current_values(roles, state.support, state.masters, state.params)
    return state._replace(params=values, masters=())


def _copied(tuner: Tuner, state: CompactState) -> CompactState:
    """Returns a copy of the state, so reduced."""
    return jax.tree.map(jnp.copy, _trained(tuner, state))


def _with(state: CompactState, entries: Entries) -> CompactState:
    """Returns a state with some entries of its parameters replaced."""

    def write(name: str, leaf: jax.Array) -> jax.Array:
        return write_entries(leaf, *entries[name]) if name in entries else leaf

    return state._replace(params=map_named(write, state.params))


def _plain(leaf: jax.Array) -> jax.Array:
    """Returns an array of numbers, also for a key."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _reachable(
    rule: Sampler, array: np.ndarray, like: jax.Array | jax.ShapeDtypeStruct
) -> np.ndarray:
    """Returns the rows of layers that are ever active; earlier versions wrote all."""
    rows = (len(rule.reachable), *like.shape[1:])
    is_whole = np.shape(array) == (rule.num_layers, *like.shape[1:])
    if like.shape == rows and is_whole:
        return array[list(rule.reachable)]
    return array


def _typed(
    array: np.ndarray, like: jax.Array | jax.ShapeDtypeStruct
) -> np.ndarray | jax.Array:
    """Returns numbers as what they were, a key or an array."""
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(jnp.asarray(array)) if is_key else array


def _named(state: CompactState) -> tuple[list[str], list[jax.Array]]:
    """Returns the places of the leaves in a state, and the leaves."""
    found, _ = jax.tree.flatten_with_path(state)
    return [jax.tree_util.keystr(path) for path, _ in found], [x for _, x in found]

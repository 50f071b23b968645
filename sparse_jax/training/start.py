"""Where a run starts that goes on from an adapter, and what its own adapter holds."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace

import jax
import numpy as np
import optax

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.use import (
    require_base,
    require_fit,
    swap,
    warn_of_dtype,
    without_leaves,
)
from sparse_jax.adapter.whole import require_sites, require_stack
from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.errors import InputError, listed
from sparse_jax.methods.method import Method
from sparse_jax.models.hf.labels import are_numbers
from sparse_jax.models.hf.weights import HEADS
from sparse_jax.params.names import leaves_by_name, patterns
from sparse_jax.supports.positions import fetch, read_entries, union_of
from sparse_jax.supports.roles import SPARSE, Role, map_roles
from sparse_jax.training.objective import Objective
from sparse_jax.training.setup import Base

__all__ = ["note_entries", "start_from", "with_start"]

_log = logging.getLogger(__name__)

_NAMELESS = (
    ". To keep it, name the labels of its outputs as `id2label` in the `config.json` "
    "of the base"
)
_MERGE = "Export the adapter with `--to merged`, and train on that folder"


def start_from(
    adapter: Adapter, base: Base, method: Method, objective: Objective
) -> tuple[Base, Method, Adapter]:
    """Returns the base with an adapter on it, the method, and the adapter as it is on.

    The head of another task, or for other labels, is left out, and a line says so. A
    method that adds arrays goes on from those of the adapter, with its settings.

    Raises:
      InputError: if the adapter is of another base, or of a method that this one cannot
        go on from.
    """
    require_base(adapter, base.hash, base.model, base.folder)
    adds = bool(jax.eval_shape(method.added, base.params, jax.random.key(0)))
    if adapter.added:
        method = _going_on(adapter, method)
    elif adds:
        raise InputError(
            f"`method` must train entries of the base to continue from an adapter of "
            f"{adapter.word!r}, got {type(method).__name__}, which adds arrays. "
            f"{_MERGE}."
        )
    theirs, ours = (adapter.task, adapter.labels), (objective.name, objective.labels)
    base_part = without_leaves(adapter, lambda name: name.startswith(HEADS))
    if theirs != ours and base_part.entries != adapter.entries:
        is_nameless = are_numbers(theirs[1]) and len(theirs[1]) == len(ours[1]) > 0
        _log.warning(
            "the head of the adapter is dropped: it is for %s with %s, and this run "
            "for %s with %s%s",
            theirs[0] or "no task", listed(theirs[1]) or "no labels",
            ours[0], listed(ours[1]) or "no labels", _NAMELESS if is_nameless else "",
        )  # fmt: skip
        adapter = base_part
    require_fit(base.params, adapter)
    require_sites(base.params, adapter)
    map_roles(
        lambda role: require_stack("adapter", role, adapter), method.roles(base.params)
    )
    warn_of_dtype(base.params, adapter)
    params, _ = swap(base.params, adapter)
    return replace(base, params=params), method, adapter


def with_start(
    start: Adapter,
    trained: Adapter,
    params: optax.Params,
    earlier: Sequence[Adapter] = (),
) -> Adapter:
    """Returns what a run trained and what it started from, as one adapter of the base.

    Where a leaf is in both, the support is the union. If there is more than the method
    of the run trains, the adapter is of no method: its entries say all. One that adds
    arrays stays, with rules for what else there is.

    Args:
      start: the adapter that the run started from.
      trained: what the run trained.
      params: the parameters at the end.
      earlier: adapters whose entries are left alone.
    """
    leaves = leaves_by_name(params)
    support, values, dense = (
        dict(part) for part in (trained.support, trained.values, trained.dense)
    )
    for name in start.dense:
        if name not in dense:
            support.pop(name, None)
            values.pop(name, None)
            dense[name] = fetch(leaves[name])
    for name, positions in start.support.items():
        if name in dense:
            continue
        union = positions
        if name in support:
            size = math.prod(leaves[name].shape[positions.ndim - 1 :])
            union = _union(name, [positions, support[name]], earlier, size)
        support[name], values[name] = union, read_entries(leaves[name], union)
    same = {*dense} == {*trained.dense} and all(
        name in trained.support and np.array_equal(array, trained.support[name])
        for name, array in support.items()
    )
    found = replace(trained, support=support, values=values, dense=dense)
    if same:
        return found
    if not trained.added:
        return replace(found, method=Method(), word="combined")
    # The arrays need the method that added them: its rules name the other leaves, too.
    more = (f"^{re.escape(name)}$" for name in dense if name not in trained.dense)
    rules = (*patterns(trained.method.dense), *more)
    return replace(found, method=replace(trained.method, dense=rules))


def note_entries(
    known: dict[str, np.ndarray],
    tuner: Tuner,
    state: CompactState,
    earlier: Sequence[Adapter] = (),
) -> None:
    """Adds the entries that a state trains to those that were trained earlier.

    Args:
      known: positions by the name of the leaf, shape=(k,) or (L, k).
      tuner: made the state.
      state: with supports.
      earlier: adapters whose entries are left alone.
    """

    def note(role: Role, support: jax.Array, leaf: jax.Array) -> None:
        (positions,) = role.layout.to_positions(fetch(support), leaf.shape)
        before = [known[role.name]] if role.name in known else []
        known[role.name] = _union(role.name, [*before, positions], earlier, role.size)

    roles = tuner.roles(state.params)
    map_roles(note, roles, state.support, state.params, only=(SPARSE,))


def _union(
    name: str, supports: Sequence[np.ndarray], earlier: Sequence[Adapter], size: int
) -> np.ndarray:
    """Returns positions in a leaf, filled up outside the entries of other adapters."""
    theirs = [one.support[name] for one in earlier if name in one.support]
    avoid = np.concatenate(theirs, axis=-1) if theirs else None
    return union_of(supports, avoid, size)


def _going_on(adapter: Adapter, method: Method) -> Method:
    """Returns the method of an adapter, with what this run says of the training."""
    theirs = adapter.method
    if type(theirs) is not type(method):
        raise InputError(
            f"`method` must be that of the adapter to continue from, "
            f"{type(theirs).__name__}, got {type(method).__name__}. Pass the same, or "
            f"train another method: {_MERGE[0].lower()}{_MERGE[1:]}."
        )
    of_training = {one.name for one in fields(method)} & {"dense", "dropout", "stack"}
    found = replace(theirs, **{name: getattr(method, name) for name in of_training})
    if found != method:
        _log.warning("the settings of the adapter are used: %s", found)
    return found

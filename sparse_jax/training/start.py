"""Where a run starts that goes on from an adapter, and what its own adapter holds."""

from dataclasses import fields, replace

import jax
import numpy as np
import optax

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.use import require_base, require_fit, swap, without_head
from sparse_jax.errors import InputError, brief
from sparse_jax.methods.method import Method
from sparse_jax.params.names import leaf_names
from sparse_jax.supports.positions import fetch, read_entries
from sparse_jax.training.setup import Base

__all__ = ["start_from", "with_start"]

_MERGE = "Export the adapter with `--to merged`, and train on that folder"


def start_from(
    adapter: Adapter, base: Base, method: Method, task: str
) -> tuple[Base, Adapter]:
    """Returns the base with an adapter on it, and the part of the adapter that is.

    The head of another task is left out. A method that adds arrays goes on from those
    of the adapter, which has to be of the same method.

    Raises:
      InputError: if the adapter is of another base, or of a method that this one cannot
        go on from.
    """
    require_base(adapter, base.hash, base.model)
    adds = bool(jax.eval_shape(method.added, base.params, jax.random.key(0)))
    if adapter.added:
        _require_same(adapter, method)
    elif adds:
        raise InputError(
            f"`method` must train entries of the base to go on from an adapter of "
            f"{adapter.word!r}, got {type(method).__name__}, which adds arrays. "
            f"{_MERGE}."
        )
    if adapter.task != task:
        adapter = without_head(adapter)
    require_fit(base.params, adapter)
    params, _ = swap(base.params, adapter)
    return replace(base, params=params), adapter


def with_start(start: Adapter, trained: Adapter, params: optax.Params) -> Adapter:
    """Returns what a run trained and what it started from, as one adapter of the base.

    Where a leaf is in both, the support is the union. If there is more than the method
    of the run trains, the adapter is of no method: its entries say all.

    Args:
      start: the adapter that the run started from.
      trained: what the run trained.
      params: the parameters at the end.
    """
    names = jax.tree.leaves(leaf_names(params))
    leaves = dict(zip(names, jax.tree.leaves(params), strict=True))
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
            union = _union(positions, support[name], leaves[name])
        support[name], values[name] = union, read_entries(leaves[name], union)
    same = {*dense} == {*trained.dense} and all(
        name in trained.support and np.array_equal(array, trained.support[name])
        for name, array in support.items()
    )
    found = replace(trained, support=support, values=values, dense=dense)
    return found if same else replace(found, method=Method(), word="combined")


def _require_same(adapter: Adapter, method: Method) -> None:
    """Raises unless a method adds the arrays that an adapter has."""
    theirs = adapter.method
    what, expected, got = "", type(theirs).__name__, type(method).__name__
    if type(theirs) is type(method):
        # What is trained in full may differ.
        own = {one.name for one in fields(theirs)} - {"dense", "dropout", "stack"}
        differ = sorted(n for n in own if getattr(theirs, n) != getattr(method, n))
        if not differ:
            return
        what = f"`{differ[0]}` of "
        expected, got = (brief(getattr(one, differ[0])) for one in (theirs, method))
    raise InputError(
        f"{what}`method` must be that of the adapter to go on from, {expected}, got "
        f"{got}. Pass the same, or train another method: {_MERGE[0].lower()}"
        f"{_MERGE[1:]}."
    )


def _union(first: np.ndarray, second: np.ndarray, leaf: jax.Array) -> np.ndarray:
    """Returns the positions of two supports, as many in every layer of a stack."""
    if first.ndim == 1:
        return np.union1d(first, second).astype(np.int32)
    rows = [np.union1d(*pair) for pair in zip(first, second, strict=True)]
    most, size = max(row.size for row in rows), int(np.prod(leaf.shape[1:]))
    # A layer with fewer takes entries that nothing trained, which have their values.
    filled = [
        np.union1d(row, np.setdiff1d(np.arange(size), row)[: most - row.size])
        for row in rows
    ]
    return np.stack(filled).astype(np.int32)

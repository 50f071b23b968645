"""The bytes that every device holds for a run, by what they are for."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.layerwise import Layerwise
from sparse_jax.packing import current_values
from sparse_jax.planning.abstract import AbstractRun

__all__ = ["held_bytes"]


def held_bytes(run: AbstractRun) -> Mapping[str, int]:
    """Returns bytes of one device, exact for the state and for the gradients.

    Returns:
      `parameters`; `added` arrays of the method; `masters`, packed float32 values of
      coarser leaves; `supports`; `optimizer`; `batch`; and `gradients` of what is
      trained, which live for a part of the step only.
    """
    state = run.state
    return {
        "parameters": _bytes(state.params),
        "added": _bytes(state.added),
        "masters": _bytes(state.masters),
        "supports": _bytes(state.support),
        "optimizer": _bytes(state.opt_state),
        "batch": _bytes(run.batch),
        "gradients": _gradients(run),
    }


def _gradients(run: AbstractRun) -> int:
    """Returns the bytes of the gradients of what is trained."""
    roles = run.tuner.method.roles(run.state.params)

    def values(state: Any) -> Any:
        leaves = current_values(roles, state.support, state.masters, state.params)
        return state._replace(params=leaves, masters=(), opt_state=())

    with jax.set_mesh(run.placement.mesh):
        shapes = jax.eval_shape(values, run.state)
    placed = run.placement.trained(shapes)
    trees = (
        (shapes.params, placed.params, _gradient_dtypes(run)),
        (shapes.added, placed.added, {}),
    )
    total = 0
    for tree, where, dtypes in trees:
        for shape, sharding in zip(*map(_with_names, (tree, where)), strict=True):
            share = _active(run) if shape[0].startswith("layers/") else 1.0
            dtype = dtypes.get(shape[0], np.float32)
            total += int(share * _size(shape[1].shape, dtype, sharding[1]))
    return total


def _gradient_dtypes(run: AbstractRun) -> dict[str, Any]:
    """Returns the dtypes of the gradients of leaves that are not float32."""
    # What is added up, over micro-batches or replicas, and rows of layers are float32.
    sums = run.tuner.accumulate > 1 or run.tuner.data_axes
    if sums or isinstance(run.tuner, Layerwise):
        return {}
    return {name: leaf.dtype for name, leaf in _with_names(run.state.params)}


def _active(run: AbstractRun) -> float:
    """Returns the share of the layers that an update trains."""
    if not isinstance(run.tuner, Layerwise):
        return 1.0
    sampler = run.tuner.sampler
    return sampler.num_active / sampler.num_layers


def _with_names(tree: Any) -> list[tuple[str, Any]]:
    """Returns the leaves of a tree with their names."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return [(name(path), leaf) for path, leaf in paths]


def _bytes(tree: Any) -> int:
    """Returns the bytes of the parts of arrays that lie on one device."""
    return sum(
        _size(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)
    )


def _size(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding) -> int:
    """Returns the bytes of the part of an array that lies on one device."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8
    return math.prod(sharding.shard_shape(tuple(shape))) * np.dtype(dtype).itemsize

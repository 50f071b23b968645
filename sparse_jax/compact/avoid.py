"""Entries that belong to earlier adapters, which a new one leaves alone."""

from collections.abc import Sequence

import jax
import numpy as np

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.use import require_fit, without_leaves
from sparse_jax.adapter.whole import require_stack
from sparse_jax.compact.compact import Tuner
from sparse_jax.errors import InputError
from sparse_jax.models.functional import Params
from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.positions import place_entries, union_of
from sparse_jax.supports.roles import DENSE, SPARSE, Role, map_roles
from sparse_jax.supports.short_entries import SHORT_ENTRY

__all__ = ["entries_to_avoid", "is_own"]


def entries_to_avoid(
    tuner: Tuner,
    params: Params,
    adapters: Sequence[Adapter],
    *,
    new: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Returns the supports of all entries that adapters train, for `Compact.select`.

        state, finite = tuner.select(state, batch, key, avoid)

    A new adapter without these entries can be applied together with the others and
    removed again, in any order, bit for bit.

    Args:
      tuner: that trains the new one.
      params: parameters of the base.
      adapters: of this base. The classifier of their task belongs to each adapter, and
        is not avoided.
      new: other leaves that the checkpoint of the base lacks, such as its pooler.

    Raises:
      InputError: naming the leaf, if the tuner would train it in full, or too few of
        its entries are left; if the method does not choose single entries; or if it
        chooses them in layers and an adapter has them in the whole, or the reverse.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from sparse_jax import Compact, Sparse
      >>> def loss(params, x, key, attachment):
      ...     return jnp.sum(params["w"] * x), 1.0
      >>> tuner = Compact(loss, Sparse(density=0.25), optax.sgd(0.1))
      >>> params, x = {"w": jnp.ones(4)}, jnp.array([1.0, 4.0, 2.0, 3.0])
      >>> mine = Adapter({"w": np.array([1], np.int32)}, {"w": np.ones(1, np.float32)})
      >>> avoid, key = entries_to_avoid(tuner, params, [mine]), jax.random.key(0)
      >>> state, _ = tuner.select(tuner.init(params, key), x, key, avoid)
      >>> state.support["w"]
      Array([3], dtype=int32)
    """
    method = tuner.method
    is_new = lambda name: is_own(name, new)
    for adapter in adapters:
        require_fit(params, without_leaves(adapter, is_new))
    found: dict[str, jax.Array] = {}

    def collect(role: Role, leaf: jax.Array) -> None:
        owners = [one for one in adapters if role.name in {*one.dense, *one.support}]
        if not owners or is_new(role.name):
            return
        if role.kind == DENSE:
            raise InputError(
                f"`avoid` must be of adapters without `{role.name}`, which this run "
                "trains in full, got one that trains some of it. Leave it out by "
                "`dense`, or train it sparsely."
            )
        if role.kind != SPARSE:
            return
        if role.layout.sharded(None) not in (ENTRY, SHORT_ENTRY):
            raise InputError(
                "`granularity` must be 'entry' or 'entry16' to avoid entries, got one "
                "of groups: "
                "they may have some of both. Leave it out."
            )
        for one in owners:
            require_stack("avoid", role, one)
        positions = _union(owners, role, leaf.shape)
        free, k = role.size - positions.shape[-1], method.support_size(role)
        if free < k:
            raise InputError(
                f"`density` must leave enough entries of `{role.name}`, got {k:,} "
                f"to choose, and {free:,} of {role.size:,} that no adapter of `avoid` "
                "trains. Lower `density`, or choose other leaves by `where`."
            )
        found[role.name] = place_entries(leaf, positions).support

    map_roles(collect, tuner.roles(params), params)
    return found


def is_own(name: str, new: Sequence[str]) -> bool:
    """Returns whether a leaf belongs to each adapter, and need not be left alone."""
    return name.startswith("classifier/") or name in new


def _union(
    adapters: Sequence[Adapter], role: Role, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns the positions that adapters train."""
    whole = np.arange(role.size, dtype=np.int32)
    if role.stacked:
        whole = np.broadcast_to(whole, (shape[0], role.size))
    # Avoiding a few more than asked for, where layers differ, does no harm.
    return union_of([one.support.get(role.name, whole) for one in adapters])

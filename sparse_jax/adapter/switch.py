"""Adapters of one base that are put on and taken off in place."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.calculus import shared_leaves
from sparse_jax.adapter.use import require_fit
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.models.functional import Params
from sparse_jax.models.hf.weights import HEADS
from sparse_jax.params.names import leaf_names
from sparse_jax.supports.positions import (
    PlacedEntries,
    place_entries,
    read_entries,
    write_in_place,
)

__all__ = ["AdapterSwitch"]


class _Whole(NamedTuple):
    """Values of a leaf that is trained in full."""

    base: jax.Array
    values: jax.Array


class AdapterSwitch:
    """A base model whose adapters are switched in place.

        leaf[support] = base + strength * (value - base)

    Removing an adapter writes the values of the base back, bit for bit, in bfloat16
    too. A switch writes only at the supports and copies no other leaf; after the first
    use of an adapter nothing is compiled. In addition to the parameters it keeps the
    supports and two values per entry.

    Attributes:
      params: the parameters, with the active adapters. A switch donates the previous
        parameters, and creating it those of the base, as `jax.jit` donates arguments;
      arrays of NumPy, and one that several leaves share, are copied.
      active: names of the active adapters, with their strengths.

    Raises:
      InputError: if an adapter does not fit the parameters, or adds arrays, such as
        LoRA: `apply_adapter` attaches those without changing the parameters.

    Example:
      >>> import numpy as np
      >>> base = {"w": jnp.array([1.0, 2.0, 3.0])}
      >>> mrpc = Adapter({"w": np.array([0])}, {"w": np.array([9.0], np.float32)})
      >>> switch = AdapterSwitch(base, {"mrpc": mrpc})
      >>> switch.to("mrpc")["w"]
      Array([9., 2., 3.], dtype=float32)
      >>> switch.to({"mrpc": 0.5})["w"]
      Array([5., 2., 3.], dtype=float32)
      >>> switch.to()["w"]
      Array([1., 2., 3.], dtype=float32)
    """

    def __init__(self, params: Params, adapters: Mapping[str, Adapter]):
        self._leaves, self._tree = jax.tree.flatten(params)
        for i, leaf in enumerate(self._leaves):
            # Writing in place uses up arrays: each needs one that is its own.
            is_shared = any(leaf is other for other in self._leaves[:i])
            if is_shared or not isinstance(leaf, jax.Array):
                self._leaves[i] = jnp.copy(leaf)
        params = self.params
        self._names = jax.tree.leaves(leaf_names(params))
        self._index = {name: i for i, name in enumerate(self._names)}
        self._adapters = dict(adapters)
        self._placed: dict[str, dict[int, PlacedEntries | _Whole]] = {}
        self.active: dict[str, float] = {}
        for name, adapter in adapters.items():
            if adapter.added:
                raise InputError(
                    "`adapters` must change entries of the base to be applied in "
                    f"place, got {adapter.word!r} for {name!r}, which adds arrays. "
                    "Attach it with `apply_adapter`."
                )
            require_fit(params, adapter)
            self._placed[name] = self._place(adapter)

    @property
    def params(self) -> Params:
        """The parameters, with the adapters that are on."""
        return jax.tree.unflatten(self._tree, self._leaves)

    def to(self, *names: str | Mapping[str, float]) -> Params:
        """Takes off what is on, puts these adapters on, and returns the parameters.

        Args:
          *names: names, or mappings from names to strengths; a name alone has strength
            1, and one of strength 0 is off. None at all leaves the base. Of heads that
            several train in full, such as the classifiers of their tasks, that of the
            first is on, at strength 1.

        Raises:
          InputError: if there is no such adapter, two train an entry in common, or a
            strength is not a finite number.
        """
        wanted: dict[str, float] = {}
        for one in names:
            wanted |= {one: 1.0} if isinstance(one, str) else one
        for name, strength in wanted.items():
            if name not in self._placed:
                raise InputError(
                    f"`names` must be of {listed([*self._placed])}, got {brief(name)}."
                )
            if not math.isfinite(strength):
                raise InputError(
                    f"`names` must have finite strengths, got {strength!r} for "
                    f"{name!r}. Leave it out, or pass 1.0 for full strength."
                )
        wanted = {name: strength for name, strength in wanted.items() if strength}
        for first, second in itertools.combinations(sorted(wanted), 2):
            self._require_apart(first, second)
        for name in self.active:
            self._write(name, 0.0)
        # Of heads the first stays, as it is written last.
        for name, strength in reversed(wanted.items()):
            self._write(name, strength)
        self.active = wanted
        return self.params

    def _place(self, adapter: Adapter) -> dict[int, PlacedEntries | _Whole]:
        """Returns what an adapter changes, by the number of the leaf."""
        placed: dict[int, PlacedEntries | _Whole] = {}
        for name, support in adapter.support.items():
            leaf = self._leaves[i := self._index[name]]
            values = read_entries(leaf, support), adapter.values[name]
            placed[i] = place_entries(leaf, support, *values)
        for name, array in adapter.dense.items():
            leaf = self._leaves[i := self._index[name]]
            placed[i] = _Whole(jnp.copy(leaf), jax.device_put(array, leaf.sharding))
        return placed

    def _write(self, name: str, strength: float) -> None:
        """Writes the values of an adapter, at strength 0 those of the base."""
        for i, change in self._placed[name].items():
            if isinstance(change, _Whole):
                # Half of a new head would be half of random numbers.
                is_head = self._names[i].startswith(HEADS) and strength != 0
                new = _between(change.base, change.values, 1.0 if is_head else strength)
                # A copy, since what is in the parameters is used up.
                self._leaves[i] = jnp.copy(new)
            else:
                base, values = change.packed
                new = _between(base, values, strength)
                entries = change.layout, change.support
                self._leaves[i] = write_in_place(self._leaves[i], *entries, new)

    def _require_apart(self, first: str, second: str) -> None:
        """Raises if two adapters train an entry in common."""
        pair = self._adapters[first], self._adapters[second]
        is_head = lambda leaf: (
            leaf.startswith(HEADS) and all(leaf in adapter.dense for adapter in pair)
        )
        if leaves := [leaf for leaf in shared_leaves(*pair) if not is_head(leaf)]:
            raise InputError(
                f"`names` must be adapters without entries in common, got {first!r} "
                f"and {second!r}, which share some of `{leaves[0]}`. Add them with "
                "`combine_adapters`, and use their sum."
            )


def _between(base: jax.Array, values: jax.Array, strength: float) -> jax.Array:
    """Returns base + strength * (values - base), both ends bit for bit."""
    if strength in (0.0, 1.0):
        return values if strength else base
    wide = base.astype(jnp.float32)
    return (wide + strength * (values.astype(jnp.float32) - wide)).astype(base.dtype)

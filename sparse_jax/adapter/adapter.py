"""The adapter: what was trained, apart from the model that it was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from sparse_jax.errors import InputError, brief
from sparse_jax.methods.lookup import word_of
from sparse_jax.methods.method import Method
from sparse_jax.methods.registry import METHODS
from sparse_jax.methods.sites import Added
from sparse_jax.params.fields import Json
from sparse_jax.params.names import leaf_names
from sparse_jax.supports.positions import fetch, read_entries
from sparse_jax.supports.roles import DENSE, SPARSE, Role, map_roles

__all__ = [
    "Adapter",
    "Arrays",
    "adapter_of",
    "require_named",
    "require_no_settings",
    "require_pair",
]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Adapter:
    """Trained values, stored as absolute values so that loading is exact.

    `Compact.adapter` makes one from a state. One made by hand needs the method, whose
    settings say what the added arrays mean; without any, the name of a method is
    enough, or no method at all, and it may hold any leaves.

    Raises:
      InputError: if `method` is not a method, or the name of one that adds arrays.

    Example:
      >>> adapter = Adapter(
      ...     support={"w": np.array([0, 3], np.int32)},
      ...     values={"w": np.array([1.0, 2.0], np.float32)},
      ... )
      >>> adapter.entries
      2
    """

    support: Arrays = field(default_factory=dict)  # leaf: (k,) or (L, k), int32
    values: Arrays = field(default_factory=dict)  # leaf: as its support, base dtype
    dense: Arrays = field(default_factory=dict)  # leaf: the whole array, base dtype
    # site: {part: array}, float32
    added: dict[str, Arrays] = field(default_factory=dict)
    method: Method = field(default_factory=Method)  # `Method()` says nothing
    word: str = ""  # name of the method; one that is not of its class is replaced
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the run
    base_model: str = ""
    base_hash: str = ""  # SHA-256 of the base's weights, hexadecimal
    # leaf: what `leaf_digests` says of it in the base; empty: not known
    base_leaves: Mapping[str, str] = field(default_factory=dict)
    # What the base computes with them, as `base_config` returns it; empty: not known.
    base_config: Mapping[str, Json] = field(default_factory=dict)
    task: str = ""
    labels: tuple[str, ...] = ()  # empty for regression
    license: str = ""  # of what was trained, as the Hub names it, such as "mit"

    def __post_init__(self):
        method, word = self.method, self.word
        if isinstance(method, str):
            method, word = Method(), method
            require_no_settings(word, bool(self.added))
        elif not isinstance(method, Method):
            raise InputError(
                f"`method` must be a method, got {brief(method)}. Pass an "
                "instance, such as `LoRA(rank=4)`."
            )
        elif method != Method():
            words = [w for w, entry in METHODS.items() if entry.kind is type(method)]
            if word not in words:
                word = word_of(method) if words else ""
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "word", word)

    @property
    def entries(self) -> int:
        """Numbers in the file that are not positions."""
        arrays = [*self.values.values(), *self.dense.values()]
        arrays += [array for parts in self.added.values() for array in parts.values()]
        return sum(array.size for array in arrays)


def adapter_of(
    method: Method,
    roles: Any,
    params: Any,
    support: Any,
    added: Added,
    *,
    new: Sequence[str] = (),
    **about: Any,
) -> Adapter:
    """Returns what a method trained.

    Args:
      method: the method.
      roles: of the parameters, with their layouts as these are sharded.
      params: parameters, trained.
      support: tree of the supports of sparse leaves.
      added: the arrays that the method added, trained.
      new: leaves that the checkpoint of the base lacks. They are stored as a whole,
        however much of them was trained: the base alone does not define them.
      **about: other fields of `Adapter`.
    """
    require_named(jax.tree.leaves(leaf_names(params)), new)
    supports, values, dense = {}, {}, {}

    def collect(role: Role, leaf: jax.Array, entries: jax.Array) -> None:
        if role.kind == DENSE or role.name in new:
            dense[role.name] = fetch(leaf)
        elif role.kind == SPARSE:
            (positions,) = role.layout.to_positions(fetch(entries), leaf.shape)
            supports[role.name] = positions
            values[role.name] = read_entries(leaf, positions)

    map_roles(collect, roles, params, support)
    arrays = jax.tree.map(fetch, added)
    return Adapter(supports, values, dense, arrays, method, **about)


def require_named(names: Sequence[str], new: Sequence[str]) -> None:
    """Raises if new leaves are not of these names."""
    if unknown := sorted({*new} - {*names}):
        raise InputError(
            f"`new` must name leaves of the parameters, got {brief(unknown[0])}."
        )


def require_pair(place: str, name: str, adapter: Adapter, remedy: str) -> None:
    """Raises unless a leaf has as many positions as values, and nothing else."""
    support, values = adapter.support.get(name), adapter.values.get(name)
    if support is None or values is None or support.shape != values.shape:
        raise InputError(
            f"`{name}` in {place} must have as many positions as values. {remedy}"
        )
    if name in adapter.dense:
        raise InputError(
            f"`{name}` in {place} must be there as a whole or as some of its entries, "
            f"got both. {remedy}"
        )


def require_no_settings(word: str, has_added: bool) -> None:
    """Raises if a name alone does not say what the arrays of an adapter mean."""
    entry = METHODS.get(word)
    if has_added or (entry is not None and entry.adds_arrays):
        name = entry.kind.__name__ if entry is not None else "LoRA"
        raise InputError(
            "`method` must be the method that was trained, as its settings say what "
            f"the added arrays mean, got the name {word!r}. Pass `{name}(...)` with "
            "the settings of the training, or take `tuner.adapter(state)`."
        )

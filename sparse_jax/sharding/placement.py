"""Where parameters, batches and state lie on a mesh, and how they get there."""

import logging
import math
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from sparse_jax.compact.compact import CompactState
from sparse_jax.errors import InputError
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.hf.pretrained import from_pretrained
from sparse_jax.params.axes import BATCH_AXES, DATA, FSDP, SEQUENCE, TENSOR
from sparse_jax.params.names import leaf_names, map_named
from sparse_jax.sharding.processes import is_first_process
from sparse_jax.sharding.rules import RULES, Rules, shards_of, specs_of
from sparse_jax.supports.layout import Shards
from sparse_jax.supports.roles import SPARSE, Role, Roles, map_roles
from sparse_jax.transforms.adam_8bit import decoded, encoded

__all__ = ["Placement", "load_placed", "moved"]

_log = logging.getLogger(__name__)

# Leaves that a remark names.
_NAMED = 3


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the arrays of a run lie. One device is a mesh of one.

    Attributes:
      mesh: devices with the axes data, fsdp and tensor.
      specs: tree of the partitions of the parameters.
      whole: leaves that an axis does not divide, and the bytes that each device holds
        more than if it did.
    """

    mesh: jax.sharding.Mesh
    specs: object
    whole: Mapping[str, int]

    @classmethod
    def of(
        cls, params: optax.Params, mesh: jax.sharding.Mesh, rules: Rules = RULES
    ) -> "Placement":
        """Returns the placement of a model, from its parameters or their shapes.

        Raises:
          InputError: if the mesh lacks an axis, or one of its axes divides no leaf.
        """
        axes = (DATA, FSDP, TENSOR)
        if missing := [axis for axis in axes if axis not in mesh.shape]:
            raise InputError(
                f"`mesh` must have the axes {', '.join(axes)}, got "
                f"{', '.join(map(str, mesh.shape))} without {missing[0]}. Make it by "
                "`make_mesh`."
            )
        specs, whole = specs_of(params, dict(mesh.shape), rules)
        return cls(mesh, specs, whole)

    @property
    def remark(self) -> str | None:
        """What leaves that an axis does not divide cost, None if there are none."""
        if not self.whole:
            return None
        names = [*self.whole][:_NAMED]
        more = len(self.whole) - len(names)
        return (
            f"the mesh does not divide {', '.join(names)}"
            f"{f' and {more} more leaves' if more else ''}: every device holds "
            f"{sum(self.whole.values()) / 1e6:.3g} MB more than its share"
        )

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The axes of replicas, none if there is one only."""
        return (DATA,) if self.mesh.shape[DATA] > 1 else ()

    @property
    def shards_of_batch(self) -> int:
        """The parts that a batch is split into."""
        return int(np.prod([self.mesh.shape[axis] for axis in BATCH_AXES]))

    @cached_property
    def params(self) -> Any:
        """The shardings of the parameters."""
        return jax.tree.map(self.at, self.specs)

    @property
    def replicated(self) -> jax.NamedSharding:
        """The sharding of an array that every device has all of."""
        return self.at(jax.P())

    def active(self) -> AbstractContextManager:
        """Returns a context in which arrays of the run can be worked on."""
        return jax.set_mesh(self.mesh)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a compiled function whose results every process can read."""
        program = jax.jit(function, out_shardings=self.replicated)

        @wraps(function)
        def call(*args: object) -> object:
            with self.active():
                return program(*args)

        return call

    def shards(self, stack: str | None) -> dict[str, Shards]:
        """Returns how leaves are sharded, for `Compact`."""
        return shards_of(self.specs, dict(self.mesh.shape), stack)

    def at(self, spec: jax.P) -> jax.NamedSharding:
        """Returns a sharding on this mesh."""
        return jax.NamedSharding(self.mesh, spec)

    def require_batch(
        self, batch_size: int, accumulate: int = 1, length: int | None = None
    ) -> None:
        """Raises unless the devices divide a batch, and the longest of its rows.

        Raises:
          InputError: naming the numbers.
        """
        rows = batch_size // accumulate
        if rows % self.shards_of_batch:
            sizes = " * ".join(f"{axis}={self.mesh.shape[axis]}" for axis in BATCH_AXES)
            parts = f" / {accumulate}" if accumulate > 1 else ""
            raise InputError(
                f"`batch_size`{parts} must be a multiple of {self.shards_of_batch}, "
                f"the devices that share a batch ({sizes}), got {rows}. Change it, or "
                "the mesh."
            )
        parts = self.mesh.shape.get(SEQUENCE, 1)
        if length is not None and length % parts:
            raise InputError(
                f"`max_length` must be a multiple of {parts}, the devices that share a "
                f"row ({SEQUENCE}={parts}), got {length}. Change it, or the mesh."
            )

    def batch(self, accumulate: int = 1) -> jax.NamedSharding:
        """Returns the sharding of every array of a batch."""
        return self.at(jax.P(None, BATCH_AXES) if accumulate > 1 else jax.P(BATCH_AXES))

    def put(
        self, batch: Mapping[str, np.ndarray], accumulate: int = 1
    ) -> dict[str, jax.Array]:
        """Returns a batch, the same on every process, on the devices of the mesh."""
        sharding = self.batch(accumulate)
        # Evaluation may have a batch that the devices do not divide.
        if next(iter(batch.values())).shape[accumulate > 1] % self.shards_of_batch:
            sharding = self.replicated
        return {name: _put(array, sharding) for name, array in batch.items()}

    def supports(self, roles: Roles, support: object) -> Any:
        """Returns the shardings of supports, as their layouts say."""
        one = lambda role, support: self.at(role.layout.spec(role.stacked))
        return map_roles(one, roles, support, only=(SPARSE,))

    def state(self, roles: Roles, state: CompactState) -> CompactState:
        """Returns the shardings of a state, from the state or its shapes.

        What belongs to a leaf, wherever it is, lies where the leaf lies; the rest is
        on every device.
        """
        rest = self.trained(roles, state._replace(params=()))
        return rest._replace(params=self.params)

    def trained(self, roles: Roles, state: CompactState) -> CompactState:
        """Returns the shardings of a state that has packed values for parameters."""
        packed: dict[str, jax.P] = {}

        def note(role: Role, spec: jax.P) -> None:
            of_values = role.layout.packed_spec(role.stacked)
            packed[role.name] = of_values if role.kind == SPARSE else spec

        map_roles(note, roles, self.specs)

        def owned(name: str, leaf: jax.Array) -> jax.NamedSharding:
            owner = _owner(name, packed)
            spec = jax.P() if owner is None else packed[owner]
            return self.at(spec) if self._divides(spec, leaf) else self.replicated

        rest = map_named(owned, state._replace(support=()))
        return rest._replace(support=self.supports(roles, state.support))

    def _divides(self, spec: jax.P, leaf: jax.Array) -> bool:
        """Returns whether an array can lie as a partition says."""
        if len(spec) > len(leaf.shape):
            return False
        parts = (np.atleast_1d([] if axes is None else axes) for axes in spec)
        numbers = [math.prod(self.mesh.shape[axis] for axis in axes) for axes in parts]
        return not any(n % parts for n, parts in zip(leaf.shape, numbers, strict=False))

    def hold(self, roles: Roles, state: CompactState) -> CompactState:
        """Puts such a state from the host, the same on every process, on the mesh."""
        return jax.tree.map(_put, state, self.trained(roles, state))


def load_placed(
    mesh: jax.sharding.Mesh, folder: Path, **options: Any
) -> tuple[Model, Params, Placement]:
    """Loads a model; every device reads its own parts of the parameters.

    Args:
      mesh: where the parameters will lie.
      folder: of the model.
      **options: of `from_pretrained`.

    Raises:
      InputError: as `from_pretrained`, or if an axis of the mesh divides no leaf.
    """
    place = lambda shapes: Placement.of(shapes, mesh).params
    model, params = from_pretrained(folder, place=place, **options)
    placement = Placement.of(params, mesh)
    if placement.remark is not None and is_first_process():
        _log.warning("%s", placement.remark)
    return model, params, placement


def moved(
    state: CompactState,
    roles: Roles,
    params: optax.Params,
    old: Mapping[str, Shards],
    new: Mapping[str, Shards],
    begin: Callable[..., CompactState],
) -> CompactState:
    """Returns a state on the host with its supports sharded in another way.

    Packed values, masters and what the optimizer keeps move with the entries that they
    belong to.

    Args:
      state: arrays of the host, with packed values for parameters.
      roles: of all leaves in one piece.
      params: the whole leaves, or their shapes.
      old: how leaves were sharded, by name; those that were not are left out.
      new: how they are to be sharded.
      begin: (params, support, added) -> a state in which nothing has been updated.
    """
    if old == new:
        return state
    # Codes mean nothing in another block.
    state = state._replace(opt_state=_on_host(decoded(state.opt_state)))
    supports: dict[str, np.ndarray] = {}
    note = lambda role, support: supports.update({role.name: support})
    map_roles(note, roles, state.support, only=(SPARSE,))
    rest = state._replace(support=())
    leaves, tree = jax.tree.flatten(rest)
    owners = [_owner(name, supports) for name in jax.tree.leaves(leaf_names(rest))]

    def move(role: Role, support: np.ndarray, leaf: jax.Array) -> np.ndarray:
        before, after = (role.layout.sharded(way.get(role.name)) for way in (old, new))
        if before == after:
            return support
        shape = before.packed_shape(support.shape, role.shape)
        numbers = range(len(leaves))
        places = [
            i for i in numbers if owners[i] == role.name and leaves[i].shape == shape
        ]
        packed = [leaves[i] for i in places]
        whole = before.to_positions(support, leaf.shape, *packed)
        found = after.from_positions(whole[0], leaf.shape, *whole[1:])
        for i, values in zip(places, found[1:], strict=True):
            leaves[i] = values
        return found[0]

    support = map_roles(move, roles, state.support, params, only=(SPARSE,))
    state = jax.tree.unflatten(tree, leaves)._replace(support=support)
    like = jax.eval_shape(begin, params, support, state.added).opt_state
    return state._replace(opt_state=_on_host(encoded(state.opt_state, like)))


def _on_host(tree: optax.OptState) -> optax.OptState:
    """Returns a tree of arrays of the host; keys stay what they are."""
    is_key = lambda leaf: jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else np.asarray(leaf), tree)


def _put(array: np.ndarray | jax.Array, sharding: jax.NamedSharding) -> jax.Array:
    """Puts an array, the same on every process, where a sharding says."""
    if isinstance(array, jax.Array) or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )


def _owner(name: str, leaves: Container[str]) -> str | None:
    """Returns which of some leaves the end of a name is, None for other names."""
    parts = name.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in leaves), None)

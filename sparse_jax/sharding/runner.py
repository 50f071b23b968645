"""The runner: the compiled functions of a tuner, on a mesh of one device or more."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from sparse_jax.compact.by_batches import first_of
from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.compact.selection import reselect
from sparse_jax.methods.sites import Added
from sparse_jax.sharding.placement import Placement
from sparse_jax.supports.roles import SPARSE, Role, Roles, map_roles

__all__ = ["MeshRunner"]

# Room in the first supports beyond an even share; a second selection follows where it
# is not enough.
_HEADROOM = 1.25


class MeshRunner:
    """Runs a tuner on a mesh: the numbers of one device, up to the order of sums.

    Every leaf, its support, and what the optimizer keeps for it lie on the same
    devices. Selecting sends counts, beside the gradient itself; updating sends nothing.
    States and parameters that go in are donated.

    Args:
      tuner: made with the `shards` and `data_axes` of the placement.
      placement: where the parameters lie.
    """

    def __init__(self, tuner: Tuner, placement: Placement):
        self.tuner, self.placement = tuner, placement
        self._init = _Compiled(tuner.init, placement, self._state, (0,))
        self._choose = _Compiled(tuner.choose, placement, self._after_choice)
        self._select = _Compiled(tuner.select, placement, self._after_update, (0,))
        again = functools.partial(reselect, tuner)
        self._reselect = _Compiled(again, placement, self._after_update, (0,))
        self._begin = _Compiled(self._shortened, placement, self._state, (0,))
        self._update = _Compiled(self._step, placement, self._after_update, (0,))

    def init(self, params: optax.Params, key: jax.Array) -> CompactState:
        """Returns the state before the selection; parameters are placed already."""
        return self._init(params, key, capacity=self._first_capacity(params))

    def take_over(self, state: CompactState, key: jax.Array) -> CompactState:
        """Returns the state before the selection, from that of another runner."""
        return self.init(state.params, first_of(key))._replace(added=state.added)

    def start(self, state: CompactState, added: Mapping[str, object]) -> CompactState:
        """Returns a state before any update, whose method starts from these arrays."""
        like = jax.tree.map(lambda leaf: leaf.sharding, state.added)
        placed = jax.device_put(added, like)
        return self._begin(state.params, state.support, placed, capacity={})

    def select(
        self,
        state: CompactState,
        batch: object,
        key: jax.Array,
        avoid: Mapping[str, jax.Array] | None = None,
        *,
        is_again: bool = False,
    ) -> tuple[CompactState, bool]:
        """Chooses the supports; also returns whether the gradient was finite.

        With several keys the gradients of as many batches are summed, as of
        `Compact.select`. If it is done again, the state of the optimizer is carried
        over; else masters and optimizer states are made after it, so that a selection
        does not need room for them, and after a gradient that is not finite the state
        is one of `init`.
        Supports of shards that turn out too short are made again, and those with too
        much room are shortened: a second selection costs a backward pass, unused places
        would cost memory for as long as the run lasts.
        """
        has_lengths = bool(self.tuner.shards)
        at_once = not has_lengths and (is_again or not jax.tree.leaves(state.support))
        if not at_once:
            state = _without_optimizer(state)
        args = (batch, key, avoid or {})
        if at_once:
            select = self._reselect if is_again else self._select
            state, finite = select(state, *args)
            return state, bool(finite)
        if has_lengths:
            return self._select_shards(state, *args)
        support, finite, _ = self._choose(state, *args)
        if not bool(finite):
            return self.take_over(state, key), False
        return self._begin(state.params, support, state.added, capacity={}), True

    def _select_shards(
        self, state: CompactState, batch: object, key: jax.Array, *rest: object
    ) -> tuple[CompactState, bool]:
        """Chooses the supports of shards, whose lengths are to be found."""
        roles = self.tuner.roles(state.params)
        support, finite, counts = self._choose(state, batch, key, *rest)
        if not bool(finite):
            return self.take_over(state, key), False
        most = lambda role, counts: float(jnp.max(counts))
        needed = self._capacity(roles, most, counts)
        found: dict[str, int] = {}
        note = lambda role, support: found.update({role.name: support.shape[-1]})
        map_roles(note, roles, support, only=(SPARSE,))
        if any(length > found[name] for name, length in needed.items()):
            longer = self._init(state.params, first_of(key), capacity=needed)
            longer = _without_optimizer(longer._replace(added=state.added))
            return self._select_shards(longer, batch, key, *rest)
        begun = self._begin(state.params, support, state.added, capacity=needed)
        return begun, True

    def step(
        self, state: CompactState, batch: object, key: jax.Array, **extra_args: object
    ) -> tuple[CompactState, dict[str, jax.Array]]:
        """Makes one update; extra arguments are those of the optimizer."""
        return self._update(state, batch, key, extra_args)

    def abstract(self, params: optax.Params, key: jax.Array) -> CompactState:
        """Returns the shapes and shardings of the state that `init` returns."""
        capacity = self._first_capacity(params)
        init = lambda params, key: self.tuner.init(params, key, capacity)
        with _automatic(self.placement.mesh):
            shapes = jax.eval_shape(init, params, key)
        return jax.tree.map(_placed, shapes, self._state(shapes))

    def lower(
        self, state: CompactState, batch: object, key: jax.Array, **extra_args: object
    ) -> jax.stages.Lowered:
        """Returns the program of `step` for shapes, for devices that may be absent."""
        return self._update.lower(state, batch, key, extra_args)

    def lower_choice(
        self, state: CompactState, batch: object, key: jax.Array
    ) -> jax.stages.Lowered:
        """Returns the program that chooses supports, as `lower` that of `step`."""
        return self._choose.lower(state, batch, key)

    def _after_choice(self, out: Any, state: CompactState, *args: object) -> tuple:
        """Returns the shardings of what `choose` returns."""
        del args
        support = self.placement.supports(self.tuner.roles(state.params), out[0])
        return support, *self._replicated(out[1:])

    def _step(
        self,
        state: CompactState,
        batch: object,
        key: jax.Array,
        extra_args: Mapping[str, object],
    ) -> tuple[CompactState, dict[str, jax.Array]]:
        """Makes one update."""
        return self.tuner.step(state, batch, key, **extra_args)

    def _state(self, state: CompactState, *args: object) -> CompactState:
        """Returns the shardings of a state."""
        del args
        return self.placement.state(self.tuner.roles(state.params), state)

    def _after_update(
        self, out: tuple[CompactState, object], *args: object
    ) -> tuple[CompactState, object]:
        """Returns the shardings of a state and of what is returned with it."""
        del args
        return self._state(out[0]), self._replicated(out[1])

    def _shortened(
        self,
        params: optax.Params,
        support: object,
        added: Added,
        capacity: Mapping[str, int],
    ) -> CompactState:
        """Returns the state with supports shortened to some length."""
        shorten = lambda role, support: support[..., : capacity.get(role.name)]
        roles = self.tuner.roles(params)
        short = map_roles(shorten, roles, support, only=(SPARSE,))
        return self.tuner.begin(params, short, added)

    def _first_capacity(self, params: optax.Params) -> dict[str, int]:
        """Returns the length of the supports of shards before entries are counted."""

        def share(role: Role, leaf: object) -> float:
            del leaf
            shards = role.layout.shards
            parts = 1 if shards is None else shards.number
            return _HEADROOM * self.tuner.method.support_size(role) / parts

        return self._capacity(self.tuner.roles(params), share, params)

    def _capacity(
        self, roles: Roles, most: Callable[[Role, jax.Array], float], tree: object
    ) -> dict[str, int]:
        """Returns the length of supports, of the leaves whose shards differ in it.

        Args:
          roles: of all leaves.
          most: (role, leaf) -> entries of the fullest shard.
          tree: with the leaves.
        """
        found: dict[str, int] = {}

        def add(role: Role, leaf: jax.Array) -> None:
            length = role.layout.capacity(most(role, leaf), role.shape)
            if length is not None:
                found[role.name] = length

        map_roles(add, roles, tree, only=(SPARSE,))
        return found

    def _replicated(self, tree: object) -> Any:
        """Returns shardings that put all of every array on every device."""
        return jax.tree.map(lambda _: self.placement.replicated, tree)


def _without_optimizer(state: CompactState) -> CompactState:
    """Returns a state whose masters and optimizer states have been given up."""
    for leaf in jax.tree.leaves((state.masters, state.opt_state)):
        leaf.delete()
    return state._replace(masters=(), opt_state=())


class _Compiled:
    """A function of arrays on a mesh, compiled once for every shape and capacity.

    Args:
      function: of arrays and, where it is called with one, a `capacity`.
      placement: of its arguments, or they are the same on every process.
      shardings: (shapes of what it returns, of its arguments...) -> their shardings.
      donated: arguments whose memory the results may take.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        placement: Placement,
        shardings: Callable[..., Any],
        donated: tuple[int, ...] = (),
    ):
        self._function, self._placement = function, placement
        self._shardings, self._donated = shardings, donated
        self._programs: dict[object, Callable[..., Any]] = {}

    def __call__(self, *args: object, **static: Mapping[str, int]) -> Any:
        """Calls the function."""
        leaves, tree = jax.tree.flatten(args)
        lengths = tuple(tuple(capacity.items()) for capacity in static.values())
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        place = tree, shapes, lengths
        if place not in self._programs:
            self._programs[place] = self._program(args, **static)
        with self._placement.active():
            return self._programs[place](*args)

    def lower(self, *args: object) -> jax.stages.Lowered:
        """Returns the program for arguments or their shapes."""
        with self._placement.active():
            return self._program(args).lower(*args)

    def _program(self, args: tuple, **static: Mapping[str, int]) -> jax.stages.Wrapped:
        """Returns the function for arguments of these shapes."""
        mesh, function = self._placement.mesh, self._function
        if static:
            function = lambda *args: self._function(*args, **static)
        is_automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
        if mesh.size == 1 and is_automatic:
            # One device has one sharding: no need to trace the function to find it.
            out = self._placement.replicated
        else:
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args
            )
            with _automatic(mesh):
                out = self._shardings(jax.eval_shape(function, *shapes), *shapes)
        if not is_automatic:
            # Models leave the sharding of what is in between to the compiler.
            axes = mesh.axis_names
            function = jax.sharding.auto_axes(function, axes=axes, out_sharding=out)
        return jax.jit(function, out_shardings=out, donate_argnums=self._donated)


def _automatic(mesh: jax.sharding.Mesh) -> AbstractContextManager:
    """Returns the context of a mesh whose axes are the compiler's."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return jax.set_mesh(
        jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    )


def _placed(
    shape: jax.ShapeDtypeStruct, sharding: jax.NamedSharding
) -> jax.ShapeDtypeStruct:
    """Returns a shape with its sharding."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

"""Runners: the compiled functions of a tuner, on one device or on a mesh."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from sparse_jax.compact.compact import Compact, CompactState
from sparse_jax.sharding.placement import Placement
from sparse_jax.supports.roles import SPARSE, Role, map_roles

__all__ = ["MeshRunner", "Runner", "SingleRunner"]

# Room in the first supports beyond an even share; a second selection follows where it
# is not enough.
_HEADROOM = 1.25


class Runner(Protocol):
    """What a loop needs of a tuner. States that go in are given away."""

    def init(self, params: Any, key: jax.Array) -> CompactState:
        """Returns the state before the selection."""
        ...

    def select(
        self, state: CompactState, batch: Any, key: jax.Array
    ) -> tuple[CompactState, bool]:
        """Chooses the supports; says whether the gradient was finite."""
        ...

    def step(
        self, state: CompactState, batch: Any, key: jax.Array, **extra_args: Any
    ) -> tuple[CompactState, dict[str, jax.Array]]:
        """Makes one update; extra arguments are those of the optimiser."""
        ...


class SingleRunner:
    """Runs on one device. The methods are those of `Runner`."""

    def __init__(self, tuner: Compact):
        # The loaded weights become those of the state: there is one copy of them.
        self.init = jax.jit(tuner.init, donate_argnums=0)
        self.step = jax.jit(tuner.step, donate_argnums=0)
        self._select = jax.jit(tuner.select, donate_argnums=0)

    def select(
        self, state: CompactState, batch: Any, key: jax.Array
    ) -> tuple[CompactState, bool]:
        """Chooses the supports; says whether the gradient was finite."""
        state, finite = self._select(state, batch, key)
        return state, bool(finite)


class MeshRunner:
    """Runs on a mesh: the numbers are those of one device, up to the order of sums.

    Every leaf, its support, and what the optimiser keeps for it lie on the same
    devices. Selecting sends counts, beside the gradient itself; updating sends nothing.
    The methods are those of `Runner`.

    Args:
      tuner: made with the `shards` and `data_axes` of the placement.
      placement: where the parameters lie.
    """

    def __init__(self, tuner: Compact, placement: Placement):
        self.tuner, self.placement = tuner, placement
        self._mesh = placement.mesh
        names = self._mesh.axis_names
        self._automatic = jax.sharding.Mesh(
            self._mesh.devices, names, axis_types=(AxisType.Auto,) * len(names)
        )
        self._compiled: dict[Any, Any] = {}

    def init(self, params: Any, key: jax.Array) -> CompactState:
        """Returns the state before the selection; parameters are placed already."""
        return self._init(params, key, self._first_capacity(params))

    def select(
        self, state: CompactState, batch: Any, key: jax.Array
    ) -> tuple[CompactState, bool]:
        """Chooses the supports; says whether the gradient was finite.

        Supports of shards that turn out too short are made again, and those with too
        much room are shortened: a second selection costs a backward pass, unused places
        would cost memory for as long as the run lasts.
        """
        roles = self.tuner.roles(state.params)
        place = self._after_choice(roles)
        support, finite, counts = self._run(
            self.tuner.choose, place, (), state, batch, key
        )
        if not bool(finite):
            return state, False
        most = lambda role, counts: float(jnp.max(counts))
        needed = self._capacity(roles, most, counts)
        found: dict[str, int] = {}
        note = lambda role, support: found.update({role.name: support.shape[-1]})
        map_roles(note, roles, support, only=(SPARSE,))
        if any(length > found[name] for name, length in needed.items()):
            longer = self._init(state.params, key, needed)
            return self.select(longer._replace(added=state.added), batch, key)
        return self._begin(state, support, needed), True

    def step(
        self, state: CompactState, batch: Any, key: jax.Array, **extra_args: Any
    ) -> tuple[CompactState, dict[str, jax.Array]]:
        """Makes one update; extra arguments are those of the optimiser."""
        args = (state, batch, key, extra_args)
        return self._run(self._step, self._after_step, (0,), *args)

    def abstract(self, params: Any, key: Any) -> CompactState:
        """Returns the shapes of the state, as of `init`, and where they lie."""
        capacity = self._first_capacity(params)
        init = lambda params, key: self.tuner.init(params, key, capacity)
        with jax.set_mesh(self._automatic):
            shapes = jax.eval_shape(init, params, key)
        return jax.tree.map(_placed, shapes, self._place(shapes))

    def lower(
        self, state: CompactState, batch: Any, key: Any, **extra_args: Any
    ) -> jax.stages.Lowered:
        """Returns the program of `step` for shapes, for devices that may be absent."""
        args = (state, batch, key, extra_args)
        with jax.set_mesh(self._mesh):
            step = self._compile(self._step, self._after_step, (0,), args)
            return step.lower(*args)

    def lower_choice(self, state: CompactState, batch: Any, key: Any) -> Any:
        """Returns the program that chooses supports, as `lower` that of `step`."""
        args, choose = (state, batch, key), self.tuner.choose
        with jax.set_mesh(self._mesh):
            place = self._after_choice(self.tuner.roles(state.params))
            return self._compile(choose, place, (), args).lower(*args)

    def _after_choice(self, roles: Any) -> Callable[[Any], Any]:
        """Returns where supports, and what is said about them, lie."""
        placed = lambda support: self.placement.supports(roles, support)
        return lambda out: (placed(out[0]), *self._whole(out[1:]))

    def _step(self, state: CompactState, batch: Any, key: Any, extra_args: Any) -> Any:
        """Makes one update."""
        return self.tuner.step(state, batch, key, **extra_args)

    def _after_step(self, out: Any) -> Any:
        """Returns where a state and metrics lie."""
        return self._place(out[0]), self._whole(out[1])

    def _place(self, state: CompactState) -> CompactState:
        """Returns where a state lies."""
        return self.placement.state(self.tuner.roles(state.params), state)

    def _init(
        self, params: Any, key: jax.Array, capacity: Mapping[str, int]
    ) -> CompactState:
        """Returns a state with empty supports of some length."""
        init = lambda params, key: self.tuner.init(params, key, capacity)
        static = tuple(capacity.items())
        return self._run(init, self._place, (0,), params, key, static=static)

    def _begin(
        self, state: CompactState, support: Any, capacity: Mapping[str, int]
    ) -> CompactState:
        """Returns the state with supports shortened to some length."""

        def shorten(role: Role, support: jax.Array) -> jax.Array:
            return support[..., : capacity.get(role.name)]

        def begin(params: Any, support: Any, added: Any) -> CompactState:
            roles = self.tuner.roles(params)
            short = map_roles(shorten, roles, support, only=(SPARSE,))
            return self.tuner.begin(params, short, added)

        args = (state.params, support, state.added)
        static = tuple(capacity.items())
        return self._run(begin, self._place, (0,), *args, static=static)

    def _first_capacity(self, params: Any) -> dict[str, int]:
        """Returns the length of the supports of shards before entries are counted."""

        def share(role: Role, leaf: Any) -> float:
            del leaf
            shards = role.layout.shards
            parts = 1 if shards is None else shards.number
            return _HEADROOM * self.tuner.method.support_size(role) / parts

        return self._capacity(self.tuner.roles(params), share, params)

    def _capacity(
        self, roles: Any, most: Callable[[Role, Any], float], tree: Any
    ) -> dict[str, int]:
        """Returns the length of supports, of the leaves whose shards differ in it.

        Args:
          roles: of all leaves.
          most: (role, leaf) -> entries of the fullest shard.
          tree: with the leaves.
        """
        found: dict[str, int] = {}

        def add(role: Role, leaf: Any) -> None:
            length = role.layout.capacity(most(role, leaf), role.size)
            if length is not None:
                found[role.name] = length

        map_roles(add, roles, tree, only=(SPARSE,))
        return found

    def _whole(self, tree: Any) -> Any:
        """Returns shardings that put all of every array on every device."""
        return jax.tree.map(lambda _: self.placement.at(jax.P()), tree)

    def _run(
        self,
        function: Callable[..., Any],
        shardings: Callable[[Any], Any],
        donated: tuple[int, ...],
        *args: Any,
        static: tuple = (),
    ) -> Any:
        """Calls a function of global arrays, compiled once for every shape.

        Args:
          function: the function.
          shardings: shapes of what it returns -> their shardings.
          donated: arguments that are given away.
          *args: arrays on the mesh, or the same on every process.
          static: what the function knows beside its arguments.
        """
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        place = (getattr(function, "__qualname__", ""), tree, shapes, static)
        if place not in self._compiled:
            self._compiled[place] = self._compile(function, shardings, donated, args)
        with jax.set_mesh(self._mesh):
            return self._compiled[place](*args)

    def _compile(
        self,
        function: Callable[..., Any],
        shardings: Callable[[Any], Any],
        donated: tuple[int, ...],
        args: tuple,
    ) -> Any:
        """Returns the compiled function."""
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args
        )
        with jax.set_mesh(self._automatic):
            out = shardings(jax.eval_shape(function, *shapes))
        if any(kind != AxisType.Auto for kind in self._mesh.axis_types):
            # Models leave the sharding of what is in between to the compiler.
            axes = self._mesh.axis_names
            function = jax.sharding.auto_axes(function, axes=axes, out_sharding=out)
        return jax.jit(function, out_shardings=out, donate_argnums=donated)


def _placed(shape: Any, sharding: jax.NamedSharding) -> jax.ShapeDtypeStruct:
    """Returns a shape with its sharding."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

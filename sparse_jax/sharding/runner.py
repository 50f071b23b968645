"""Runners: the compiled functions of a tuner, on one device or on a mesh."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from sparse_jax.compact.compact import Compact, CompactState
from sparse_jax.params.roles import SPARSE, Role, map_roles
from sparse_jax.sharding.placement import Placement
from sparse_jax.supports.granularity import ENTRY
from sparse_jax.supports.sharded import LocalSupport, map_supports

__all__ = ["MeshRunner", "Runner", "SingleRunner"]

# Room in the first tables beyond an even share; a second selection follows where it is
# not enough.
_HEADROOM = 1.25
# Tables end at a multiple of this, the width of a vector register of a TPU.
_LANES = 128


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
      tuner: made with the `cuts` and `data_axes` of the placement.
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
        return self._init(params, key, self._first_slots(params))

    def select(
        self, state: CompactState, batch: Any, key: jax.Array
    ) -> tuple[CompactState, bool]:
        """Chooses the supports; says whether the gradient was finite.

        Tables that turn out too short are made again, and those with too much room
        are cut: a second selection costs a backward pass, unused slots would cost
        memory for as long as the run lasts.
        """
        support, finite, counts = self._run(
            self.tuner.choose, self._after_choice, (), state, batch, key
        )
        if not bool(finite):
            return state, False
        needed = self._needed(state.params, counts)
        found: dict[str, int] = {}
        map_supports(lambda name, node: found.update({name: node.shape[-1]}), support)
        if any(slots > found[name] for name, slots in needed.items()):
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
        slots = self._first_slots(params)
        init = lambda params, key: self.tuner.init(params, key, slots)
        with jax.set_mesh(self._automatic):
            shapes = jax.eval_shape(init, params, key)
        return jax.tree.map(_placed, shapes, self.placement.state(shapes))

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
            return self._compile(choose, self._after_choice, (), args).lower(*args)

    def _after_choice(self, out: Any) -> Any:
        """Returns where supports, and what is said about them, lie."""
        return self.placement.supports(out[0]), *self._whole(out[1:])

    def _step(self, state: CompactState, batch: Any, key: Any, extra_args: Any) -> Any:
        """Makes one update."""
        return self.tuner.step(state, batch, key, **extra_args)

    def _after_step(self, out: Any) -> Any:
        """Returns where a state and metrics lie."""
        return self.placement.state(out[0]), self._whole(out[1])

    def _init(
        self, params: Any, key: jax.Array, slots: Mapping[str, int]
    ) -> CompactState:
        """Returns a state with empty tables of some length."""
        init = lambda params, key: self.tuner.init(params, key, slots)
        lengths = tuple(slots.items())
        place = self.placement.state
        return self._run(init, place, (0,), params, key, static=lengths)

    def _begin(
        self, state: CompactState, support: Any, slots: Mapping[str, int]
    ) -> CompactState:
        """Returns the state with supports cut to some length."""

        def cut(name: str, node: Any) -> Any:
            if not isinstance(node, LocalSupport):
                return node
            return replace(node, positions=node.positions[..., : slots[name]])

        def begin(params: Any, support: Any, added: Any) -> CompactState:
            return self.tuner.begin(params, map_supports(cut, support), added)

        args = (state.params, support, state.added)
        lengths = tuple(slots.items())
        return self._run(begin, self.placement.state, (0,), *args, static=lengths)

    def _first_slots(self, params: Any) -> dict[str, int]:
        """Returns the slots of every cut leaf before its entries are counted."""

        def share(role: Role, leaf: Any) -> float:
            del leaf
            cut = self.tuner.cuts[role.name]
            return _HEADROOM * self.tuner.method.support_size(role) / cut.shards

        return self._slots(params, share, params)

    def _needed(self, params: Any, counts: Any) -> dict[str, int]:
        """Returns the slots that the chosen entries of every cut leaf need."""
        return self._slots(params, lambda role, counts: int(jnp.max(counts)), counts)

    def _slots(
        self, params: Any, entries: Callable[[Role, Any], float], tree: Any
    ) -> dict[str, int]:
        """Returns slots for the entries of the fullest shard of every cut leaf."""
        found: dict[str, int] = {}

        def add(role: Role, leaf: Any) -> None:
            cut = self.tuner.cuts.get(role.name)
            if cut is not None and self.tuner.method.unit == ENTRY:
                block = role.size // cut.shards
                found[role.name] = _rounded(entries(role, leaf), block)

        map_roles(add, self.tuner.method.roles(params), tree, only=(SPARSE,))
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


def _rounded(entries: float, block: int) -> int:
    """Returns a number of slots that ends at a full register, or at the block.

    Example:
      >>> _rounded(130, 1000), _rounded(130, 200), _rounded(0, 1000)
      (256, 200, 128)
    """
    registers = max(1, math.ceil(entries / _LANES))
    return min(block, registers * _LANES)

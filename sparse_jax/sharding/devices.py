"""Devices: one, or a mesh of them, with everything that a run asks of them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sparse_jax.compact.compact import Compact, CompactState
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.runner import MeshRunner, Runner, SingleRunner
from sparse_jax.supports.layout import Shards

__all__ = ["Devices", "MeshDevices", "OneDevice"]


class Devices(Protocol):
    """Where a run takes place."""

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The axes of replicas, for `Compact`."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """Returns a context in which arrays of the run can be worked on."""
        ...

    def shards(self, stack: str | None) -> dict[str, Shards]:
        """Returns how leaves are sharded, for `Compact`."""
        ...

    def require_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises `InputError` unless a batch can be shared."""
        ...

    def put(self, batch: Mapping[str, Any], accumulate: int = 1) -> Any:
        """Returns a batch where it is used."""
        ...

    def hold(self, roles: Any, state: CompactState) -> CompactState:
        """Returns a state of packed values, read from a file, where it is used."""
        ...

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a compiled function whose results every process can read."""
        ...

    def runner(self, tuner: Compact) -> Runner:
        """Returns the compiled functions of a tuner."""
        ...


class OneDevice:
    """The device that JAX takes by itself. The members are those of `Devices`."""

    data_axes: tuple[str, ...] = ()

    def active(self) -> AbstractContextManager[Any]:
        """Returns a context that does nothing."""
        return nullcontext()

    def shards(self, stack: str | None) -> dict[str, Shards]:
        """Returns nothing: no leaf is sharded."""
        del stack
        return {}

    def require_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Accepts every batch."""

    def put(self, batch: Mapping[str, Any], accumulate: int = 1) -> Any:
        """Returns the batch."""
        del accumulate
        return batch

    def hold(self, roles: Any, state: CompactState) -> CompactState:
        """Puts a state on the device."""
        del roles
        return jax.tree.map(jnp.asarray, state)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the compiled function."""
        return jax.jit(function)

    def runner(self, tuner: Compact) -> Runner:
        """Returns the compiled functions of a tuner."""
        return SingleRunner(tuner)


class MeshDevices(OneDevice):
    """The devices of a mesh. The members are those of `Devices`."""

    def __init__(self, placement: Placement):
        self.placement = placement
        self.data_axes = placement.data_axes

    def active(self) -> AbstractContextManager[Any]:
        """Returns the context of the mesh."""
        return jax.set_mesh(self.placement.mesh)

    def shards(self, stack: str | None) -> dict[str, Shards]:
        """Returns how leaves are sharded, for `Compact`."""
        return self.placement.shards(stack)

    def require_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises `InputError` unless the devices divide a batch."""
        self.placement.require_batch(batch_size, accumulate)

    def put(self, batch: Mapping[str, Any], accumulate: int = 1) -> Any:
        """Returns a batch on the mesh."""
        return self.placement.put(batch, accumulate)

    def hold(self, roles: Any, state: CompactState) -> CompactState:
        """Puts a state on the mesh."""
        return self.placement.hold(roles, state)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a compiled function whose results are on every device."""
        everywhere = self.placement.at(jax.P())
        compiled = jax.jit(function, out_shardings=everywhere)

        def call(*args: Any) -> Any:
            with jax.set_mesh(self.placement.mesh):
                return compiled(*args)

        return call

    def runner(self, tuner: Compact) -> Runner:
        """Returns the compiled functions of a tuner."""
        return MeshRunner(tuner, self.placement)

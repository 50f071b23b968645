"""Samplers that measure nothing: uniform, cyclic, given weights, given layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError, brief
from sparse_jax.samplers.sampler import Sampler

__all__ = ["Cyclic", "Fixed", "Middle", "Static", "Uniform"]


@dataclass(frozen=True, kw_only=True)
class Uniform(Sampler[tuple[()]]):
    """Draws layers uniformly, without replacement.

    With `hold=1` this is random sparse tuning, the control of IST (Yao et al., 2024);
    with two layers and `hold=20` it is LISA (Pan et al., 2024,
    https://arxiv.org/abs/2403.17919), which also trains embeddings and head.

    Example:
      >>> import jax
      >>> sampler = Uniform(num_layers=4, num_active=4)
      >>> sampler.draw((), jax.random.key(0), 0)
      Array([0, 1, 2, 3], dtype=int32)
    """


@dataclass(frozen=True, kw_only=True)
class Cyclic(Sampler[tuple[()]]):
    """Trains blocks of `num_active` layers in turn.

    In order, from the bottom up (or down, `descending`), as HiFT (Liu et al., 2024,
    https://arxiv.org/abs/2401.15207); or `shuffled` anew in every cycle, as BAdam
    (Luo et al., 2024, https://arxiv.org/abs/2404.02827), which holds a block for a
    hundred updates and restarts its optimizer state. Where `num_active` does not
    divide the layers, the last block of a cycle also takes some of the one before.

    Example:
      >>> sampler = Cyclic(num_layers=5, num_active=2)
      >>> [sampler.draw((), jax.random.key(0), turn).tolist() for turn in range(4)]
      [[0, 1], [2, 3], [3, 4], [0, 1]]
    """

    descending: bool = False
    shuffled: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.descending and self.shuffled:
            raise InputError(
                "`descending` and `shuffled` must not be given together. A shuffled "
                "cycle has no direction."
            )

    def draw(
        self, memory: tuple[()], key: jax.Array, turn: jax.typing.ArrayLike
    ) -> jax.Array:
        """Returns the block of a turn."""
        del memory
        blocks = -(-self.num_layers // self.num_active)
        place = jnp.asarray(turn, jnp.int32) % blocks
        start = jnp.minimum(place * self.num_active, self.num_layers - self.num_active)
        order = self._order(key, jnp.asarray(turn, jnp.int32) // blocks)
        return jnp.sort(jax.lax.dynamic_slice(order, (start,), (self.num_active,)))

    def _order(self, key: jax.Array, cycle: jax.Array) -> jax.Array:
        """Returns the layers in the order of a cycle."""
        if self.shuffled:
            draw_key = jax.random.fold_in(key, cycle)
            return jax.random.permutation(draw_key, self.num_layers).astype(jnp.int32)
        order = jnp.arange(self.num_layers, dtype=jnp.int32)
        return order[::-1] if self.descending else order


@dataclass(frozen=True, kw_only=True)
class Fixed(Sampler[tuple[()]]):
    """Draws layers without replacement in proportion to given numbers.

    OwLore (Li et al., 2024, https://arxiv.org/abs/2405.18380) takes the share of
    outliers in each layer.

    Raises:
      InputError: unless there is one number per layer, none negative, and enough of
        them positive.

    Example:
      >>> sampler = Fixed(num_layers=3, num_active=1, proportions=(0.0, 1.0, 0.0))
      >>> sampler.draw((), jax.random.key(0), 0)
      Array([1], dtype=int32)
    """

    proportions: tuple[float, ...]

    def __post_init__(self):
        super().__post_init__()
        _require_weights("proportions", self.proportions, self)

    @classmethod
    def fitted(cls, *, layer_weights: Sequence[float], **sizes: int) -> "Fixed":
        """Returns the sampler with the proportions that a run calls `layer_weights`."""
        _require_weights("layer_weights", layer_weights, Sampler(**sizes))
        return cls(**sizes, proportions=tuple(layer_weights))

    @property
    def reachable(self) -> tuple[int, ...]:
        """The layers of positive proportions."""
        numbers = enumerate(self.proportions)
        return tuple(layer for layer, proportion in numbers if proportion > 0)

    def weights(self, memory: tuple[()]) -> jax.Array:
        """Returns the proportions."""
        del memory
        return jnp.array(self.proportions, jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Middle(Sampler[tuple[()]]):
    """Always trains the layers in the middle: a baseline for measured choices.

    These are `num_active` in a row from layer floor((L - num_active) / 2).

    Example:
      >>> Middle(num_layers=6, num_active=2).draw((), jax.random.key(0), 0)
      Array([2, 3], dtype=int32)
    """

    @property
    def reachable(self) -> tuple[int, ...]:
        """The layers in the middle."""
        first = (self.num_layers - self.num_active) // 2
        return tuple(range(first, first + self.num_active))

    def draw(
        self, memory: tuple[()], key: jax.Array, turn: jax.typing.ArrayLike
    ) -> jax.Array:
        """Returns the layers in the middle."""
        del memory, key, turn
        return jnp.array(self.reachable, jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Static(Sampler[tuple[()]]):
    """Trains a fixed list of layers.

    Raises:
      InputError: unless the layers are `num_active` different ones of the model.

    Example:
      >>> Static.of(3, 1, num_layers=4).draw((), jax.random.key(0), 0)
      Array([1, 3], dtype=int32)
    """

    layers: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        inside = {layer for layer in self.layers if 0 <= layer < self.num_layers}
        if not len(inside) == len(self.layers) == self.num_active:
            raise InputError(
                f"`layers` must be {self.num_active} different numbers in "
                f"[0, {self.num_layers}), got {self.layers}."
            )

    @classmethod
    def fitted(
        cls, *, num_layers: int, layers: Sequence[int], **sizes: int
    ) -> "Static":
        """Returns the sampler of the layers that a run lists."""
        del sizes
        for layer in layers:
            if not 0 <= layer < num_layers:
                raise InputError(
                    f"`layers` must be in [0, {num_layers}), the layers of the model, "
                    f"got {layer}."
                )
        return cls.of(*layers, num_layers=num_layers)

    @classmethod
    def of(cls, *layers: int, num_layers: int) -> "Static":
        """Returns the sampler of some layers of a model."""
        return cls(num_layers=num_layers, num_active=len(layers), layers=layers)

    @property
    def reachable(self) -> tuple[int, ...]:
        """The list."""
        return tuple(sorted(self.layers))

    def weights(self, memory: tuple[()]) -> jax.Array:
        """Returns 1 for the layers of the list and 0 for the others."""
        del memory
        return (
            jnp.zeros(self.num_layers, jnp.float32).at[jnp.array(self.layers)].set(1.0)
        )

    def draw(
        self, memory: tuple[()], key: jax.Array, turn: jax.typing.ArrayLike
    ) -> jax.Array:
        """Returns the list."""
        del memory, key, turn
        return jnp.array(sorted(self.layers), jnp.int32)


def _require_weights(name: str, weights: Sequence[float], sizes: Sampler) -> None:
    """Raises unless there is a weight for every layer, and enough are positive."""
    if len(weights) != sizes.num_layers:
        raise InputError(
            f"`{name}` must have {sizes.num_layers} numbers, one for each layer of "
            f"the model, got {len(weights)}."
        )
    if not all(0 <= weight < math.inf for weight in weights):
        raise InputError(f"`{name}` must not be negative, got {brief(weights)}.")
    positive = sum(weight > 0 for weight in weights)
    if positive < sizes.num_active:
        raise InputError(
            f"`{name}` must have {sizes.num_active} positive numbers, for as many "
            f"active layers, got {positive}. A layer of weight 0 is never drawn."
        )

"""Layouts: what is chosen in an array, and how the chosen entries are reached.

A support is a plain array of numbers, and packed values have its shape, or of numbers
that stand for several entries an axis of these behind it. What the
numbers mean is said by a layout, which is static and hashable: it follows from the
method, the shape of the leaf and the mesh, so no state holds one. There are layouts of
single entries, of the entries of a sharded array (`entries.py`), and of rows in groups
of 128 (`lanes.py`), and of blocks (`blocks.py`). Another would be one more subclass in
a file of its own, with a word in `granularity.py`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from sparse_jax.errors import InputError
from sparse_jax.supports.scores import Score, reversed_order
from sparse_jax.supports.stacks import replicated

__all__ = ["Layout", "Origin", "Shards", "require_density", "support_size"]


class Shards(NamedTuple):
    """How an array, or each layer of a stack, is sharded over the axes of a mesh.

    Example:
      >>> shards = Shards((("fsdp",), ()), (4, 1))
      >>> shards.axes, shards.number, shards.block((8, 6))
      (('fsdp',), 4, (2, 6))
    """

    names: tuple[tuple[str, ...], ...]  # mesh axes of every dimension
    counts: tuple[int, ...]  # parts of every dimension

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes, in the order in which shards are numbered."""
        return tuple(name for names in self.names for name in names)

    @property
    def number(self) -> int:
        """The number of shards of the array."""
        return math.prod(self.counts)

    def spec(self, stacked: bool = False) -> jax.P:
        """Returns the partition of the array, or of a stack of whole layers."""
        return jax.P(*(None,) * stacked, *(names or None for names in self.names))

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of one shard."""
        return tuple(n // parts for n, parts in zip(shape, self.counts, strict=True))


class Origin(NamedTuple):
    """For each entry of a new support: its index in the old one, if it was there."""

    place: jax.Array  # int32, in the shape of the new support
    stays: jax.Array  # bool: whether it was there
    axis: int  # of the old support, along which `place` counts


@dataclass(frozen=True)
class Layout(ABC):
    """What the numbers of a support are, of an array or of each layer of a stack.

    The support of a stack has its layers in front. Defaults are those of numbers that
    ascend along the last axis, as positions do.

    Attributes:
      shards: how the array, or each layer, is sharded; None if it is in one piece.
    """

    ndim: ClassVar[int]  # dimensions of the support of one array
    dtype: ClassVar[DTypeLike] = jnp.int32

    shards: Shards | None = None

    @abstractmethod
    def sharded(self, shards: Shards | None) -> "Layout":
        """Returns the layout of the same choice in an array sharded in some way."""

    def require(self, name: str, shape: Sequence[int]) -> None:  # noqa: B027
        """Raises unless an array of some shape can be trained in this layout.

        Args:
          name: of the leaf.
          shape: of the array, or of one layer of a stack.

        Raises:
          InputError: naming the leaf.
        """

    def size(self, density: float | Fraction, shape: Sequence[int]) -> int:
        """Returns the number of entries trained in an array of some shape."""
        return support_size(density, math.prod(shape))

    def packed_shape(
        self, support: Sequence[int], shape: Sequence[int]
    ) -> tuple[int, ...]:
        """Returns the shape of packed values.

        Args:
          support: shape of the support, of an array or of a stack.
          shape: of the array, or of one layer.
        """
        del shape
        return tuple(support)

    def capacity(self, most: float, shape: Sequence[int]) -> int | None:
        """Returns the room that `most` entries need in the support of a shard.

        Args:
          most: entries of the fullest shard.
          shape: of the array, or of one layer of a stack.

        Returns:
          The length of the last axis; None if it follows from the shape of the array.
        """
        del most, shape
        return None

    @abstractmethod
    def spec(self, stacked: bool) -> jax.P:
        """Returns the partition of a support."""

    def packed_spec(self, stacked: bool) -> jax.P:
        """Returns the partition of packed values."""
        return self.spec(stacked)

    def empty(
        self,
        shape: Sequence[int],
        k: int,
        *,
        stacked: bool = False,
        capacity: int | None = None,
    ) -> jax.Array:
        """Returns a support that holds nothing yet.

        Args:
          shape: of the array, or of the stack.
          k: entries of the array, or of one layer.
          stacked: whether the first axis counts layers.
          capacity: as from `capacity`.
        """
        one = self._empty(shape[int(stacked) :], k, capacity)
        return jnp.broadcast_to(one, (*shape[: int(stacked)], *one.shape))

    @abstractmethod
    def _empty(self, shape: Sequence[int], k: int, capacity: int | None) -> jax.Array:
        """Returns the empty support of one array."""

    def choose(
        self,
        score: Score,
        gradient: jax.Array | None,
        param: jax.Array,
        k: int,
        key: jax.Array,
        *,
        avoid: jax.Array | None = None,
        stacked: bool = False,
        capacity: int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the support of the k best entries, of each layer if stacked.

        Args:
          score: ranks the entries of one array.
          gradient: shape=(...) or (L, ...), or what the score adds up of several; None
            if the score needs none.
          param: the array that the gradient belongs to, in the same shape.
          k: entries of the array, or of one layer.
          key: for scores that draw; layer l uses `fold_in(key, l)`.
          avoid: support of entries that are not chosen while there are k others.
          stacked: whether the first axis counts layers.
          capacity: as from `capacity`.

        Returns:
          The support, and how many entries were chosen for each of its rows,
          shape=support.shape[:-1], int32: where these are more than `capacity`, the
          support lacks the rest.
        """
        # Under explicit axes positions need the whole array.
        if self.shards is None:
            param = replicated(param)
            gradient = None if gradient is None else replicated(gradient)
        if not stacked:
            scores = score(gradient, param, key, k)
            scores = scores if avoid is None else self.without(scores, avoid)
            scores, numbers = self._pooled(scores, k)
            scores = reversed_order(scores) if score.lowest else scores
            support, counts = self._best(scores, numbers, capacity)
            return support, counts * (k // numbers)

        def choose_layer(
            layer: tuple[jax.Array, jax.Array | None, jax.Array, jax.Array | None],
        ) -> tuple[jax.Array, jax.Array]:
            index, gradient, param, avoid = layer
            own = jax.random.fold_in(key, index)
            return self.choose(
                score, gradient, param, k, own, avoid=avoid, capacity=capacity
            )

        # One layer after the other, so that scores exist for one layer at a time.
        layers = jnp.arange(param.shape[0])
        return lax.map(choose_layer, (layers, gradient, param, avoid))

    def without(self, scores: jax.Array, avoid: jax.Array) -> jax.Array:
        """Returns scores that rank the entries of a support below all others."""
        # What is not finite ranks below zero.
        nothing = jnp.full(avoid.shape, jnp.nan, scores.dtype)
        return self.scatter(scores, avoid, nothing)

    def _pooled(self, scores: jax.Array, k: int) -> tuple[jax.Array, int]:
        """Returns a score for each number, and how many numbers k entries have."""
        return scores, k

    @abstractmethod
    def _best(
        self, scores: jax.Array, k: int, capacity: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the support of the k best scores, and how many each row has."""

    @abstractmethod
    def gather(
        self, x: jax.Array, support: jax.Array, layers: jax.Array | None = None
    ) -> jax.Array:
        """Returns the entries of an array, or of layers of a stack, at a support."""

    @abstractmethod
    def scatter(
        self,
        x: jax.Array,
        support: jax.Array,
        packed: jax.Array,
        layers: jax.Array | None = None,
    ) -> jax.Array:
        """Returns an array, or a stack, with the entries at a support replaced."""

    def origins(self, old: jax.Array, new: jax.Array, shape: Sequence[int]) -> Origin:
        """Finds the entries of one support in another.

        Args:
          old: support of the array, or of a stack.
          new: likewise.
          shape: of the array, or of one layer.
        """
        del shape
        search = jnp.searchsorted
        for _ in range(old.ndim - 1):
            search = jax.vmap(search)
        place = jnp.minimum(search(old, new), old.shape[-1] - 1)
        return Origin(place, jnp.take_along_axis(old, place, axis=-1) == new, -1)

    @abstractmethod
    def to_positions(
        self, support: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns positions in the whole array, and packed values in their order.

        Args:
          support: of the array, or of a stack.
          shape: of the array, or of the stack.
          *packed: arrays in the shape of the support.

        Returns:
          Row-major flat positions, ascending, shape=(k,) or (L, k), int32, and the
          values at them.
        """

    @abstractmethod
    def from_positions(
        self, positions: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns a support and values packed for it, as `to_positions` undoes."""

    def _numbers(self, support: jax.Array, layers: jax.Array | None) -> jax.Array:
        """Returns the numbers of the layers that a support belongs to."""
        count = support.shape[0] if support.ndim > self.ndim else 1
        return jnp.arange(count, dtype=jnp.int32) if layers is None else layers

    def _on_shards(
        self, function: Callable[..., jax.Array], stacked: bool, inputs: str, out: str
    ) -> Callable[..., jax.Array]:
        """Returns a function of whole arrays from one of their shards.

        Args:
          function: of arrays that lie as `inputs` says.
          stacked: whether the first axis of the array counts layers.
          inputs: a letter for each argument: "x" for the array, "s" for a support, "p"
            for packed values, "n" for numbers that every device has.
          out: the letter of the result.
        """
        if self.shards is None:
            return function
        specs = {
            "x": self.shards.spec(stacked),
            "s": self.spec(stacked),
            "p": self.packed_spec(stacked),
            "n": jax.P(),
        }
        # Kernels do not say over which axes their results vary.
        return jax.shard_map(
            function,
            in_specs=tuple(specs[letter] for letter in inputs),
            out_specs=specs[out],
            check_vma=False,
        )


def require_density(density: object) -> float | Fraction:
    """Returns a density as a number of Python, if it is a fraction of entries.

    A number of NumPy or JAX becomes the shortest decimal that rounds to it, so that
    `np.float32(0.1)` is 0.1.

    Raises:
      InputError: if `density` is outside (0, 1], or no number that is known when the
        program is traced.

    Example:
      >>> require_density(0.05), require_density(np.float32(0.1))
      (0.05, 0.1)
    """
    if isinstance(density, Tracer):
        raise InputError(
            "`density` must be static, got a traced value. It fixes shapes: keep it "
            "out of `jit`, and in `static_args=('density',)` of `inject_hyperparams`."
        )
    number = _decimal(density)
    is_number = isinstance(number, int | float | Fraction)
    if not is_number or isinstance(number, bool) or not 0 < number <= 1:
        raise InputError(
            f"`density` must be in (0, 1], got {density!r}. It is the fraction of "
            "entries trained, so training 1% of them is `density=0.01`."
        )
    return number if isinstance(number, Fraction) else float(number)


def _decimal(number: object) -> object:
    """Returns a scalar of NumPy or JAX as a number of Python; others pass through."""
    kinds = (jax.Array, np.ndarray, np.generic)
    if not isinstance(number, kinds) or np.ndim(number) > 0:
        return number
    scalar = np.asarray(number)[()]
    if not jnp.issubdtype(scalar.dtype, jnp.floating):
        return scalar.item()
    texts = (f"{float(scalar):.{digits}g}" for digits in range(1, 18))
    same = lambda text: scalar.dtype.type(float(text)) == scalar
    return next((float(text) for text in texts if same(text)), float(scalar))


def support_size(density: float | Fraction, size: int) -> int:
    """Returns the number of entries trained in an array of `size` entries.

        k = ceil(density * size)

    The product is taken in decimal, so that 7 % of 100 is 7 and not 8.

    Example:
      >>> support_size(0.07, 100), support_size(0.01, 64)
      (7, 1)
    """
    return math.ceil(Fraction(str(density)) * size)

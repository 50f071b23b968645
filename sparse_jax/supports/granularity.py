"""Granularity: whether entries are chosen from a whole array, or from groups of it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.params.roles import Role
from sparse_jax.supports.lanes import GROUP, LaneSupport, empty_lanes, fits_lanes
from sparse_jax.supports.scores import Score, select, select_lanes, select_tables
from sparse_jax.supports.sharded import Cut, LocalSupport, unused_tables
from sparse_jax.supports.support import Support, support_size

__all__ = [
    "ENTRY",
    "GRANULARITIES",
    "LANE",
    "Entry",
    "Granularity",
    "Lane",
    "require_granularity",
]


@dataclass(frozen=True)
class Granularity(ABC):
    """What is chosen: the numbers of a `Support`, and how they are found."""

    @abstractmethod
    def require(self, name: str, shape: Sequence[int], cut: Cut | None = None) -> None:
        """Raises unless an array can be trained in this way.

        Args:
          name: of the leaf.
          shape: of the array, or of one layer of a stack.
          cut: how it is cut over a mesh.

        Raises:
          InputError: naming the leaf.
        """

    @abstractmethod
    def size(self, density: float, size: int) -> int:
        """Returns the number of entries trained in an array of `size` entries."""

    @abstractmethod
    def empty(
        self, role: Role, shape: Sequence[int], k: int, cut: Cut | None, slots: int
    ) -> Support:
        """Returns the support of a leaf before the selection.

        Args:
          role: of the leaf.
          shape: of the leaf.
          k: entries of the array, or of one layer.
          cut: how it is cut over a mesh.
          slots: of every shard, if it is cut and shards have different numbers.
        """

    @abstractmethod
    def choose(
        self,
        score: Score,
        gradient: jax.Array,
        param: jax.Array,
        k: int,
        key: jax.Array,
        *,
        cut: Cut | None,
        slots: int,
        stacked: bool = False,
    ) -> tuple[Support, jax.Array]:
        """Returns the support of the best entries, and how many there are in it.

        The arguments are those of `scores.select` and of `empty`. The numbers are of
        every row of the support, shape=support.shape[:-1], int32.
        """

    @abstractmethod
    def restored(self, positions: jax.Array, cut: Cut | None) -> Support:
        """Returns a support from the array in it, int32."""


@dataclass(frozen=True)
class Entry(Granularity):
    """The best entries of an array, wherever they are."""

    def require(self, name: str, shape: Sequence[int], cut: Cut | None = None) -> None:
        """Takes every array."""

    def size(self, density: float, size: int) -> int:
        """Returns ceil(density * size)."""
        return support_size(density, size)

    def empty(
        self, role: Role, shape: Sequence[int], k: int, cut: Cut | None, slots: int
    ) -> Support:
        """Returns positions of nothing."""
        if cut is None:
            return jnp.zeros(role.packed_shape(tuple(shape), k), jnp.int32)
        return unused_tables(shape, cut, slots, role.stacked)

    def choose(
        self,
        score: Score,
        gradient: jax.Array,
        param: jax.Array,
        k: int,
        key: jax.Array,
        *,
        cut: Cut | None,
        slots: int,
        stacked: bool = False,
    ) -> tuple[Support, jax.Array]:
        """Returns positions; a table may have no room for all that were chosen."""
        args = (score, gradient, param, k, key)
        if cut is None:
            support = select(*args, stacked=stacked)
            return support, jnp.full(support.shape[:-1], k, jnp.int32)
        tables, count = select_tables(*args, cut=cut, capacity=slots, stacked=stacked)
        return LocalSupport(tables, cut), count

    def restored(self, positions: jax.Array, cut: Cut | None) -> Support:
        """Returns positions."""
        return positions if cut is None else LocalSupport(positions, cut)


@dataclass(frozen=True)
class Lane(Granularity):
    """The best entries of every 128 rows of a column, equally many of each.

    A support takes one byte an entry instead of four, and on a TPU it is read and
    written by comparing whole registers, without a gather or a scatter.
    """

    def require(self, name: str, shape: Sequence[int], cut: Cut | None = None) -> None:
        """Raises unless groups fill the array, and each of its shards."""
        if not fits_lanes(shape):
            raise InputError(
                f"`{name}` must be a matrix or vector with a multiple of {GROUP} rows "
                f"to be trained by lanes, got shape {list(shape)}. Leave it out of "
                "`where`, or take the granularity of entries."
            )
        if cut is not None and not fits_lanes(shape, cut):
            raise InputError(
                f"`{name}` must have a multiple of {GROUP} rows on every device to be "
                f"trained by lanes, got {shape[0]} rows in {cut.counts[0]} parts. Take "
                "a mesh that cuts them less, or the granularity of entries."
            )

    def size(self, density: float, size: int) -> int:
        """Returns ceil(density * 128) for every 128 entries."""
        return support_size(density, GROUP) * (size // GROUP)

    def empty(
        self, role: Role, shape: Sequence[int], k: int, cut: Cut | None, slots: int
    ) -> Support:
        """Returns some rows."""
        del slots
        self.require(role.name, shape[1:] if role.stacked else shape, cut)
        return empty_lanes(shape, k * GROUP // role.size, role.stacked, cut)

    def choose(
        self,
        score: Score,
        gradient: jax.Array,
        param: jax.Array,
        k: int,
        key: jax.Array,
        *,
        cut: Cut | None,
        slots: int,
        stacked: bool = False,
    ) -> tuple[Support, jax.Array]:
        """Returns rows of groups."""
        del slots
        size = math.prod(param.shape[int(stacked) :])
        args = (score, gradient, param, k * GROUP // size, key)
        support = select_lanes(*args, cut=cut, stacked=stacked)
        return support, jnp.full(support.shape[:-1], support.shape[-1], jnp.int32)

    def restored(self, positions: jax.Array, cut: Cut | None) -> Support:
        """Returns rows of groups."""
        return LaneSupport(positions.astype(jnp.uint8), cut)


ENTRY, LANE = Entry(), Lane()
GRANULARITIES = {"entry": ENTRY, "lane": LANE}


def require_granularity(granularity: Any) -> None:
    """Raises unless a value is a granularity.

    Raises:
      InputError: if it is not, such as the word of the command line.

    Example:
      >>> require_granularity(LANE)
    """
    if not isinstance(granularity, Granularity):
        raise InputError(
            "`granularity` must be `sparse_jax.ENTRY` or `sparse_jax.LANE`, got "
            f"{granularity!r}."
        )

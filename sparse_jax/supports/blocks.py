"""The layout of blocks: the best rows, columns or rectangles of a matrix.

A support holds row-major numbers of blocks, and packed values have an axis of the
entries of a block behind it. What single entries do with positions, wherever the parts
of an array lie, blocks do with their numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.layout import Layout, Shards, support_size
from sparse_jax.supports.stacks import replicated, resharded

__all__ = ["Blocks"]

_AXES = ("rows", "columns")


@dataclass(frozen=True)
class Blocks(Layout):
    """The blocks of a matrix whose entries have the largest mean score.

    A support has shape=(g,), int32, or (S, c) of a matrix in S shards; packed values
    have an axis of rows * columns behind it, in row-major order.

    Attributes:
      rows: of a block; None is all that a matrix has.
      columns: of a block; None is all that a matrix has.

    Example:
      >>> x = jnp.arange(16.0).reshape(4, 4)
      >>> Blocks(rows=2, columns=2).gather(x, jnp.array([1]))
      Array([[2., 3., 6., 7.]], dtype=float32)
    """

    rows: int | None = 1
    columns: int | None = None

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """Dimensions of the support of one array."""
        return self._of_numbers.ndim

    def sharded(self, shards: Shards | None) -> Layout:
        """Returns the blocks of a sharded array."""
        return replace(self, shards=shards)

    def require(self, name: str, shape: Sequence[int]) -> None:
        """Raises unless blocks fill the matrix, and each of its shards.

        Example:
          >>> Blocks(rows=4, columns=4).require("kernel", (8, 12))
        """
        if len(shape) != 2:
            raise InputError(
                f"`{name}` must be a matrix to be trained by {self._words}, got shape "
                f"{list(shape)}. Choose kernels alone by `where`, such as 'kernel$'."
            )
        for axis, side in enumerate(self._sides):
            parts = 1 if self.shards is None else self.shards.counts[axis]
            what = f"{shape[axis]:,} {_AXES[axis]}"
            # Parts of several whole rows would lie between each other.
            if side is None and parts > 1 and self._sides[1 - axis] != 1:
                raise InputError(
                    f"`{name}` must have all {_AXES[axis]} in one shard to be trained "
                    f"by {self._words}, got {what} in {parts} shards. Choose smaller "
                    "blocks, or a `mesh` that shards the other axis."
                )
            if shape[axis] // parts % (side or 1):
                each = f" in shards of {shape[axis] // parts:,}" if parts > 1 else ""
                mesh = ", a smaller axis of `mesh`" if parts > 1 else ""
                raise InputError(
                    f"`{name}` must have {_AXES[axis]} in multiples of {side} to be "
                    f"trained by {self._words}, got {what}{each} (shape "
                    f"{list(shape)}). Choose smaller blocks{mesh}, or leave it out of "
                    "`where`."
                )

    def size(self, density: float | Fraction, shape: Sequence[int]) -> int:
        """Returns the entries of ceil(density * blocks) blocks."""
        entries = math.prod(self._block(shape))
        return support_size(density, math.prod(shape) // entries) * entries

    def capacity(self, most: float, shape: Sequence[int]) -> int | None:
        """Returns the room that the blocks of `most` entries need."""
        blocks = most / math.prod(self._block(shape))
        return self._of_numbers.capacity(blocks, self._grid(shape))

    def packed_shape(
        self, support: Sequence[int], shape: Sequence[int]
    ) -> tuple[int, ...]:
        """Returns the shape of the support and the entries of a block."""
        return (*support, math.prod(self._block(shape)))

    def spec(self, stacked: bool) -> jax.P:
        """Returns the partition of single entries."""
        return self._of_numbers.spec(stacked)

    def packed_spec(self, stacked: bool) -> jax.P:
        """Returns that of numbers, and behind it the axes of a row or column."""
        spec = self.spec(stacked)
        if self.shards is None:
            return spec
        names = zip(self._sides, self.shards.names, strict=True)
        along = tuple(axis for side, axes in names if side is None for axis in axes)
        lead = [*spec, *[None] * (self.ndim + stacked - len(spec))]
        return jax.P(*lead, along or None)

    def _empty(self, shape: Sequence[int], k: int, capacity: int | None) -> jax.Array:
        """Returns the empty support of as many numbers."""
        blocks = k // math.prod(self._block(shape))
        return self._of_numbers._empty(self._grid(shape), blocks, capacity)

    def _pooled(self, scores: jax.Array, k: int) -> tuple[jax.Array, int]:
        """Returns the mean score of every block, and how many are chosen."""
        rows, columns = self._block(scores.shape)
        high, wide = self._grid(scores.shape)
        magnitudes = jnp.abs(scores).reshape(high, rows, wide, columns)
        # In bfloat16 most means of large blocks would be equal.
        wide = jnp.promote_types(scores.dtype, jnp.float32)
        means = jnp.mean(magnitudes, axis=(1, 3), dtype=wide)
        return means, k // (rows * columns)

    def _best(
        self, scores: jax.Array, k: int, capacity: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the numbers of the k best blocks."""
        return self._of_numbers._best(scores, k, capacity)

    def gather(
        self, x: jax.Array, support: jax.Array, layers: jax.Array | None = None
    ) -> jax.Array:
        """Returns the entries of blocks, 0 where a shard has none."""
        stacked = support.ndim > self.ndim
        x = replicated(x) if self.shards is None else x

        def at_once(stack: jax.Array, layers: jax.Array, rows: jax.Array) -> jax.Array:
            blocks, place = self._places(stack, rows, layers)
            taken = blocks.at[place].get(mode="fill", fill_value=0)
            return taken.reshape(*rows.shape, -1)

        def layer_alone(
            stack: jax.Array, layers: jax.Array, rows: jax.Array
        ) -> jax.Array:
            def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
                layer = lax.dynamic_index_in_dim(stack, args[0], 0)
                return at_once(layer, jnp.zeros(1, jnp.int32), args[1][None])[0]

            return lax.map(one, (layers, rows))

        def gather(x: jax.Array, support: jax.Array, layers: jax.Array) -> jax.Array:
            args = (x if stacked else x[None], layers, support.reshape(len(layers), -1))
            taken = self._on_platform(at_once, layer_alone, *args)
            return taken.reshape(*support.shape, -1)

        function = self._on_shards(gather, stacked, "xsn", "p")
        return function(x, support, self._numbers(support, layers))

    def scatter(
        self,
        x: jax.Array,
        support: jax.Array,
        packed: jax.Array,
        layers: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the array with the entries of blocks replaced."""
        stacked, spec = support.ndim > self.ndim, jax.typeof(x).sharding.spec
        x = replicated(x) if self.shards is None else x

        def at_once(
            stack: jax.Array, layers: jax.Array, rows: jax.Array, packed: jax.Array
        ) -> jax.Array:
            blocks, place = self._places(stack, rows, layers)
            values = packed.reshape(*rows.shape, blocks.shape[2], blocks.shape[4])
            options = {"mode": "drop", "unique_indices": True}
            return blocks.at[place].set(values, **options).reshape(stack.shape)

        def layer_alone(
            stack: jax.Array, layers: jax.Array, rows: jax.Array, packed: jax.Array
        ) -> jax.Array:
            def set_layer(i: jax.Array, stack: jax.Array) -> jax.Array:
                layer = lax.dynamic_index_in_dim(stack, layers[i], 0)
                layer = at_once(
                    layer, jnp.zeros(1, jnp.int32), rows[i][None], packed[i]
                )
                return lax.dynamic_update_slice_in_dim(stack, layer, layers[i], 0)

            return lax.fori_loop(0, len(rows), set_layer, stack)

        def scatter(
            x: jax.Array, support: jax.Array, packed: jax.Array, layers: jax.Array
        ) -> jax.Array:
            rows = support.reshape(len(layers), -1)
            values = packed.astype(x.dtype).reshape(*rows.shape, -1)
            args = (x if stacked else x[None], layers, rows, values)
            return self._on_platform(at_once, layer_alone, *args).reshape(x.shape)

        function = self._on_shards(scatter, stacked, "xspn", "x")
        numbers = self._numbers(support, layers)
        return resharded(function(x, support, packed, numbers), spec)

    def _on_platform(
        self,
        at_once: Callable[..., jax.Array],
        layer_alone: Callable[..., jax.Array],
        *args: jax.Array,
    ) -> jax.Array:
        """Calls what reaches blocks of all layers, or of one after the other."""
        if self.columns is None or len(args[0]) == 1:
            return at_once(*args)
        # A TPU keeps rows side by side, and turns a matrix to reach parts of them: of
        # one layer at a time, or it would be a second copy of the stack.
        return lax.platform_dependent(*args, tpu=layer_alone, default=at_once)

    def to_positions(
        self, support: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns positions of the entries in the whole array, and the values at them.

        Example:
          >>> layout = Blocks(rows=2, columns=2)
          >>> layout.to_positions(np.array([1]), (4, 4))[0].tolist()
          [2, 3, 6, 7]
        """
        lead, matrix = self._lead(support, shape)
        places = np.arange(support.size).reshape(support.shape)
        grid = (*lead, *self._grid(matrix))
        numbers, order = self._of_numbers.to_positions(support, grid, places)
        (rows, columns), wide = self._block(matrix), grid[-1]
        corner = numbers // wide * rows * matrix[1] + numbers % wide * columns
        inside = np.arange(rows)[:, None] * matrix[1] + np.arange(columns)
        flat = corner[..., None] + inside.reshape(-1)
        lines = [flat, *(array.reshape(-1, flat.shape[-1])[order] for array in packed)]
        lines = [line.reshape(*numbers.shape[:-1], -1) for line in lines]
        sort = np.argsort(lines[0], axis=-1, kind="stable")
        found, *values = (np.take_along_axis(line, sort, -1) for line in lines)
        return found.astype(np.int32), *values

    def from_positions(
        self, positions: np.ndarray, shape: Sequence[int], *packed: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns numbers of blocks, and the values of their entries.

        Example:
          >>> layout = Blocks(rows=2, columns=2)
          >>> layout.from_positions(np.array([2, 3, 6, 7]), (4, 4))[0].tolist()
          [1]
        """
        lead, matrix = tuple(shape[:-2]), tuple(shape[-2:])
        (rows, columns), grid = self._block(matrix), self._grid(matrix)
        row, column = np.divmod(positions, matrix[1])
        number = row // rows * grid[1] + column // columns
        # Blocks one after the other, each in the order of its positions.
        order = np.argsort(number, axis=-1, kind="stable")
        groups = (*positions.shape[:-1], -1, rows * columns)
        numbers, *values = (
            np.take_along_axis(line, order, -1).reshape(groups)
            for line in (number, *packed)
        )
        first = numbers[..., 0].astype(np.int32)
        # One more, because 0 stands for what no block is at.
        places = 1 + np.arange(first.size).reshape(first.shape)
        support, places = self._of_numbers.from_positions(first, (*lead, *grid), places)
        blank = np.zeros((1, rows * columns))
        padded = (
            np.concatenate([blank.astype(x.dtype), x.reshape(-1, rows * columns)])
            for x in values
        )
        return support, *(x[places] for x in padded)

    @property
    def _words(self) -> str:
        """What is trained, for messages."""
        if None not in self._sides:
            return f"{self.rows}x{self.columns} blocks"
        counts = zip(self._sides, _AXES, strict=True)
        found = [axis if n == 1 else f"blocks of {n} {axis}" for n, axis in counts if n]
        return found[0] if found else "whole matrices"

    @property
    def _sides(self) -> tuple[int | None, int | None]:
        """Rows and columns of a block."""
        return self.rows, self.columns

    @property
    def _of_numbers(self) -> Layout:
        """The layout of the numbers, as positions in a matrix of blocks."""
        if self.shards is None:
            return ENTRY
        # All parts of a row have its number.
        parts = zip(self._sides, *self.shards, strict=True)
        cut = [((), 1) if side is None else pair for side, *pair in parts]
        names, counts = zip(*cut, strict=True)
        return ENTRY.sharded(Shards(names, counts) if any(names) else None)

    def _lead(
        self, support: np.ndarray, shape: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the axis of layers, if there is one, and the shape of a matrix."""
        stacked = support.ndim > self.ndim
        return tuple(shape[: int(stacked)]), tuple(shape[int(stacked) :])

    def _block(self, shape: Sequence[int]) -> tuple[int, int]:
        """Returns the sides of a block in a matrix, or in a shard."""
        return self.rows or shape[-2], self.columns or shape[-1]

    def _grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Returns how many blocks lie below and beside each other."""
        rows, columns = self._block(shape)
        return shape[-2] // rows, shape[-1] // columns

    def _places(
        self, stack: jax.Array, numbers: jax.Array, layers: jax.Array
    ) -> tuple[jax.Array, tuple]:
        """Returns the blocks of a stack, and the indices of some of every layer."""
        rows, columns = self._block(stack.shape)
        high, wide = self._grid(stack.shape)
        blocks = stack.reshape(len(stack), high, rows, wide, columns)
        whole = slice(None)
        place = (layers[:, None], numbers // wide, whole, numbers % wide, whole)
        return blocks, place

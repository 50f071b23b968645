"""The sparse formats of PEFT, SHiRA and Super-Tuning: differences at chosen entries.

Both store float32 differences to the base at entries of a kernel as PyTorch has it,
[out, in], and expect a number of entries that follows from one setting for all modules.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from sparse_jax.errors import InputError, brief
from sparse_jax.params.fields import Json

__all__ = ["SPARSE", "SparseForm", "Stored", "free_positions"]

Shape = tuple[int, int]  # of a kernel of ours, (in, out)


@dataclass(frozen=True)
class Stored:
    """What PEFT stores of one kernel."""

    indices: np.ndarray
    values: np.ndarray  # shape=(k,), float32


@dataclass(frozen=True, eq=False)
class SparseForm:
    """One of the two formats.

    Attributes:
      peft_type: as `adapter_config.json` names it.
      config: fields that it needs beside that of the size.
      values: suffix of the module's name for the values.
      indices: suffix for where they belong.
      sized: (shapes, counts) -> fields of the configuration, and how many entries PEFT
        expects in each kernel for these: no fewer than the counts.
      pack: (rows, columns, width of a row) -> indices, in PyTorch's orientation.
      unpack: (indices, width of a row) -> rows and columns.
      add: (base, differences) -> what PEFT merges, in the dtype of the base.
    """

    peft_type: str
    config: Mapping[str, Json]
    values: str
    indices: str
    sized: Callable[
        [Sequence[Shape], Sequence[int]], tuple[Mapping[str, Json], Sequence[int]]
    ]
    pack: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    unpack: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
    add: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def store(
        self,
        positions: np.ndarray,
        old: np.ndarray,
        new: np.ndarray,
        shape: Shape,
        count: int,
    ) -> Stored:
        """Returns the differences of one kernel.

        Positions that are not trained are added with zeros up to the count.

        Args:
          positions: flat in a kernel (in, out), ascending, shape=(k,).
          old: values of the base, shape=(k,).
          new: trained values, shape=(k,).
          shape: of the kernel, (in, out).
          count: how many entries PEFT expects, at least k.

        Example:
          >>> at, old = np.array([1, 5]), np.zeros(2, np.float32)
          >>> new = np.array([3, 4], np.float32)
          >>> stored = SPARSE["supertuning"].store(at, old, new, (2, 3), 3)
          >>> stored.indices.tolist(), stored.values.tolist()
          ([0, 2, 5], [0.0, 3.0, 4.0])
        """
        free = free_positions(positions, count)
        deltas = new.astype(np.float32) - old.astype(np.float32)
        columns, rows = np.divmod(np.concatenate([positions, free]), shape[1])
        order = np.argsort(rows * np.int64(shape[0]) + columns)
        deltas = np.concatenate([deltas, np.zeros(len(free), np.float32)])
        indices = self.pack(rows[order], columns[order], shape[0])
        return Stored(np.ascontiguousarray(indices, np.int32), deltas[order])

    def positions(
        self, stored: Stored, shape: Shape, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns positions flat in a kernel (in, out), ascending, and differences.

        Args:
          stored: what PEFT stores of the kernel.
          shape: of the kernel, (in, out).
          name: of the module, for messages.

        Raises:
          InputError: if indices are repeated or outside of the kernel, a number is not
            finite, or there are not as many indices as values.

        Example:
          >>> stored = Stored(np.array([0, 2, 5]), np.array([0, 3, 4], np.float32))
          >>> SPARSE["supertuning"].positions(stored, (2, 3), "up")
          (array([0, 1, 5]), array([0., 3., 4.], dtype=float32))
        """
        width, height = shape
        indices, values = np.asarray(stored.indices), np.asarray(stored.values)
        is_whole = np.issubdtype(indices.dtype, np.integer) or (
            # On Windows PEFT writes them as floating-point numbers.
            np.isfinite(indices).all() and (indices == np.floor(indices)).all()
        )
        like = self.pack(np.zeros(values.size, int), np.zeros(values.size, int), 1)
        if values.ndim != 1 or indices.shape != like.shape or not is_whole:
            raise InputError(
                f"`{name}.{self.indices}` must be whole numbers of shape "
                f"{list(like.shape)}, as many as `{self.values}` has, got "
                f"{indices.dtype}{list(indices.shape)}. Copy the folder again."
            )
        if not np.isfinite(values.astype(np.float32)).all():
            raise InputError(
                f"`{name}.{self.values}` must be finite, got NaN or infinite values. "
                "Save the adapter from before its training diverged."
            )
        rows, columns = self.unpack(indices.astype(np.int64), width)
        is_inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        if not is_inside.all():
            worst = int(np.argmin(is_inside))
            raise InputError(
                f"`{name}.{self.indices}` must lie in the weight [{height}, {width}], "
                f"got row {rows[worst]} and column {columns[worst]}. Pass the base "
                "that the adapter was trained on."
            )
        flat = columns * height + rows
        order = np.argsort(flat, kind="stable")
        flat = flat[order]
        if (twice := np.flatnonzero(flat[1:] == flat[:-1])).size:
            column, row = divmod(int(flat[twice[0]]), height)
            raise InputError(
                f"`{name}.{self.indices}` must name every entry once, got row {row} "
                f"and column {column} twice. Copy the folder again."
            )
        return flat, values.astype(np.float32)[order]


def free_positions(taken: np.ndarray, count: int) -> np.ndarray:
    """Returns the first positions that are free, so many that there are `count` in all.

    Example:
      >>> free_positions(np.array([0, 2, 9]), 5).tolist()
      [1, 3]
    """
    is_free = np.ones(count, bool)
    is_free[taken[taken < count]] = False
    return np.flatnonzero(is_free)[: count - len(taken)]


def _shira_size(
    shapes: Sequence[Shape], counts: Sequence[int]
) -> tuple[Mapping[str, Json], Sequence[int]]:
    """Returns the smallest r: every kernel has r * (in + out) entries."""
    r = max(1, *(-(-k // sum(shape)) for shape, k in zip(shapes, counts, strict=True)))
    for shape in shapes:
        if r * sum(shape) > math.prod(shape):
            raise InputError(
                "`sparse` must be 'supertuning' for these entries, got 'shira': it has "
                f"one r, here {r}, for all modules, and r * (in + out) entries of "
                f"{brief(shape)} are more than it has. On the command line that is "
                "--peft-type supertuning."
            )
    return {"r": r}, [r * sum(shape) for shape in shapes]


def _supertuning_size(
    shapes: Sequence[Shape], counts: Sequence[int]
) -> tuple[Mapping[str, Json], Sequence[int]]:
    """Returns the largest sparsity: a kernel has int(n * (1 - sparsity)) entries."""
    sizes = [math.prod(shape) for shape in shapes]
    # As PEFT computes it, rounding included.
    expected = lambda sparsity: [int(size * (1 - sparsity)) for size in sizes]
    sparsity = 1 - max(k / size for size, k in zip(sizes, counts, strict=True))
    while any(have < k for have, k in zip(expected(sparsity), counts, strict=True)):
        sparsity = math.nextafter(sparsity, 0.0)
    return {"sparsity": sparsity}, expected(sparsity)


SPARSE: Mapping[str, SparseForm] = MappingProxyType(
    {
        "shira": SparseForm(
            peft_type="SHIRA",
            config={"mask_type": "random", "fan_in_fan_out": False},
            values="shira_weight",
            indices="shira_indices",
            sized=_shira_size,
            pack=lambda rows, columns, width: np.stack([rows, columns]),
            unpack=lambda indices, width: (indices[0], indices[1]),
            # PyTorch adds sparse float32 numbers in float32, and rounds the sum.
            add=lambda base, deltas: (base.astype(np.float32) + deltas).astype(
                base.dtype
            ),
        ),
        "supertuning": SparseForm(
            peft_type="SUPERTUNING",
            config={},
            values="supertuning_values",
            indices="supertuning_indices",
            sized=_supertuning_size,
            pack=lambda rows, columns, width: rows * width + columns,
            unpack=lambda indices, width: np.divmod(indices, width),
            add=lambda base, deltas: base + deltas.astype(base.dtype),
        ),
    }
)

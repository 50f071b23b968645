"""How the tensors of a checkpoint hold the leaves of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FUSED", "PLAIN", "Layout"]

FUSED = tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """How the tensors of a family lie.

    `fused` modules have one tensor in common, which holds their outputs one after the
    other. With `by_head` the outputs of a head come first, `[H, 3, K]`, and otherwise
    those of a module, `[3, H, K]`.
    """

    is_upright: bool = False  # whether kernels of layers are [in, out], as ours are
    fused: tuple[str, ...] = ()  # modules, in their order in the tensor
    by_head: bool = False

    def turned(self, leaf: str, array: np.ndarray) -> np.ndarray:
        """Turns a kernel `[in, out]` as its tensor lies, or the tensor back.

        Example:
          >>> PLAIN.turned("lm_head/kernel", np.zeros((2, 3))).shape
          (3, 2)
        """
        is_kept = self.is_upright and leaf.startswith("layers/")
        return array.T if leaf.endswith("/kernel") and not is_kept else array

    def turned_index(self, leaf: str, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Returns where a part of a leaf lies in its tensor.

        Example:
          >>> PLAIN.turned_index("lm_head/kernel", (slice(0, 2), slice(4, 8)))
          (slice(4, 8, None), slice(0, 2, None))
        """
        is_kept = self.is_upright and leaf.startswith("layers/")
        return index[::-1] if leaf.endswith("/kernel") and not is_kept else index

    def part_of(self, leaf: str) -> int | None:
        """Returns which part of a fused tensor a leaf is; None is no part."""
        module = leaf.rpartition("/")[0]
        return self.fused.index(module) if module in self.fused else None

    def tensor_shape(self, leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the tensor that holds a leaf of some shape.

        Example:
          >>> Layout(fused=FUSED).tensor_shape(f"{FUSED[0]}/kernel", (2, 5))
          (15, 2)
        """
        count = 1 if self.part_of(leaf) is None else len(self.fused)
        whole = (*shape[:-1], count * shape[-1])
        return self.turned(leaf, np.broadcast_to(np.int8(0), whole)).shape

    def split(self, leaf: str, tensor: np.ndarray, num_heads: int) -> np.ndarray:
        """Returns the leaf that a tensor holds, a part of it or all.

        Example:
          >>> Layout(fused=FUSED).split(f"{FUSED[1]}/bias", np.arange(6), 1)
          array([2, 3])
          >>> Layout(fused=FUSED, by_head=True).split(
          ...     f"{FUSED[1]}/bias", np.arange(6), 2
          ... )
          array([1, 4])
        """
        array, part = self.turned(leaf, tensor), self.part_of(leaf)
        if part is None:
            return array
        blocks = num_heads if self.by_head else 1
        blocked = array.reshape(*array.shape[:-1], blocks, len(self.fused), -1)
        return blocked[..., part, :].reshape(*array.shape[:-1], -1)

    def fuse(
        self, leaf: str, arrays: Sequence[np.ndarray], num_heads: int
    ) -> np.ndarray:
        """Returns the tensor of a leaf, or that of all its parts in their order.

        Example:
          >>> parts = [np.array([0, 3]), np.array([1, 4]), np.array([2, 5])]
          >>> Layout(fused=FUSED, by_head=True).fuse(f"{FUSED[0]}/bias", parts, 2)
          array([0, 1, 2, 3, 4, 5])
        """
        if self.part_of(leaf) is None:
            return self.turned(leaf, arrays[0])
        blocks = num_heads if self.by_head else 1
        blocked = [x.reshape(*x.shape[:-1], blocks, -1) for x in arrays]
        whole = np.stack(blocked, axis=-2).reshape(*arrays[0].shape[:-1], -1)
        return self.turned(leaf, whole)


PLAIN = Layout()

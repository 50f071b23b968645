"""Padding: rows of tokens as one array, of one of a few lengths."""

from collections.abc import Sequence

import numpy as np

__all__ = ["bucket_lengths", "bucket_of", "stack"]


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """Returns the lengths that examples are padded to.

    Example:
      >>> bucket_lengths(128)
      (16, 32, 48, 64, 96, 128)
      >>> bucket_lengths(40)
      (16, 32, 40)
    """
    steps = range(4, max_length.bit_length())
    lengths = (16, *(n << step for step in steps for n in (2, 3)))
    return (*(length for length in lengths if length < max_length), max_length)


def bucket_of(rows: Sequence[np.ndarray], max_length: int) -> int:
    """Returns the least of the lengths that holds every row."""
    longest = max(map(len, rows))
    return min(n for n in bucket_lengths(max_length) if n >= longest)


def stack(rows: Sequence[np.ndarray], length: int, filler: int) -> np.ndarray:
    """Returns rows as one int32 array `[B, length]`, filled up on the right.

    Example:
      >>> stack([np.array([7, 8])], 4, 0).tolist()
      [[7, 8, 0, 0]]
    """
    stacked = np.full((len(rows), length), filler, np.int32)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return stacked

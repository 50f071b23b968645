"""Sequences that begin alike share a row, which holds what they share once.

A row holds trees in depth-first order: a token sees those on its path from the root.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparse_jax.data.batches import Batch, TokenSequences
from sparse_jax.data.packing import pack_rows
from sparse_jax.generation.prompts import bucket

__all__ = ["TreeBatch", "tree_batches"]

# Columns of a row: more pack better, and attend to more strangers (SmolLM2-135M on
# CPU, 48 questions of MMLU: 18 seconds with 256, 23 with 512).
_COLUMNS = 256
# Columns up to which other sequences join a tree, such as the questions that follow
# the same five examples. A longer tree has the room that its own row has anyway.
_MOST_SHARED = 1024


class TreeBatch(NamedTuple):
    """Trees of sequences, and the M tokens that are predicted there.

    `inputs` has int32 `[B, T]` arrays: `input_ids`, `attention_mask`, `positions`, and
    `ends`, the column from which on a token is not seen any more.
    """

    inputs: Batch
    numbers: np.ndarray  # shape=(M,): of the sequence
    places: np.ndarray  # shape=(M,): of the last token before it, row * T + column
    tokens: np.ndarray  # shape=(M,): what is predicted


class _Tree:
    """Sequences of one beginning, added in the order of their tokens."""

    def __init__(self):
        self.branches: list[tuple[np.ndarray, np.ndarray]] = []  # (tokens, depths)
        self.ends = np.zeros(0, np.int32)
        self.last = np.zeros(0, np.int32)  # what was read of the last sequence
        self.path = np.zeros(0, np.int64)  # and its columns
        self.targets: list[tuple[int, np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self.ends)

    def shared(self, read: np.ndarray) -> int:
        """Returns how many tokens begin both a sequence and the last one."""
        length = min(len(read), len(self.last))
        differs = read[:length] != self.last[:length]
        return int(differs.argmax()) if differs.any() else length

    def add(self, number: int, ids: np.ndarray, is_target: np.ndarray) -> None:
        """Adds a sequence, whose last token is predicted but never read."""
        read = ids[:-1]
        shared, size = self.shared(read), len(self)
        self.ends[self.path[shared:]] = size
        self.branches.append((read[shared:], np.arange(shared, len(read))))
        new = size + np.arange(len(read) - shared)
        self.path = np.concatenate([self.path[:shared], new])
        # Open until another branch begins.
        self.ends = np.append(self.ends, np.full(len(new), np.iinfo(np.int32).max))
        self.last = read
        predicted = np.flatnonzero(is_target)
        self.targets.append((number, self.path[predicted - 1], ids[predicted]))


def tree_batches(sequences: TokenSequences, batch_size: int) -> Iterator[TreeBatch]:
    """Yields all sequences, what neighbors in the order of tokens share read once.

    There are few shapes and no empty rows. The number of columns is a power of two; a
    batch is full, or its number of rows is a power of four. Short trees fill what is
    left of wide rows.

    Args:
      sequences: tokens, with marks on those that are predicted.
      batch_size: rows of 256 columns of a batch; of wider ones there are fewer.

    Example:
      >>> ids = [np.array([5, 6, 7]), np.array([5, 6, 8]), np.array([5, 9, 7])]
      >>> marks = [np.array([False, False, True])] * 3
      >>> batch, = tree_batches(TokenSequences(ids, marks, 3, 0), 8)
      >>> [batch.inputs[name][0, :4].tolist() for name in ("input_ids", "positions")]
      [[5, 6, 9, 0], [0, 1, 1, 0]]
      >>> batch.inputs["ends"][0, :3].tolist(), batch.places.tolist()
      ([3, 2, 3], [1, 1, 2])
    """
    trees = _trees(sequences)
    sizes = np.array([len(tree) for tree in trees])
    least = bucket(int(sizes.sum()), _COLUMNS)
    widths = np.array([max(least, bucket(size)) for size in sizes.tolist()])
    order = np.argsort(sizes, kind="stable")
    rest, sizes_left = order.tolist(), sizes[order].tolist()
    for width in np.unique(widths)[::-1].tolist():
        # These are the longest that are left.
        count = int((widths[rest] == width).sum())
        chosen = np.array(rest[len(rest) - count :], int)
        del rest[len(rest) - count :], sizes_left[len(sizes_left) - count :]
        rows = [chosen[row].tolist() for row in pack_rows(sizes[chosen], width)]
        for row in rows:
            room = width - int(sizes[row].sum())
            while at := bisect_right(sizes_left, room):
                room -= sizes_left.pop(at - 1)
                row.append(rest.pop(at - 1))
        most = max(1, batch_size * least // width)
        while rows:
            # 13 rows become batches of 4, 4, 4 and 1. Every shape has a program of its
            # own: that of SmolLM2-135M compiles for 3 CPU seconds, in which it reads
            # two rows.
            power = 4 ** ((len(rows).bit_length() - 1) // 2)
            size = most if len(rows) >= most else power
            part = [[trees[i] for i in row] for row in rows[:size]]
            yield _batch(part, (size, width), sequences.pad_id)
            rows = rows[size:]


def _trees(sequences: TokenSequences) -> list[_Tree]:
    """Returns trees of sequences that share half of their tokens with a neighbor."""
    ids = sequences.input_ids
    # The bytes of numbers of one sign and width, the greatest first, sort like them.
    order = sorted(range(len(ids)), key=lambda i: ids[i].astype(">u4").tobytes())
    trees: list[_Tree] = []
    for number in order:
        read = ids[number][:-1]
        shared = trees[-1].shared(read) if trees else 0
        size = len(trees[-1]) if trees else 0
        fits = size + len(read) - shared <= max(_MOST_SHARED, bucket(size))
        if not trees or 2 * shared < len(read) or not fits:
            trees.append(_Tree())
        trees[-1].add(number, ids[number], sequences.is_target[number])
    return trees


def _batch(
    rows: Sequence[Sequence[_Tree]], shape: tuple[int, int], pad_id: int
) -> TreeBatch:
    """Returns the arrays of rows of trees."""
    inputs = {
        "input_ids": np.full(shape, pad_id, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "ends": np.zeros(shape, np.int32),
    }
    numbers, places, tokens = [], [], []
    for row, trees in enumerate(rows):
        start = 0
        for tree in trees:
            end = start + len(tree)
            here = (row, slice(start, end))
            ids, depths = map(np.concatenate, zip(*tree.branches, strict=True))
            inputs["input_ids"][here], inputs["positions"][here] = ids, depths
            inputs["attention_mask"][here] = 1
            inputs["ends"][here] = start + np.minimum(tree.ends, len(tree))
            for number, columns, predicted in tree.targets:
                numbers.append(np.full(len(columns), number))
                places.append(row * shape[1] + start + columns)
                tokens.append(predicted)
            start = end
    return TreeBatch(inputs, *map(np.concatenate, (numbers, places, tokens)))

"""Batches: examples padded to a few lengths, in a reproducible order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparse_jax.data.order import (
    check_sizes,
    given_order,
    shuffled_order,
    split_parts,
)
from sparse_jax.data.tokenizer import Encoded

__all__ = [
    "Batch",
    "Batches",
    "bucket_lengths",
    "bucket_of",
    "eval_batches",
    "stack",
    "train_batches",
]


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


Batch = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of one pass over examples; iterating again yields the same ones.

    A batch is a dictionary of arrays with `B = batch_size` rows of `T` tokens, or with
    shapes `[A, B / A, ...]` if `A = accumulate` is more than 1:

    - `input_ids`, `attention_mask`, and `token_type_ids` if the tokenizer gives them:
      int32 `[B, T]`. The mask is 1 at tokens and 0 at padding.
    - `labels`: int32 or float32 `[B]`.
    - `weights`: float32 `[B]`, 1 for an example and 0 for a filler.

    `T` is one of `bucket_lengths(max_length)`, so a compiled step meets few shapes. The
    last batch is filled up by repeating its first example with weight 0. With `l` the
    losses of the rows, the loss of a batch is

        sum(weights * l) / sum(weights),

    both sums over all rows, also over all `A` parts: a part may hold fillers only.
    """

    encoded: Encoded
    batch_size: int
    accumulate: int
    plan: tuple[np.ndarray, ...]  # positions of the examples of each batch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._batch, self.plan)

    def _batch(self, rows: np.ndarray) -> Batch:
        """Returns the batch of some examples."""
        fillers = np.full(self.batch_size - len(rows), rows[0])
        arrays = _padded(self.encoded, np.concatenate([rows, fillers]))
        arrays["weights"] = (np.arange(self.batch_size) < len(rows)).astype(np.float32)
        return split_parts(arrays, self.accumulate)


def train_batches(
    encoded: Encoded,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    accumulate: int = 1,
    start: int = 0,
    group_by_length: bool = False,
) -> Batches:
    """Returns the batches of one epoch, shuffled; each example is in one of them.

    The order depends on nothing but the arguments. The examples that do not fill a
    batch come last.

    Args:
      encoded: the training examples.
      batch_size: examples of one update.
      seed: not negative.
      epoch: not negative; each has an order of its own.
      accumulate: parts that a batch is computed in.
      start: batches of the epoch to leave out, to resume in the middle.
      group_by_length: whether examples of similar length share a batch: less padding,
        but batches that are not random samples.

    Raises:
      InputError: if `accumulate` does not divide `batch_size`, or if a number is
        outside its range.
    """
    check_sizes(batch_size, accumulate)
    lengths = np.array([len(ids) for ids in encoded.input_ids])
    plan = shuffled_order(
        lengths,
        batch_size,
        seed=seed,
        epoch=epoch,
        start=start,
        group_by_length=group_by_length,
    )
    return Batches(encoded, batch_size, accumulate, plan)


def eval_batches(encoded: Encoded, batch_size: int) -> Batches:
    """Returns batches of all examples in their order, each example once.

    Outputs are in the order of the labels after `outputs[weights == 1]`.

    Raises:
      InputError: if `batch_size` is not positive.
    """
    check_sizes(batch_size, 1)
    return Batches(encoded, batch_size, 1, given_order(len(encoded), batch_size))


def _padded(encoded: Encoded, rows: np.ndarray) -> Batch:
    """Returns some examples, padded to the shortest length that holds them."""
    ids = [encoded.input_ids[row] for row in rows]
    length = bucket_of(ids, encoded.max_length)
    arrays = {
        "input_ids": stack(ids, length, encoded.pad_id),
        "attention_mask": stack([np.ones_like(row) for row in ids], length, 0),
        "labels": encoded.labels[rows],
    }
    if encoded.token_type_ids is not None:
        types = [encoded.token_type_ids[row] for row in rows]
        arrays["token_type_ids"] = stack(types, length, 0)
    return arrays

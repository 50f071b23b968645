"""Batches: examples padded to a few lengths, in a reproducible order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.tasks.tokens import Encoded

__all__ = ["Batch", "Batches", "bucket_lengths", "eval_batches", "train_batches"]

Batch = dict[str, np.ndarray]

# Batches whose examples are sorted together. More would pad less and mix less: the
# same examples would meet again in every epoch.
_WINDOW = 50


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
        if self.accumulate == 1:
            return arrays
        parts = (self.accumulate, self.batch_size // self.accumulate)
        return {name: x.reshape(*parts, *x.shape[1:]) for name, x in arrays.items()}


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


def train_batches(
    encoded: Encoded,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    accumulate: int = 1,
    start: int = 0,
) -> Batches:
    """Returns the batches of one epoch, shuffled; each example is in one of them.

    The order depends on nothing but `seed`, `epoch` and the data. Examples of similar
    length share a batch, so that little is padded; the examples that do not fill a
    batch are drawn at random and come last.

    Args:
      encoded: the training examples.
      batch_size: examples of one update.
      seed: not negative.
      epoch: not negative; each has an order of its own.
      accumulate: parts that a batch is computed in.
      start: batches of the epoch to leave out, to resume in the middle.

    Raises:
      InputError: if `accumulate` does not divide `batch_size`, or if a number is
        outside its range.
    """
    num_batches = -(-len(encoded) // max(batch_size, 1))
    _check_sizes(batch_size, accumulate)
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise InputError(f"`{name}` must not be negative, got {value}.")
    if not 0 <= start <= num_batches:
        raise InputError(
            f"`start` must be in [0, {num_batches}], the batches of an epoch, "
            f"got {start}."
        )
    plan = _shuffled(encoded, batch_size, seed, epoch)
    return Batches(encoded, batch_size, accumulate, tuple(plan[start:]))


def eval_batches(encoded: Encoded, batch_size: int) -> Batches:
    """Returns batches of all examples in their order, each example once.

    Outputs are in the order of the labels after `outputs[weights == 1]`.

    Raises:
      InputError: if `batch_size` is not positive.
    """
    _check_sizes(batch_size, 1)
    order = np.arange(len(encoded))
    return Batches(encoded, batch_size, 1, tuple(_cut(order, batch_size)))


def _check_sizes(batch_size: int, accumulate: int) -> None:
    """Raises unless a batch can be cut into parts."""
    if batch_size < 1:
        raise InputError(f"`batch_size` must be positive, got {batch_size}.")
    if accumulate < 1 or batch_size % accumulate:
        raise InputError(
            f"`accumulate` must divide the batch size {batch_size}, got {accumulate}."
        )


def _shuffled(
    encoded: Encoded, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Returns the examples of each batch, the incomplete batch last."""
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = random.permutation(len(encoded))
    # The rest is cut off before sorting: otherwise it would be the longest examples,
    # and weigh more, since the mean over a batch of few gives each of them more.
    whole, rest = np.split(order, [len(order) // batch_size * batch_size])
    lengths = np.array([len(ids) for ids in encoded.input_ids])
    batches = []
    for window in _cut(whole, _WINDOW * batch_size):
        batches += _cut(window[np.argsort(lengths[window], kind="stable")], batch_size)
    shuffled = [batches[i] for i in random.permutation(len(batches))]
    return shuffled + _cut(rest, batch_size)


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns consecutive pieces, the last one possibly shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def _padded(encoded: Encoded, rows: np.ndarray) -> Batch:
    """Returns some examples, padded to the shortest length that holds them."""
    longest = max(len(encoded.input_ids[row]) for row in rows)
    length = min(n for n in bucket_lengths(encoded.max_length) if n >= longest)
    ids = [encoded.input_ids[row] for row in rows]
    arrays = {
        "input_ids": _stacked(ids, length, encoded.pad_id),
        "attention_mask": _stacked([np.ones_like(row) for row in ids], length, 0),
        "labels": encoded.labels[rows],
    }
    if encoded.token_type_ids is not None:
        types = [encoded.token_type_ids[row] for row in rows]
        arrays["token_type_ids"] = _stacked(types, length, 0)
    return arrays


def _stacked(rows: Sequence[np.ndarray], length: int, filler: int) -> np.ndarray:
    """Returns rows as one array, filled up on the right."""
    stacked = np.full((len(rows), length), filler, np.int32)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return stacked

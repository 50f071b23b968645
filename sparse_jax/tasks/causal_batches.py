"""Batches of token sequences: padded one in a row, or packed several in a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparse_jax.tasks.causal_tokens import TokenSequences
from sparse_jax.tasks.order import (
    check_sizes,
    given_order,
    random_of,
    shuffled_order,
    split_parts,
)
from sparse_jax.tasks.padding import bucket_of, stack
from sparse_jax.tasks.segments import pack_rows, segment_arrays

__all__ = ["CausalBatches", "causal_eval_batches", "causal_train_batches"]


_PACKING = 1


@dataclass(frozen=True, eq=False)
class CausalBatches:
    """Batches of one pass over sequences; iterating again yields the same ones.

    A batch is a dictionary of arrays with `B = batch_size` rows of `T` tokens, or with
    shapes `[A, B / A, T]` if `A = accumulate` is more than 1:

    - `input_ids`, `attention_mask`: int32 `[B, T]`. The mask is 1 at tokens and 0 at
      padding.
    - `weights`: float32 `[B, T]`, 1 at a token that is predicted from those before
      it, and 0 elsewhere: never 1 at the first token of a sequence.
    - `segment_ids`, `positions`, if packed: int32 `[B, T]`, see `segment_arrays`.

    `T` is one of `bucket_lengths(max_length)`, or `max_length` if packed. The last
    batch is filled up by repeating its first row with weight 0. With `l_t` the
    cross-entropy of token t given the tokens before it in its sequence, that is of
    the logits at t - 1, the loss of a batch is

        sum(weights[:, 1:] * l[:, 1:]) / sum(weights),

    both sums over all rows, also over all `A` parts: a part may have no weight.
    """

    sequences: TokenSequences
    batch_size: int
    accumulate: int
    is_packed: bool
    plan: tuple[tuple[np.ndarray, ...], ...]  # sequences of each row of each batch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return map(self._batch, self.plan)

    def _batch(self, rows: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Returns the batch of some rows."""
        fillers = (rows[0],) * (self.batch_size - len(rows))
        arrays = self._arrays(rows + fillers)
        arrays["weights"][len(rows) :] = 0
        return split_parts(arrays, self.accumulate)

    def _arrays(self, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Returns rows with all their weights."""
        parts = [[self.sequences.input_ids[i] for i in row] for row in rows]
        marks = [[self.sequences.is_target[i] for i in row] for row in rows]
        ids = [np.concatenate(row) for row in parts]
        max_length = self.sequences.max_length
        length = max_length if self.is_packed else bucket_of(ids, max_length)
        weights = stack([np.concatenate(row) for row in marks], length, 0)
        arrays = {
            "input_ids": stack(ids, length, self.sequences.pad_id),
            "attention_mask": stack([np.ones_like(row) for row in ids], length, 0),
            "weights": weights.astype(np.float32),
        }
        return arrays | (segment_arrays(parts, length) if self.is_packed else {})


def causal_train_batches(
    sequences: TokenSequences,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    accumulate: int = 1,
    start: int = 0,
    is_packed: bool = False,
    group_by_length: bool = False,
) -> CausalBatches:
    """Returns the batches of one epoch, shuffled; each sequence is in one of them.

    The order depends on nothing but the arguments, and every epoch has the same
    number of batches. Rows that do not fill a batch come last.

    Args:
      sequences: the training sequences.
      batch_size: rows of one update.
      seed: not negative.
      epoch: not negative; each has an order of its own.
      accumulate: parts that a batch is computed in.
      start: batches of the epoch to leave out, to resume in the middle.
      is_packed: whether a row holds as many sequences as fit. Otherwise it holds one.
      group_by_length: whether sequences of similar length share a batch. It changes
        nothing about packed rows, which are all of one length.

    Raises:
      InputError: if `accumulate` does not divide `batch_size`, or if a number is
        outside its range.
    """
    check_sizes(batch_size, accumulate)
    rows, lengths = _single_rows(sequences), _lengths(sequences)
    if is_packed:
        # Not the random numbers of the order of batches, which are drawn from again.
        random = random_of(seed, epoch, _PACKING)
        rows = pack_rows(lengths, sequences.max_length, random)
        lengths = np.full(len(rows), sequences.max_length)
    order = shuffled_order(
        lengths,
        batch_size,
        seed=seed,
        epoch=epoch,
        start=start,
        group_by_length=group_by_length and not is_packed,
    )
    plan = tuple(tuple(rows[i] for i in batch) for batch in order)
    return CausalBatches(sequences, batch_size, accumulate, is_packed, plan)


def causal_eval_batches(
    sequences: TokenSequences, batch_size: int, *, is_packed: bool = False
) -> CausalBatches:
    """Returns batches of all sequences, each once, and in their order if not packed.

    Raises:
      InputError: if `batch_size` is not positive.
    """
    check_sizes(batch_size, 1)
    rows = _single_rows(sequences)
    if is_packed:
        rows = pack_rows(_lengths(sequences), sequences.max_length)
    order = given_order(len(rows), batch_size)
    plan = tuple(tuple(rows[i] for i in batch) for batch in order)
    return CausalBatches(sequences, batch_size, 1, is_packed, plan)


def _lengths(sequences: TokenSequences) -> np.ndarray:
    """Returns the number of tokens of every sequence."""
    return np.array([len(ids) for ids in sequences.input_ids])


def _single_rows(sequences: TokenSequences) -> list[np.ndarray]:
    """Returns rows of one sequence each."""
    return list(np.arange(len(sequences))[:, None])

"""Batches of token sequences: padded one in a row, or packed several in a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparse_jax.data.batches import bucket_of, stack
from sparse_jax.data.causal_tokens import TokenSequences
from sparse_jax.data.order import (
    check_sizes,
    given_order,
    random_of,
    shuffled_order,
    split_parts,
)
from sparse_jax.errors import InputError

__all__ = [
    "CausalBatches",
    "causal_eval_batches",
    "causal_train_batches",
    "pack_rows",
    "segment_arrays",
]


def pack_rows(
    lengths: np.ndarray, max_length: int, random: np.random.Generator | None = None
) -> list[np.ndarray]:
    """Returns which sequences share a row of at most `max_length` tokens.

    Best fit decreasing: from the longest on, each sequence goes to the row with the
    least room that holds it. It needs at most 11/9 of the fewest rows possible, plus
    four. The numbers of rows and of sequences in them depend on the lengths only;
    `random` draws which of the sequences of one length goes where, and their order.

    Args:
      lengths: tokens of each sequence, shape `[N]`.
      max_length: most tokens of a row.
      random: None keeps equal lengths in their order.

    Raises:
      InputError: if a sequence is longer than a row.

    Example:
      >>> [row.tolist() for row in pack_rows(np.array([5, 3, 4, 4]), 8)]
      [[0, 1], [2, 3]]

    References:
      Johnson et al., 1974, Worst-case performance bounds for simple one-dimensional
      packing algorithms.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > max_length:
        raise InputError(
            f"`max_length` must hold the longest sequence, {lengths.max()} tokens, "
            f"got {max_length}."
        )
    order = np.arange(len(lengths))
    if random is not None:
        random.shuffle(order)
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows = [np.array(row) for row in _best_fit(order, lengths, max_length)]
    return rows if random is None else [random.permutation(row) for row in rows]


def segment_arrays(
    rows: Sequence[Sequence[np.ndarray]], length: int
) -> dict[str, np.ndarray]:
    """Returns the segment and the position of every token of some rows.

    Args:
      rows: the sequences of each row.
      length: tokens of a row, `T`.

    Returns:
      `segment_ids`, int32 `[B, T]`: 1, 2, ... for the sequences of a row and 0 for
      padding; a token may attend to those of its own segment only. `positions`, int32
      `[B, T]`: from 0 in every segment, and 0 for padding.

    Example:
      >>> arrays = segment_arrays([[np.zeros(2), np.zeros(3)]], 6)
      >>> arrays["segment_ids"].tolist(), arrays["positions"].tolist()
      ([[1, 1, 2, 2, 2, 0]], [[0, 1, 0, 1, 2, 0]])
    """
    segment_ids = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        end = 0
        for number, sequence in enumerate(row, start=1):
            start, end = end, end + len(sequence)
            segment_ids[i, start:end] = number
            positions[i, start:end] = np.arange(end - start)
    return {"segment_ids": segment_ids, "positions": positions}


def _best_fit(
    order: np.ndarray, lengths: np.ndarray, max_length: int
) -> list[list[int]]:
    """Returns rows filled in a given order."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    # Bit n says whether a row has room for exactly n tokens: the lowest bit that is
    # large enough is found at once, among any number of rows.
    rooms = 0
    for number in order.tolist():
        length = int(lengths[number])
        fits = rooms >> length
        room = length + (fits & -fits).bit_length() - 1 if fits else max_length
        if fits:
            row = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(number)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


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

"""Packing: several token sequences in one row of a batch."""

from collections.abc import Sequence

import numpy as np

from sparse_jax.errors import InputError

__all__ = ["pack_rows", "segment_arrays"]


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

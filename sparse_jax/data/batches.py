"""Batches: rows of tokens padded to a few lengths, in a reproducible order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparse_jax.data.packing import pack_rows, segment_arrays
from sparse_jax.errors import InputError

__all__ = [
    "Batch",
    "Batches",
    "Encoded",
    "TokenSequences",
    "Tokenized",
    "bucket_lengths",
    "eval_batches",
    "random_of",
    "shuffled_rows",
    "stack_batches",
    "train_batches",
]

Batch = dict[str, np.ndarray]

# Batches whose examples are sorted together if batches are grouped by length. More
# would pad less and mix less: the same examples would meet again in every epoch.
_WINDOW = 50
_PACKING, _WINDOWS = 1, 4  # purposes of random numbers


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


def _stack(
    rows: Sequence[np.ndarray], length: int, filler: int = 0, dtype: type = np.int32
) -> np.ndarray:
    """Returns rows as one array `[B, length]`, filled up on the right."""
    stacked = np.full((len(rows), length), filler, dtype)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return stacked


def _padded(
    ids: Sequence[np.ndarray], pad_id: int, max_length: int, *, is_packed: bool = False
) -> Batch:
    """Returns `input_ids` and `attention_mask` of rows."""
    longest = max_length if is_packed else max(map(len, ids))
    length = min(n for n in bucket_lengths(max_length) if n >= longest)
    mask = _stack([np.ones_like(row) for row in ids], length)
    return {"input_ids": _stack(ids, length, pad_id), "attention_mask": mask}


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples as token ids, not padded yet."""

    input_ids: list[np.ndarray]  # N arrays, shape=(tokens,), int32
    token_type_ids: list[np.ndarray] | None  # the same, if the tokenizer gives them
    labels: np.ndarray  # shape=(N,), int32 classes or float32 values
    max_length: int  # no example has more tokens
    pad_id: int
    num_truncated: int = 0  # examples that lost tokens
    is_packed: Literal[False] = False  # a row holds one
    weights: np.ndarray | None = None  # shape=(N,), float32, of the loss; None: all 1

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, rows: Sequence[np.ndarray]) -> Batch:
        """Returns examples as arrays of `B` rows of `T` tokens.

        - `input_ids`, `attention_mask`, and `token_type_ids` if the tokenizer gives
          them: int32 `[B, T]`. The mask is 1 at tokens and 0 at padding.
        - `labels`: int32 or float32 `[B]`.
        - `weights`: float32 `[B]`, 1 for an example, or its own; a filler has 0.

        With `l` the losses of the rows, the loss of a batch is

            sum(weights * l) / sum(weights),

        both sums over all rows, also over all parts: a part may hold fillers only.
        """
        numbers = np.concatenate(rows)
        ids = [self.input_ids[i] for i in numbers]
        arrays = _padded(ids, self.pad_id, self.max_length)
        arrays["labels"] = self.labels[numbers]
        if self.token_type_ids is not None:
            types = [self.token_type_ids[i] for i in numbers]
            arrays["token_type_ids"] = _stack(types, arrays["input_ids"].shape[1])
        if self.weights is not None:
            return arrays | {"weights": self.weights[numbers]}
        return arrays | {"weights": np.ones(len(numbers), np.float32)}


@dataclass(frozen=True, eq=False)
class TokenSequences:
    """Token ids with marks on those that are predicted, not padded yet."""

    input_ids: list[np.ndarray]  # N arrays, shape=(tokens,), int32
    is_target: list[np.ndarray]  # the same, bool; never the first token
    max_length: int  # no sequence has more tokens
    pad_id: int
    num_truncated: int = 0  # of the N conversations, lost tokens at their end
    num_dropped: int = 0  # others, which have no target
    end_ids: tuple[int, ...] = ()  # tokens that end the responses
    is_packed: bool = False  # whether a row holds as many sequences as fit
    weights: np.ndarray | None = None  # shape=(N,), float32, of the loss; None: all 1

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted in one pass."""
        return sum(int(marks.sum()) for marks in self.is_target)

    def batch(self, rows: Sequence[np.ndarray]) -> Batch:
        """Returns sequences as arrays of `B` rows of `T` tokens.

        - `input_ids`, `attention_mask`: int32 `[B, T]`. The mask is 1 at tokens and 0
          at padding.
        - `weights`: float32 `[B, T]`, 1 (or the weight of the sequence) at a token that
          is predicted from those before it, and 0 elsewhere: also at the first token.
        - `segment_ids`, `positions`, if packed: int32 `[B, T]`, see `segment_arrays`.

        With `l_t` the cross-entropy of token t given the tokens before it in its
        sequence, that is of the logits at t - 1, the loss of a batch is

            sum(weights[:, 1:] * l[:, 1:]) / sum(weights),

        both sums over all rows, also over all parts: a part may have no weight.
        """
        parts = [[self.input_ids[i] for i in row] for row in rows]
        scale = lambda i: 1 if self.weights is None else self.weights[i]
        marks = [
            np.concatenate([self.is_target[i] * scale(i) for i in row]) for row in rows
        ]
        ids = [np.concatenate(row) for row in parts]
        arrays = _padded(ids, self.pad_id, self.max_length, is_packed=self.is_packed)
        length = arrays["input_ids"].shape[1]
        arrays["weights"] = _stack(marks, length, dtype=np.float32)
        return arrays | (segment_arrays(parts, length) if self.is_packed else {})


Tokenized = Encoded | TokenSequences


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of one pass over examples; iterating again yields the same ones.

    A batch has the arrays of `examples.batch` with `B = batch_size` rows, or with
    shapes `[A, B / A, ...]` if `A = accumulate` is more than 1. Rows have `T` tokens,
    the least of `bucket_lengths(max_length)` that holds them all, so a compiled step
    meets few shapes, or `max_length` if they are packed. The last batch is filled up by
    repeating its first row with weight 0.
    """

    examples: Tokenized
    rows: Sequence[np.ndarray]  # numbers of the examples of each row
    plan: Sequence[np.ndarray]  # numbers of the rows of each batch
    batch_size: int
    accumulate: int = 1

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._batch, self.plan)

    def _batch(self, numbers: np.ndarray) -> Batch:
        rows = [self.rows[i] for i in numbers]
        arrays = self.examples.batch(rows + rows[:1] * (self.batch_size - len(rows)))
        arrays["weights"][len(rows) :] = 0
        if self.accumulate == 1:
            return arrays
        parts = (self.accumulate, self.batch_size // self.accumulate)
        return {name: x.reshape(*parts, *x.shape[1:]) for name, x in arrays.items()}


def train_batches(
    examples: Tokenized,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    accumulate: int = 1,
    start: int = 0,
    group_by_length: bool = False,
) -> Batches:
    """Returns the batches of one epoch, shuffled; each example is in one of them.

    The order depends on nothing but the arguments, and every epoch has the same
    number of batches. The rows that do not fill a batch come last.

    Args:
      examples: the training examples.
      batch_size: rows of one update.
      seed: not negative.
      epoch: not negative; each has an order of its own.
      accumulate: parts that a batch is computed in.
      start: batches of the epoch to leave out, to resume in the middle.
      group_by_length: whether examples of similar length share a batch: less padding,
        but batches that are not random samples. It changes nothing about packed rows,
        which are all of one length.

    Raises:
      InputError: if `accumulate` does not divide `batch_size`, or if a number is
        outside its range.
    """
    _require_positive(batch_size)
    if accumulate < 1 or batch_size % accumulate:
        raise InputError(
            f"`accumulate` must divide the batch size {batch_size}, got {accumulate}."
        )
    random = random_of(seed, epoch)
    # Packing draws numbers of its own, not those of the order of batches.
    rows = _rows(examples, random_of(seed, epoch, _PACKING))
    num_batches = -(-len(rows) // batch_size)
    if not 0 <= start <= num_batches:
        raise InputError(
            f"`start` must be in [0, {num_batches}], the batches of an epoch, "
            f"got {start}."
        )
    order = random.permutation(len(rows))
    if group_by_length and not examples.is_packed:
        plan = _grouped(order, _lengths(examples), batch_size, random)
    else:
        plan = _cut(order, batch_size)
    return Batches(examples, rows, plan[start:], batch_size, accumulate)


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Returns batches as one, `[N, B, ...]`, filled up with zeros on the right.

    Example:
      >>> one, other = ({"input_ids": np.full((1, n), n)} for n in (2, 3))
      >>> stack_batches([one, other])["input_ids"].tolist()
      [[[2, 2, 0]], [[3, 3, 3]]]
    """

    def stack(arrays: list[np.ndarray]) -> np.ndarray:
        longest = max(array.shape[-1] for array in arrays)
        room = [longest - array.shape[-1] for array in arrays]
        # Tokens are the last axis; examples, of which labels have one, are as many.
        before = [(0, 0)] * (arrays[0].ndim - 1)
        return np.stack(
            [
                np.pad(array, [*before, (0, more)])
                for array, more in zip(arrays, room, strict=True)
            ]
        )

    return {name: stack([one[name] for one in batches]) for name in batches[0]}


def shuffled_rows(
    examples: Tokenized, seed: int, epoch: int, window: int
) -> list[np.ndarray]:
    """Returns the rows of a window of a stream in the order of an epoch.

    Those of the first window are in the order of `train_batches`.
    """
    purpose = (_WINDOWS, window) if window else ()
    rows = _rows(examples, random_of(seed, epoch, _PACKING, *purpose))
    return [rows[i] for i in random_of(seed, epoch, *purpose).permutation(len(rows))]


def eval_batches(examples: Tokenized, batch_size: int) -> Batches:
    """Returns batches of all examples, each once, and in their order if not packed.

    Outputs of examples are in the order of the labels after `outputs[weights == 1]`.

    Raises:
      InputError: if `batch_size` is not positive.
    """
    _require_positive(batch_size)
    rows = _rows(examples, None)
    return Batches(examples, rows, _cut(np.arange(len(rows)), batch_size), batch_size)


def random_of(seed: int, epoch: int, *purpose: int) -> np.random.Generator:
    """Returns the random numbers of an epoch, others for each purpose.

    Raises:
      InputError: if `seed` or `epoch` is negative.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise InputError(f"`{name}` must not be negative, got {value}.")
    return np.random.Generator(np.random.PCG64([seed, epoch, *purpose]))


def _require_positive(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"`batch_size` must be positive, got {batch_size}.")


def _rows(
    examples: Tokenized, random: np.random.Generator | None
) -> Sequence[np.ndarray]:
    """Returns the numbers of the examples of each row."""
    if examples.is_packed:
        return pack_rows(_lengths(examples), examples.max_length, random)
    return [*np.arange(len(examples.input_ids))[:, None]]


def _lengths(examples: Tokenized) -> np.ndarray:
    return np.array([len(ids) for ids in examples.input_ids])


def _grouped(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Returns batches of examples of similar length; the incomplete one is random."""
    # The rest is cut off before sorting: otherwise it would be the longest examples,
    # and weigh more, since the mean over a batch of few gives each of them more.
    whole, rest = np.split(order, [len(order) // batch_size * batch_size])
    batches = []
    for window in _cut(whole, _WINDOW * batch_size):
        batches += _cut(window[np.argsort(lengths[window], kind="stable")], batch_size)
    shuffled = [batches[i] for i in random.permutation(len(batches))]
    return shuffled + _cut(rest, batch_size)


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns consecutive pieces, the last one possibly shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]

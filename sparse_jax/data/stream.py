"""Streams: training batches from a file of JSON lines that memory need not hold."""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from sparse_jax.data.batches import Batch, Batches, TokenSequences, shuffled_rows
from sparse_jax.data.read_rows import Rows, Source, read_line
from sparse_jax.errors import InputError, reason_of

__all__ = ["Place", "Stream", "is_streamed", "read_head", "sampled_hash"]

_FORMAT = 1  # of the index
_LONGEST = 1 << 26  # bytes of a line
_SAMPLED = "sampled:"  # before a hash that does not cover all of a file
_SAMPLES, _SAMPLE = 64, 1 << 16  # pieces of a file that its hash covers, and bytes each


class Place(NamedTuple):
    """A place between two lines."""

    byte: int = 0
    line: int = 0  # lines before it


class Window(NamedTuple):
    """What is known of a window that has been read."""

    byte: int  # where it ends
    line: int
    rows: int  # of batches that it fills
    used: int
    truncated: int  # of these
    dropped: int
    digest: str  # of its bytes

    @property
    def end(self) -> Place:
        """Where the next one begins."""
        return Place(self.byte, self.line)


class _Lines(NamedTuple):
    """Lines of a file that are not blank, with their numbers."""

    numbered: list[tuple[int, bytes]]
    end: Place
    digest: str
    is_last: bool  # whether the file ends in the last of them


def read_head(path: Path, count: int) -> tuple[Rows, Place]:
    """Returns the first records of a file of JSON lines, and where the others begin.

    Raises:
      InputError: if there are no others, or a record is wrong.
    """
    lines = _read(path, Place(), count + 1)
    if len(lines.numbered) <= count:
        raise InputError(
            f"`{path}` must have more than {count} examples to hold {count} out, got "
            f"{len(lines.numbered)}. Lower `held_out`, or leave out `streaming`."
        )
    lines = _read(path, Place(), count)
    return _rows(path, lines), lines.end


def sampled_hash(path: Path) -> str:
    """Returns a hash of the size of a file and of 64 pieces spread over it.

    Raises:
      InputError: if it cannot be read.
    """
    try:
        size = path.stat().st_size
        found = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(size - _SAMPLE, 0) // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE))
    except OSError as error:
        raise _unreadable(path, error) from error
    return f"{_SAMPLED}{found.hexdigest()}"


def is_streamed(digest: object) -> bool:
    """Returns whether a hash is that of a file that was streamed."""
    return isinstance(digest, str) and digest.startswith(_SAMPLED)


@dataclass(eq=False)
class Stream:
    """The batches of a file of JSON lines, of which memory holds three windows.

    The records of a window are made into rows and shuffled together; the rows of all
    windows follow each other, pass after pass, and batch b has those from b * B on. So
    a batch depends on the seed, the file, and its number only.

    The index says how many rows every window has, to find a batch without reading what
    is before it. It follows from the file, so that nothing is lost without it.

    Attributes:
      path: of the file.
      tokenize: makes sequences of the records of a window, none of none.
      batch_size: rows of an update.
      accumulate: parts that a batch is computed in.
      seed: of the order of rows.
      window: records that are read and shuffled together.
      start: of the first window.
      first: the sequences of the first window.
      digest: of the file, as `sampled_hash` returns it.

    Raises:
      InputError: if the file has no record, or one of the first window is wrong; while
        iterating, if another one is, or the file has changed.
    """

    path: Path
    tokenize: Callable[[Rows], TokenSequences]
    batch_size: int
    accumulate: int
    seed: int
    window: int
    start: Place = Place()
    first: TokenSequences = field(init=False)
    digest: str = field(init=False)
    _size: int = field(init=False)
    _windows: list[Window] = field(init=False, default_factory=list)
    _index: Path | None = field(init=False, default=None)
    # A selection by several batches reads beside the training.
    _reading: Lock = field(init=False, default_factory=Lock)

    def __post_init__(self):
        self.digest, self._size = sampled_hash(self.path), self.path.stat().st_size
        lines = _read(self.path, self.start, self.window)
        if not lines.numbered:
            raise InputError(f"`{self.path}` must have examples, got none.")
        self.first = self.tokenize(_rows(self.path, lines))
        self._add(lines, self.first)
        if not len(self.first):
            raise InputError(
                f"`{self.path}` must have tokens to train on in its first "
                f"{self.window} records, got none. Raise `max_length`."
            )

    def batches(self, first: int) -> Iterator[Batch]:
        """Yields the batches from some number on, without end."""
        rows = self._rows(first * self.batch_size)
        while True:
            yield self._batch([*islice(rows, self.batch_size)])

    def counts(self, batches: int) -> tuple[int, int, int]:
        """Returns the sequences that were read for some batches, truncated, dropped."""
        rows, found = 0, np.zeros(3, int)
        for one in self._windows:
            if rows < batches * self.batch_size:
                found += (one.used, one.truncated, one.dropped)
            rows += one.rows
        used, truncated, dropped = found.tolist()
        return used, truncated, dropped

    def keep_index(self, path: Path, *, is_writer: bool) -> None:
        """Keeps the index in a file, beginning with what an earlier run has left there.

        Args:
          path: of the index, which may exist.
          is_writer: whether this process writes it.

        Raises:
          InputError: if what the earlier run has read of the file has changed.
        """
        digest, size, windows = _read_index(path)
        if windows and digest != self.digest:
            # What was not read yet may be mended.
            start = self.start
            for known in windows:
                self._require_same(start, known, _read(self.path, start, self.window))
                start = known.end
            if start.byte == size:
                raise self._changed(self.start, start)
        if len(windows) > len(self._windows):
            self._windows = windows
        if not is_writer:
            return
        # Without an index a run that is resumed reads all again.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            entries = [[_FORMAT, self.digest, self._size], *enumerate(self._windows)]
            part = path.with_suffix(".part")
            part.write_text("".join(map(_entry, entries)), encoding="utf-8")
            self._index = part.replace(path)

    def _batch(self, rows: Sequence[tuple[TokenSequences, np.ndarray]]) -> Batch:
        """Returns rows of one window, or of two, as a batch."""
        ids, marks, weights, numbers = [], [], [], []
        for tokens, row in rows:
            numbers.append(np.arange(len(ids), len(ids) + len(row)))
            ids += [tokens.input_ids[i] for i in row]
            marks += [tokens.is_target[i] for i in row]
            own = tokens.weights
            # A list would be added to an array, not made longer.
            weights += [1.0] * len(row) if own is None else own[row].tolist()
        weights = np.array(weights, np.float32)
        examples = replace(self.first, input_ids=ids, is_target=marks, weights=weights)
        plan = [np.arange(len(rows))]
        (batch,) = Batches(examples, numbers, plan, self.batch_size, self.accumulate)
        return batch

    def _rows(self, row: int) -> Iterator[tuple[TokenSequences, np.ndarray]]:
        """Yields the rows from some number on; the next window is read meanwhile."""
        epoch, number, skipped = self._find(row)
        with ThreadPoolExecutor(1, "stream") as reader:
            coming = reader.submit(self._shuffled, epoch, number)
            while True:
                epoch, number, rows = coming.result()
                coming = reader.submit(self._shuffled, epoch, number + 1)
                yield from rows[skipped:]
                skipped = 0

    def _find(self, row: int) -> tuple[int, int, int]:
        """Returns the epoch, the window, and the row in it, of a row."""
        epoch = number = 0
        while row >= self._windows[number].rows:
            row -= self._windows[number].rows
            number += 1
            if number == len(self._windows) and self._is_whole:
                epoch, number = epoch + 1, 0
            elif number == len(self._windows):
                self._tokens(number)
        return epoch, number, row

    def _shuffled(
        self, epoch: int, number: int
    ) -> tuple[int, int, list[tuple[TokenSequences, np.ndarray]]]:
        """Returns an epoch, a window, and its rows; after the last one the first."""
        if number == len(self._windows) and self._is_whole:
            epoch, number = epoch + 1, 0
        tokens = self._tokens(number)
        if not len(tokens):
            return epoch, number, []
        rows = shuffled_rows(tokens, self.seed, epoch, number)
        return epoch, number, [(tokens, row) for row in rows]

    @property
    def _is_whole(self) -> bool:
        """Whether every window is known."""
        return self._windows[-1].byte == self._size

    def _tokens(self, number: int) -> TokenSequences:
        """Returns the sequences of a window, which is known or the first unknown."""
        if number == 0:
            return self.first
        with self._reading:
            return self._read_tokens(number)

    def _read_tokens(self, number: int) -> TokenSequences:
        """Reads a window after the first; one at a time, as an unknown one is added."""
        start = self._windows[number - 1].end
        lines = _read(self.path, start, self.window)
        is_end = lines.end.byte == self._size
        if number < len(self._windows):
            self._require_same(start, self._windows[number], lines)
        elif lines.end.byte > self._size or (lines.is_last and not is_end):
            raise InputError(
                f"`{self.path}` must stay as it is while it is read, got another end "
                f"than at byte {self._size:,}. Put the file back, then continue with "
                "`resume=True`."
            )
        try:
            tokens = self.tokenize(_rows(self.path, lines))
        except InputError as error:
            place = f"`{self.path}` line {lines.end.line} "
            is_last = is_end and str(error).startswith(place)
            why = " It is the last line: the file may be truncated." * is_last
            raise InputError(
                f"{error}{why} Fix the file, then continue with `resume=True`."
            ) from error
        if number == len(self._windows):
            self._add(lines, tokens)
        return tokens

    def _add(self, lines: _Lines, tokens: TokenSequences) -> None:
        """Adds a window to the index."""
        rows = len(shuffled_rows(tokens, self.seed, 0, 0)) if len(tokens) else 0
        counts = (len(tokens), tokens.num_truncated, tokens.num_dropped)
        one = Window(*lines.end, rows, *counts, lines.digest)
        number = len(self._windows)
        self._windows.append(one)
        if self._index is not None:
            with suppress(OSError), self._index.open("a", encoding="utf-8") as file:
                file.write(_entry((number, one)))

    def _require_same(self, start: Place, known: Window, lines: _Lines) -> None:
        """Raises unless a window is what it was when it was read first."""
        if (lines.end, lines.digest) != (known.end, known.digest):
            raise self._changed(start, known.end)

    def _changed(self, start: Place, end: Place) -> InputError:
        """Returns the error of a file that is not what it was."""
        return InputError(
            f"`{self.path}` must be what it was when the run read it, got other "
            f"content in lines {start.line + 1} to {end.line}, or behind. Put the file "
            "back, or pass `overwrite=True` to start over."
        )


def _read(path: Path, start: Place, count: int) -> _Lines:
    """Reads some records from a place on."""
    found, line, (byte, number) = [], b"", start
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            file.seek(byte)
            while len(found) < count and (line := file.readline(_LONGEST + 1)):
                number, byte = number + 1, byte + len(line)
                if len(line) > _LONGEST:
                    raise InputError(
                        f"`{path}` line {number} must have at most {_LONGEST:,} bytes, "
                        "got more. Write an object a line."
                    )
                digest.update(line)
                if start.byte == 0 and number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.rstrip(b"\r\n"):
                    found.append((number, line.removesuffix(b"\n").removesuffix(b"\r")))
    except OSError as error:
        raise _unreadable(path, error) from error
    return _Lines(found, Place(byte, number), digest.hexdigest(), not line)


def _rows(path: Path, lines: _Lines) -> Rows:
    """Returns lines as records."""
    source = Source(f"`{path}`", "line")
    return Rows(source, ((n, read_line(line, source, n)) for n, line in lines.numbered))


def _read_index(path: Path) -> tuple[str, int, list[Window]]:
    """Returns the hash, the size and the windows in an index; none if there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        form, digest, size = json.loads(lines[0])
    except (OSError, ValueError, IndexError, TypeError):
        return "", 0, []
    windows: list[Window] = []
    # What follows a line that was not finished, or is absent, is read again.
    with suppress(ValueError, TypeError):
        for line in lines[1:] if form == _FORMAT else ():
            number, fields = json.loads(line)
            if number != len(windows):
                break
            windows.append(Window(*fields))
    return digest, size, windows


def _entry(value: object) -> str:
    """Returns a line of an index."""
    return f"{json.dumps(value)}\n"


def _unreadable(path: Path, error: OSError) -> InputError:
    """Returns the error of a file that cannot be read."""
    return InputError(f"`{path}` must be a file that can be read: {reason_of(error)}.")

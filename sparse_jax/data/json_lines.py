"""JSON lines, written batch by batch, so that an interrupted command goes on."""

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from sparse_jax.errors import InputError, brief, reason_of
from sparse_jax.params.fields import Json

__all__ = ["JsonLines", "id_of"]

_log = logging.getLogger(__name__)

Line = Mapping[str, object]


class JsonLines:
    """A file of JSON lines, as a context.

    Until it is complete, the lines are in a file with `.part` behind the name, whose
    first line says what they depend on. After an interruption `done` lines are there
    already; after one that comes before the first of them there is no such file.
    Without a path the lines go to standard output.

    Args:
      path: of the file; None is standard output.
      identity: what the lines depend on, such as the model and the data.
      overwrite: whether to start over, and to replace the file.

    Raises:
      InputError: if the file exists, or its part depends on something else, or they
        cannot be read.
    """

    def __init__(
        self, path: str | Path | None, identity: Mapping[str, Json], overwrite: bool
    ):
        self.path, self.done = None if path is None else Path(path), 0
        self._identity = json.loads(json.dumps(identity))
        if self.path is None:
            return
        self._part = Path(f"{self.path}.part")
        try:
            if self.path.exists() and not (overwrite and self.path.is_file()):
                raise InputError(
                    f"`output` must be a new file, got {brief(str(path))}, which "
                    "exists. Choose another one, or pass `overwrite=True`."
                )
            if overwrite:
                self._part.unlink(missing_ok=True)
            if self._part.exists():
                self.done = self._checked()
            else:
                self._part.write_bytes(_lines([self._identity]))
            self._is_begun = self.done > 0
        except OSError as error:
            raise InputError(
                f"`output` must be a file that can be written, got {brief(str(path))}: "
                f"{reason_of(error)}."
            ) from error

    def _checked(self) -> int:
        """Returns how many lines there are; one that was not finished is cut off."""
        content = self._part.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.split(b"\n")[:-1] or [b"{}"]
        try:
            known = json.loads(first)
        except ValueError:
            known = None
        if not isinstance(known, dict) or known.keys() != self._identity.keys():
            known = {name: None for name in self._identity}
        elif not lines:
            # Nothing depends on it yet, where the process was killed, say.
            self._part.write_bytes(_lines([self._identity]))
            return 0
        for name, value in self._identity.items():
            if known[name] != value:
                raise InputError(
                    f"`output` must not have begun with another {name}: "
                    f"`{self._part}` has lines of {brief(known[name])}, and this is "
                    f"{brief(value)}. Choose another file, or pass `overwrite=True`."
                )
        if len(whole) < len(content):
            os.truncate(self._part, len(whole))
        return len(lines)

    def add(self, lines: Sequence[Line]) -> None:
        """Writes lines at once."""
        if self.path is None:
            sys.stdout.write(_lines(lines).decode())
            sys.stdout.flush()
            return
        self._is_begun = True
        with self._part.open("ab") as file:
            file.write(_lines(lines))

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Puts the file in its place, unless the command was interrupted."""
        if self.path is None:
            return
        if error is not None:
            if not self._is_begun:
                # Another command, with what this one lacked, finds no traces of it.
                self._part.unlink(missing_ok=True)
            elif kind is KeyboardInterrupt:
                _log.warning("the same command continues from %s", self._part)
            return
        whole = self.path.with_name(f".{self.path.name}.whole")
        with self._part.open("rb") as part, whole.open("wb") as file:
            part.readline()
            file.writelines(part)
        whole.replace(self.path)
        self._part.unlink()


_IDS = ("id", "idx", "index", "guid")


def id_of(record: Line, number: int) -> object:
    """Returns what a record has as `id`, `idx`, `index` or `guid`, else its number.

    Example:
      >>> id_of({"text": "Yes.", "idx": 7}, 0), id_of({"text": "No."}, 1)
      (7, 1)
    """
    known = (record[name] for name in _IDS if record.get(name) is not None)
    return next(known, number)


def _lines(values: Iterable[Line]) -> bytes:
    """Returns values as lines."""
    texts = (json.dumps(value, ensure_ascii=False) for value in values)
    return "".join(f"{text}\n" for text in texts).encode("utf-8", "backslashreplace")

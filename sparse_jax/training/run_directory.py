"""The run directory: the one door through which results leave."""

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparse_jax.adapter.file import ADAPTER
from sparse_jax.errors import InputError, reason_of
from sparse_jax.params.fields import Json
from sparse_jax.sharding.processes import is_first_process, on_first_process
from sparse_jax.training.output_folder import (
    CHECKPOINTS,
    CONFIG,
    FILES,
    FREE,
    METRICS,
    PATCHES,
    ROWS,
    FolderLock,
    require_same_files,
    require_usable,
)
from sparse_jax.training.run_files import (
    Row,
    is_evaluation,
    read_json,
    read_metrics,
    read_rows,
    row_line,
    write_json,
    write_text,
)
from sparse_jax.training.settings import Settings
from sparse_jax.training.trackers import TRACKED, Callbacks, Start, Trackers

__all__ = ["RunDirectory"]

# What writing files may raise: safetensors has an error of its own, and another run
# may have taken a folder that was removed.
_FAILURES = (OSError, SafetensorError, InputError)
_RETRY_AFTER = 1.0  # seconds

_log = logging.getLogger(__name__)


class RunDirectory:
    """The files of one run, each written under a temporary name and then moved.

    Of several processes the first one writes. What cannot be written while the run goes
    on is kept and written later, and a folder that was removed is made again.

    Attributes:
      path: the folder.
      rows: what `metrics.jsonl` holds, one dictionary a line.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, read_rows(path / ROWS)
        self._config: Mapping[str, Any] = {}
        self._lock: FolderLock | None = None
        self._trackers: Trackers | None = None
        self.callbacks = Callbacks()
        self._written = -1  # bytes of `metrics.jsonl` if it is as it was left
        self._pending = b""  # rows that are not in it yet
        self._is_behind = False  # whether there are rows that could not be written

    @classmethod
    def create(cls, settings: Settings, config: Mapping[str, Json]) -> "RunDirectory":
        """Returns a directory with a `config.json`; a resumed run keeps its files.

        The folder is locked until `close`. Overwriting removes the files of a run only,
        never anything else.

        Raises:
          InputError: if a run is resumed that had another model or other examples, if
            another run writes to the folder, or if it cannot be written.
        """
        path, lock = Path(settings.output), FolderLock(Path(settings.output))

        def prepare() -> None:
            try:
                path.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                # Another run may have written there since.
                require_usable(settings)
                if settings.resume:
                    require_same_files(path, config)
                else:
                    _remove_run(path)
                    write_json(path / CONFIG, {"settings": settings.record(), **config})
            except OSError as error:
                raise InputError(
                    f"`output` must be a folder that can be written, got `{path}`: "
                    f"{reason_of(error)}. Choose another one."
                ) from error

        try:
            on_first_process(prepare)
            directory = cls(path)
            directory._config, directory._lock = read_json(path / CONFIG), lock
        except BaseException:
            lock.release()
            raise
        return directory

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, which a finished run no longer needs."""
        return self.path / CHECKPOINTS

    @property
    def identity(self) -> str:
        """SHA-256 of what the run is: settings that matter, model, data, versions."""
        config = {**self._config}
        settings = config.get("settings", {})
        config["settings"] = {k: v for k, v in settings.items() if k not in FREE}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()

    def rows_digest(self, step: int) -> str:
        """Returns the SHA-256 of the rows before the checkpoint of a step."""
        lines = (row_line(row) for row in self.rows if _is_before(row, step))
        return hashlib.sha256(b"".join(lines)).hexdigest()

    def require_steps(self, step: int, skipped: int) -> None:
        """Raises `ValueError` unless there are rows of all batches before a step."""
        steps = {row["step"] for row in self.rows}
        skips = [row for row in self.rows if row.get("is_skipped")]
        found = sum(row["step"] <= step for row in skips)
        if not steps >= set(range(1, step + 1)) or found != skipped:
            raise ValueError(f"it does not belong to the rows in {ROWS}")

    def finished(self) -> dict[str, Any] | None:
        """Returns the metrics of a finished run, and None of any other.

        Raises:
          InputError: if they are not those of a run, or its adapter is another one.
        """
        path = self.path / METRICS
        if not path.exists():
            return None
        metrics = read_metrics(path)
        adapter, size = self.path / ADAPTER, metrics["adapter_bytes"]
        if not adapter.is_file() or adapter.stat().st_size != size:
            raise InputError(
                f"`{adapter}` must have {size} bytes as `{METRICS}` says, and does "
                "not. Put it back, or pass `overwrite=True` to start over."
            )
        return metrics

    def rewind(self, step: int) -> None:
        """Forgets the rows after a step: the run continues there.

        If that is the end of an epoch, it begins with the evaluation.
        """
        self.rows = [row for row in self.rows if _is_before(row, step)]
        self._written = -1
        self.write_rows()

    def add_row(self, row: Row) -> None:
        """Appends a line to `metrics.jsonl`, later if that is not possible now."""
        self.rows.append(dict(row))
        self._pending += row_line(row)
        self.write_rows()
        if self._trackers is not None:
            self._trackers.log(row)
        self.callbacks.see(row)

    def show(self, words: Sequence[str], step: int) -> None:
        """Has the rows shown from here on by trackers, after some number of updates."""
        if words and is_first_process():
            config = self._config.get("settings", {})
            self._trackers = Trackers(words, Start(self.path, config, step))

    def write_rows(self) -> bool:
        """Writes the rows that are not in `metrics.jsonl`; returns whether it could."""
        if not is_first_process():
            return True
        try:
            self._restore()
            self._append()
        except _FAILURES as error:
            if not self._is_behind:
                _log.warning(
                    "%s could not be written (%s); the run continues and tries again. "
                    "If it ends before that, continue from the last checkpoint with "
                    "`resume=True`",
                    self.path / ROWS,
                    reason_of(error),
                )
            self._is_behind = True
            return False
        if self._is_behind:
            _log.warning("%s could be written again", self.path / ROWS)
        self._is_behind = False
        return True

    def draw(self, name: str, draw: Callable[[Path], None]) -> None:
        """Has a picture drawn; without one the run is no worse."""
        try:
            draw(self.path / name)
        except OSError as error:
            _log.warning("%s was not drawn (%s)", self.path / name, reason_of(error))

    def patch(self, save: Callable[[Path], object]) -> None:
        """Has patches written to their folder; without them the run is no worse."""

        def write() -> None:
            try:
                save(self.path / PATCHES)
            except (OSError, InputError) as error:
                folder, reason = self.path / PATCHES, reason_of(error)
                _log.warning("%s lacks a patch (%s)", folder, reason)

        on_first_process(write)

    def add_adapter(self, save: Callable[[Path], int]) -> int:
        """Writes the adapter; elsewhere if it cannot be written where it belongs.

        Args:
          save: path -> bytes of the adapter that it writes there.

        Returns:
          Bytes of the file, on the first process.

        Raises:
          InputError: if it cannot be written there, with where it is and how to go on.
        """
        size = 0

        def write() -> None:
            nonlocal size
            self._restore()
            self._append()
            size = save(self.path / ADAPTER)

        self._at_the_end(write, lambda: _saved_elsewhere(save))
        return size

    def finish(self, metrics: Mapping[str, Json]) -> None:
        """Writes `metrics.json`, the sign of a finished run, and drops checkpoints.

        Raises:
          InputError: if it cannot be written, with how to go on.
        """

        def write() -> None:
            self._restore()
            write_json(self.path / METRICS, metrics)

        self._at_the_end(write, lambda: "The adapter is written")
        if is_first_process():
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def close(self) -> None:
        """Ends the trackers, and lets other runs use the folder."""
        if self._trackers is not None:
            self._trackers.close()
        if self._lock is not None:
            self._lock.release()

    def _restore(self) -> None:
        """Makes the folder again if it was removed."""
        if self._lock is None or self._lock.is_held():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        config = self.path / CONFIG
        if config.exists() and read_json(config) != self._config:
            self._lock.release()
            raise FileExistsError(f"{self.path} has another run by now")
        write_json(config, self._config)

    def _append(self) -> None:
        """Writes the rows; all of them if the file is not as it was left."""
        path = self.path / ROWS
        if path.is_file() and path.stat().st_size == self._written:
            with path.open("ab") as file:
                file.write(self._pending)
            self._written += len(self._pending)
        else:
            text = b"".join(map(row_line, self.rows))
            write_text(path, text)
            self._written = len(text)
        self._pending = b""

    def _at_the_end(
        self, write: Callable[[], None], instead: Callable[[], str]
    ) -> None:
        """Writes, once more if it fails; then says what is done instead."""

        def act() -> None:
            try:
                try:
                    write()
                except _FAILURES:
                    # What was in the way may be gone.
                    time.sleep(_RETRY_AFTER)
                    write()
            except _FAILURES as error:
                with contextlib.suppress(OSError):
                    _remove_parts(self.path)
                raise InputError(
                    f"`output` must be a folder that can be written at the end of the "
                    f"run, got `{self.path}`: {reason_of(error)}. {instead()}. To "
                    "finish the run, fix this and repeat it with `resume=True`."
                ) from error

        on_first_process(act)


def _saved_elsewhere(save: Callable[[Path], int]) -> str:
    """Saves an adapter in a new temporary folder, and returns where it is."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="sparse_jax-"))
        save(folder / ADAPTER)
    except _FAILURES as error:
        return f"It could not be written elsewhere either ({reason_of(error)})"
    return f"The adapter is in `{folder}`"


def _remove_run(path: Path) -> None:
    """Removes the files of an earlier run, the one that says what it was last."""
    for name in (CHECKPOINTS, PATCHES, *TRACKED):
        shutil.rmtree(path / name, ignore_errors=True)
    _remove_parts(path)
    for name in reversed(FILES):
        (path / name).unlink(missing_ok=True)


def _remove_parts(path: Path) -> None:
    """Removes files that were not written to their end."""
    for name in FILES:
        path.joinpath(f".{name}.part").unlink(missing_ok=True)


def _is_before(row: Row, step: int) -> bool:
    """Returns whether a row was written before the checkpoint of a step."""
    return row["step"] < step or (row["step"] == step and not is_evaluation(row))

"""The lock of a run directory: one run at a time writes into it."""

import contextlib
import logging
import os
import platform
import time
from pathlib import Path
from typing import IO

from sparse_jax.errors import InputError, brief, reason_of

__all__ = ["LOCK", "FolderLock", "require_unlocked"]

LOCK = ".lock"
# Another run may be looking at the lock just now.
_TRIES, _PAUSE = 5, 0.05  # seconds

_log = logging.getLogger(__name__)


class FolderLock:
    """A lock on a folder, which the kernel releases however the process ends.

    Args:
      folder: of the run; it has to exist when the lock is acquired.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Takes the lock; where the file system has none, logs a warning.

        Raises:
          InputError: if another run has it.
          OSError: if the file of the lock cannot be made.
        """
        self.release()
        owner = ""
        for _ in range(_TRIES):
            # Opened to write, which network file systems ask for.
            file = self._path.open("a+", encoding="utf-8", errors="replace")
            # The run before may have removed the file that was just opened.
            if _lock(file) and _is_same(file, self._path):
                self._file = file
                _sign(file)
                return
            file.seek(0)
            owner = file.read(100).strip()
            file.close()
            time.sleep(_PAUSE)
        raise InputError(
            f"`output` must be a folder that no other run writes to, got "
            f"{brief(str(self._path.parent))}, which is in use by "
            f"{brief(owner) if owner else 'another run'}. Choose another one, or wait "
            "until that run has ended."
        )

    def is_held(self) -> bool:
        """Returns whether the folder still has the lock that was taken."""
        return self._file is not None and _is_same(self._file, self._path)

    def release(self) -> None:
        """Gives the lock back, and removes its file."""
        if self._file is None:
            return
        # Removed first: once the lock is given back, the file may be another run's.
        if self.is_held():
            with contextlib.suppress(OSError):
                self._path.unlink()
        with contextlib.suppress(OSError):
            self._file.close()
        self._file = None


def require_unlocked(folder: Path) -> None:
    """Raises `InputError` if another run writes to a folder, without taking it."""
    lock = FolderLock(folder)
    # Whatever else is wrong with the folder is found out when it is taken.
    with contextlib.suppress(OSError):
        if (folder / LOCK).exists():
            lock.acquire()
    lock.release()


def _lock(file: IO[str]) -> bool:
    """Locks a file until it is closed; returns whether nobody else had."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        _log.warning(
            "%s cannot be locked (%s): make sure that no other run writes there",
            Path(file.name).parent,
            reason_of(error),
        )
    return True


def _is_same(file: IO[str], path: Path) -> bool:
    """Returns whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _sign(file: IO[str]) -> None:
    """Writes who has the lock, for the message to the one who asks for it."""
    # A full disk is no reason to do without the lock.
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()

"""Output folders: which of them a run may write to, one run at a time."""

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from sparse_jax.adapter.file import ADAPTER
from sparse_jax.errors import InputError, brief, listed, reason_of
from sparse_jax.methods.lookup import learning_rate_of
from sparse_jax.methods.registry import USUAL
from sparse_jax.models.hf.pretrained import changed_field
from sparse_jax.training.run_files import read_json
from sparse_jax.training.settings import OWN, Settings

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "CURVE",
    "FILES",
    "FREE",
    "FolderLock",
    "LAYERS",
    "LOCK",
    "METRICS",
    "NAMED",
    "PATCHES",
    "ROWS",
    "STREAM",
    "require_same_files",
    "require_unlocked",
    "require_usable",
]

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


CONFIG, METRICS = "config.json", "metrics.json"
CURVE, LAYERS = "curve.png", "layers.png"
ROWS, CHECKPOINTS, PATCHES = "metrics.jsonl", "checkpoints", "patches"
STREAM = "stream.jsonl"  # beside the checkpoints
FILES = (CONFIG, METRICS, CURVE, LAYERS, ROWS, ADAPTER)
# What may differ between a run and its continuation.
FREE = (
    "output", "overwrite", "resume", "dry_run", "save_every", "patch_every", "keep",
    "mesh", "no_cache", "report_to", "split_masters", "update_in_backward",
)  # fmt: skip
# What earlier versions did, which had no such setting.
WITHOUT = {"group_by_length": True, "head_bias": "zeros"}
# What the settings only name, and has to be the same: key -> what it is.
NAMED = {
    "base_hash": "model",
    "examples_hash": "data",
    "adapter_hash": "adapter",
    "avoid_hash": "avoid",
    "kl_text_hash": "kl_text",
}


def require_usable(settings: Settings) -> None:
    """Raises unless the output folder is new, empty, or meant to be used again.

    Raises:
      InputError: naming the folder and the remedy.
    """
    path = Path(settings.output)
    # A loss of hours if it were found out after the training.
    there = _existing_part(settings.output)
    if not there.is_dir():
        raise InputError(f"`output` must be a folder, got the file `{there}`.")
    if not os.access(there, os.W_OK):
        raise InputError(
            f"`output` must be a folder that can be written, got `{path}`. Choose "
            "another one."
        )
    for name in ("model", "data"):
        source = getattr(settings, name)
        is_read = isinstance(source, str) and Path(source).is_dir() and path.is_dir()
        # The run would be written among the files that it reads.
        if is_read and path.samefile(source):
            raise InputError(
                f"`output` must not be the folder of `{name}`, got `{path}`. Choose "
                "another one."
            )
    if settings.resume:
        _require_same(path, settings)
    elif path.is_dir() and any(place.name != LOCK for place in path.iterdir()):
        _require_replaceable(path, settings)


def _existing_part(output: str) -> Path:
    """Returns the folder itself, or the nearest above it that exists."""
    path = Path(output)
    try:
        # A null character is not found until the folder is made.
        if output.strip() and "\0" not in output:
            places = (path, *path.absolute().parents)
            return next(place for place in places if place.exists())
        reason = "no folder can have that name"
    # A name that is too long.
    except OSError as error:
        reason = reason_of(error)
    raise InputError(f"`output` must name a folder, got {brief(output)}: {reason}.")


def _require_replaceable(path: Path, settings: Settings) -> None:
    """Raises unless what is in a folder may make way for the files of a run."""
    if not settings.overwrite:
        raise InputError(
            f"`output` must be an empty or a new folder, got `{path}`. Choose another "
            "one, or pass `overwrite=True`, or `resume=True` to continue the run in it."
        )
    ours = [name for name in (*FILES, CHECKPOINTS, PATCHES) if (path / name).exists()]
    try:
        is_other = ours and "settings" not in read_json(path / CONFIG)
    except InputError:
        # A damaged one is what overwriting is for.
        is_other = not (path / CONFIG).exists() and CHECKPOINTS in ours
    if is_other:
        raise InputError(
            f"`output` must be a folder whose {listed(ours)} may be removed, got "
            f"`{path}`, where they are not those of a run. Choose another one."
        )


def _require_same(path: Path, settings: Settings) -> None:
    """Raises unless a folder holds a run of the same settings."""
    if not (path / CONFIG).is_file():
        raise InputError(
            f"`output` must hold the `{CONFIG}` of a run to resume, got `{path}`, "
            "which has none. Leave out `resume` to start one."
        )
    config = read_json(path / CONFIG)
    before = config.get("settings")
    if not isinstance(before, dict) or not {"model", "task"} <= before.keys():
        raise InputError(
            f"`{path / CONFIG}` must have the settings of a run, and has none. Put it "
            "back, or pass `overwrite=True` to start over."
        )
    now = json.loads(json.dumps(settings.record()))
    if unknown := sorted(before.keys() - now.keys()):
        raise InputError(
            f"`{path / CONFIG}` must have settings that this version knows, got "
            f"{listed(unknown)}. Resume with the version that began the run, or pass "
            "`overwrite=True` to start over."
        )
    # A setting that came with a later version was at its default, or at what that
    # version does without it.
    defaults = {field.name: field.default for field in fields(settings)}
    before = defaults | USUAL | WITHOUT | before
    # Earlier versions had one name for an optimizer, which was none.
    before["optimizer"] = before["optimizer"] or defaults["optimizer"]
    # Earlier versions recorded a single rule as a text.
    for name in ("where", "dense"):
        before[name] = [one] if isinstance(one := before[name], str) else one
    # And what the usual learning rate was, which may be another by now.
    usual = learning_rate_of(settings.method, vars(settings))
    if before["learning_rate"] is None and config.get("learning_rate") != usual:
        before["learning_rate"] = config.get("learning_rate")
    # There is no new head.
    if settings.is_causal:
        before["head_bias"] = settings.head_bias
    # And the usual options beside an object, which has its own.
    if isinstance(before["method"], Mapping):
        before |= dict.fromkeys(USUAL)
    changed = [name for name in now if name not in FREE and now[name] != before[name]]
    if changed:
        name = changed[0]
        if name == "optimizer" and OWN in (now[name], before[name]):
            raise InputError(
                "`optimizer` must be passed to `finetune` if the run to resume had "
                "one, as no file can hold it, and only then. Pass the same object "
                "again, or `overwrite=True` to start over."
            )
        was: Any = before[name]
        given = now[name]
        # Objects are recorded as mappings of their fields.
        is_object = isinstance(was, Mapping) and isinstance(given, Mapping)
        if is_object and (field := changed_field(was, given)):
            name, was, given = f"{field}` of `{name}", was[field], given[field]
        wanted = "left out" if was is None else brief(was)
        raise InputError(
            f"`{name}` must be {wanted} as in the run to resume, got "
            f"{brief(given)}. Pass the same options, or `overwrite=True` to start over."
        )


def require_run(config: Path) -> None:
    """Raises unless there is the record of a run to resume."""
    if not config.is_file():
        raise InputError(
            f"`output` must be the folder of a run to resume, got "
            f"{brief(str(config.parent))}, which has no {CONFIG}. Leave out `resume` "
            "to start one."
        )


def require_same_files(path: Path, config: Mapping[str, Any]) -> None:
    """Raises unless the files that the settings name are those of the run."""
    before = read_json(path / CONFIG)
    for key, name in NAMED.items():
        # Earlier versions did not record it.
        if before.get(key, config.get(key)) != config.get(key):
            raise InputError(
                f"`{name}` must be what it was in the run to resume, got other "
                f"content under the same name. Put the files back, or pass "
                "`overwrite=True` to start over."
            )
    was, now = (about.get("base_config") or {} for about in (before, config))
    if isinstance(was, dict) and (field := changed_field(was, now)):
        raise InputError(
            f"`model` must be what it was in the run to resume, with `{field}`="
            f"{brief(was[field])} in its configuration, got {brief(now[field])}. Put "
            "the `config.json` of the model back, or pass `overwrite=True` to start "
            "over."
        )

"""The folder of compiled programs, so that a second start compiles nothing."""

import hashlib
import logging
import os
import platform
import sys
import tempfile
from pathlib import Path

import jax

from sparse_jax.errors import reason_of

__all__ = ["CACHE", "cache_folder", "show_cache_folder", "use_compilation_cache"]

CACHE = "SPARSE_JAX_CACHE"
_DIR = "jax_compilation_cache_dir"
_OFF = ("", "0", "off", "none", "false", "no")
# The programs of a run that take less are compiled again: reading takes as long.
_LEAST = 0.1  # seconds

_log = logging.getLogger(__name__)


def use_compilation_cache(is_on: bool = True) -> None:
    """Keeps compiled programs in a folder of the user, unless JAX has one already.

    The folder is `cache_folder()`. If it cannot be written, a warning says so, and
    everything is compiled again.

    Args:
      is_on: whether to; otherwise what a run before asked for is taken back.
    """
    folder, now = cache_folder() if is_on else None, getattr(jax.config, _DIR)
    if now is not None and now not in _ours:
        return
    if folder is not None and str(folder) != now:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A full disk, or one that is mounted read-only, is found out here.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            _log.warning(
                "compiled programs are not kept, as %s cannot be written: %s. Set %s "
                "to another folder, or pass `no_cache=True`",
                folder,
                reason_of(error),
                CACHE,
            )
            folder = None
    _set(None if folder is None else str(folder))


_ours: set[str] = set()  # folders that were set here
_shown: set[str] = set()  # those of them that a line has named


def show_cache_folder() -> None:
    """Logs where compiled programs are kept, once for each folder that was set here."""
    now = getattr(jax.config, _DIR)
    if now in _ours - _shown:
        _shown.add(now)
        _log.info("compiled programs are kept in %s. Not with `no_cache=True`", now)


def cache_folder() -> Path | None:
    """Returns the folder of compiled programs; None if there is to be none.

    It is what `SPARSE_JAX_CACHE` names (`off` for none), else one where the platform
    has its caches. Processors of other kinds, which may share a home, have others.
    """
    home, named = Path.home, os.environ.get(CACHE)
    if named is not None and named.lower() in _OFF:
        return None
    if named is not None:
        root = Path(named).expanduser()
    elif sys.platform == "darwin":
        root = home() / "Library" / "Caches" / "sparse_jax"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or home()) / "sparse_jax" / "cache"
    else:
        given = os.environ.get("XDG_CACHE_HOME", "")
        # The specification has relative paths ignored.
        root = Path(given) if os.path.isabs(given) else home() / ".cache"
        root = root / "sparse_jax"
    return root / f"{platform.machine()}-{_processor()}"


def _processor() -> str:
    """Returns a short digest of what the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        able = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        able = platform.processor()
    return hashlib.sha256(able.encode()).hexdigest()[:8]


def _set(folder: str | None) -> None:
    """Has JAX use a folder, also if it has compiled without one before."""
    if folder == getattr(jax.config, _DIR):
        return
    from jax.experimental.compilation_cache import compilation_cache

    if folder is not None:
        _ours.add(folder)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST)
    jax.config.update(_DIR, folder)
    compilation_cache.reset_cache()

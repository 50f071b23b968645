"""Lost processes: one of several has died, and the others must not wait for it."""

import atexit
import contextlib
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax

# The store that processes share has no public name; Orbax takes it from here too.
from jax._src import distributed

__all__ = ["leave", "lost_processes", "watch_processes"]

_FOLDER = "sparse_jax/alive/"
_DONE = "done"
_EVERY = 2.0  # seconds between two signs of life
_SHORT = 8.0  # seconds without one, after something has failed
# JAX aborts after 100 seconds without a word on what to do.
_LONG = 60.0


def watch_processes() -> None:
    """Tells the other processes that this one is alive, and ends it if one has died.

    A process that waits for one that died waits in compiled code, which nothing else
    can interrupt.
    """
    client, me = distributed.global_state.client, jax.process_index()
    if client is None or jax.process_count() == 1:
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(client, me, ended), daemon=True)
    watch.start()

    def end() -> None:
        ended.set()
        watch.join()
        # The one that keeps the store may have ended first.
        with contextlib.suppress(RuntimeError):
            _set(client, me, _DONE)

    # Runs before JAX closes the store.
    atexit.register(end)


def lost_processes() -> list[int]:
    """Returns the processes without a sign of life during the next seconds."""
    client, me = distributed.global_state.client, jax.process_index()
    if client is None or jax.process_count() == 1:
        return []
    try:
        before = _beats(client)
        time.sleep(_SHORT)
        after = _beats(client)
    except RuntimeError:
        return [0]  # which keeps the store
    return sorted(p for p in before if p != me and before[p] == after.get(p))


def leave(lost: list[int]) -> NoReturn:
    """Ends this process at once, with a line that names those that are lost."""
    names = " and ".join(map(str, lost))
    subject, verb = ("process", "is") if len(lost) == 1 else ("processes", "are")
    print(
        f"error: {subject} {names} of {jax.process_count()} {verb} lost. Start all "
        "again; with --resume, finetune continues from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    # An ordinary end would wait minutes for them.
    os._exit(1)


def _watch(client: Any, me: int, ended: threading.Event) -> None:
    """Gives signs of life and looks for those of the others, until the end."""
    seen: dict[int, tuple[str, float]] = {}
    number = failures = 0
    while not ended.wait(_EVERY):
        number += 1
        try:
            _set(client, me, str(number))
            beats, failures = _beats(client), 0
        except RuntimeError:
            beats, failures = {}, failures + 1
        now = time.monotonic()
        for process, beat in beats.items():
            if seen.get(process, ("", now))[0] != beat:
                seen[process] = beat, now
        lost = [
            process
            for process, (beat, when) in seen.items()
            if beats and beat != _DONE and now - when > _LONG
        ]
        # The first process keeps the store; a program may also have left the others.
        if failures > 2 and distributed.global_state.client is client:
            lost = [0]
        if lost and not ended.is_set():
            leave(sorted(lost))


def _set(client: Any, me: int, value: str) -> None:
    """Writes a sign of life."""
    client.key_value_set(f"{_FOLDER}{me}", value, allow_overwrite=True)


def _beats(client: Any) -> dict[int, str]:
    """Returns the last sign of life of every process."""
    found = client.key_value_dir_get(_FOLDER)
    return {int(key.rpartition("/")[2]): value for key, value in found}

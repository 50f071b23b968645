"""Processes: one program on several hosts, and what happens when one of them dies."""

import atexit
import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import jax
import numpy as np
from jax._src import distributed  # no public name; Orbax takes the store from it

from sparse_jax.errors import InputError, first_line

if TYPE_CHECKING:
    from jaxlib._jax import DistributedRuntimeClient

__all__ = [
    "is_first_process",
    "join_processes",
    "leave",
    "lost_processes",
    "of_all_processes",
    "on_first_process",
    "require_agreement",
    "watch_processes",
]

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


def _watch(client: "DistributedRuntimeClient", me: int, ended: threading.Event) -> None:
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


def _set(client: "DistributedRuntimeClient", me: int, value: str) -> None:
    """Writes a sign of life."""
    client.key_value_set(f"{_FOLDER}{me}", value, allow_overwrite=True)


def _beats(client: "DistributedRuntimeClient") -> dict[int, str]:
    """Returns the last sign of life of every process."""
    found = client.key_value_dir_get(_FOLDER)
    return {int(key.rpartition("/")[2]): value for key, value in found}


_LONGEST = 4096  # bytes of a message between processes


def join_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Makes this process one of several that run the same program; comes first.

    Without arguments JAX asks the environment: a TPU pod, SLURM, Open MPI or
    Kubernetes say how many there are.

    Args:
      coordinator: host and port of the first process.
      processes: how many there are.
      process: which this one is, from 0.

    Raises:
      InputError: if some of these are given without the others, or do not fit.
    """
    if any(value is not None for value in (coordinator, processes, process)):
        if coordinator is None or processes is None or process is None:
            raise InputError(
                "`coordinator`, `processes` and `process` must be given together, got "
                f"{coordinator}, {processes} and {process}. On a TPU pod or under "
                "SLURM, --distributed alone finds all of them."
            )
        if not 0 <= process < processes:
            raise InputError(
                f"`process` must be in [0, {processes}), got {process}. Every host "
                "passes a number of its own."
            )
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        reason = first_line(error)
        raise InputError(
            f"`coordinator` must be given: {reason}. Pass --coordinator HOST:PORT, "
            "--processes and --process on every host."
        ) from error


def is_first_process() -> bool:
    """Returns whether this process writes what all of them share."""
    return jax.process_index() == 0


def of_all_processes(mine: np.ndarray) -> np.ndarray:
    """Returns an array of every process, shape=(processes, ...), to each of them."""
    if jax.process_count() == 1:
        return mine[None]
    # Loads the communication between processes, which one of them does not need.
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(mine))


def on_first_process(act: Callable[[], None]) -> None:
    """Has the first process do something, and the others wait for it.

    Raises:
      InputError: on every process, if it is raised on the first one.
    """
    if jax.process_count() == 1:
        act()
        return
    message = np.zeros(_LONGEST, np.uint8)
    if is_first_process():
        try:
            act()
        except InputError as error:
            text = str(error).encode(errors="backslashreplace")[:_LONGEST]
            message[: len(text)] = np.frombuffer(text, np.uint8)
    words = bytes(of_all_processes(message)[0])
    if text := words.rstrip(b"\0").decode(errors="ignore"):
        raise InputError(text)


def require_agreement(name: str, value: object) -> None:
    """Raises, on every process, unless all of them have the same value.

    Args:
      name: what the value is, for the message.
      value: anything that JSON can hold.

    Raises:
      InputError: naming the first process that differs.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    digests = of_all_processes(np.frombuffer(digest, np.int32))
    others = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(others):
        raise InputError(
            f"`{name}` must be the same on every process, got another one on process "
            f"{others[0]} than on process 0. Run the same command on every host."
        )

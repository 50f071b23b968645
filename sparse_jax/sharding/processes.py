"""Processes: one program on several hosts."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparse_jax.errors import InputError

__all__ = [
    "is_first_process",
    "join_processes",
    "on_first_process",
    "require_agreement",
]

_LONGEST = 4096  # bytes of a message between processes


def join_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Makes this process one of several that run the same program; comes first.

    Without arguments JAX asks the surroundings: a TPU pod, SLURM, Open MPI or
    Kubernetes say how many there are.

    Args:
      coordinator: host and port of the first process.
      processes: how many there are.
      process: which this one is, from 0.

    Raises:
      InputError: if some of these are given without the others, or do not fit.
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given):
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
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"`coordinator` must be given: {reason}. Pass --coordinator HOST:PORT, "
            "--processes and --process on every host."
        ) from error


def is_first_process() -> bool:
    """Returns whether this process writes what all of them share."""
    return jax.process_index() == 0


def on_first_process(act: Callable[[], None]) -> None:
    """Has the first process do something, and the others wait for it.

    Raises:
      InputError: on every process, if it is raised on the first one.
    """
    if jax.process_count() == 1:
        act()
        return
    # Loads the communication between processes, which one of them does not need.
    from jax.experimental import multihost_utils

    message = np.zeros(_LONGEST, np.uint8)
    if is_first_process():
        try:
            act()
        except InputError as error:
            text = str(error).encode(errors="backslashreplace")[:_LONGEST]
            message[: len(text)] = np.frombuffer(text, np.uint8)
    words = bytes(np.asarray(multihost_utils.process_allgather(message))[0])
    if text := words.rstrip(b"\0").decode(errors="ignore"):
        raise InputError(text)


def require_agreement(name: str, value: Any) -> None:
    """Raises, on every process, unless all of them have the same value.

    Args:
      name: what the value is, for the message.
      value: anything that JSON can hold.

    Raises:
      InputError: naming the first process that differs.
    """
    if jax.process_count() == 1:
        return
    # Loads the communication between processes, which one of them does not need.
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    mine = np.frombuffer(digest, np.int32)
    all_of_them = np.asarray(multihost_utils.process_allgather(mine))
    others = np.flatnonzero((all_of_them != all_of_them[0]).any(axis=1))
    if len(others):
        raise InputError(
            f"`{name}` must be the same on every process, got another one on process "
            f"{others[0]} than on process 0. Run the same command on every host."
        )

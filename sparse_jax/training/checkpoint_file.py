"""Checkpoint files: Orbax writes the arrays, a record beside them what they are."""

import functools
import hashlib
import json
import logging
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from sparse_jax.errors import reason_of

if TYPE_CHECKING:
    from orbax.checkpoint import Checkpointer

__all__ = [
    "UNFINISHED",
    "Position",
    "Record",
    "read_checkpoint",
    "reason_of_orbax",
    "write_checkpoint",
]

# Names that Orbax gives to what it has not yet finished.
UNFINISHED = "*.orbax-checkpoint-tmp*"
# What a record of an earlier version has, which knew no digest.
_FIRST = {"position", "cuts", "arrays", "checksums"}


class Position(NamedTuple):
    """Where a run stands between two batches."""

    batches: int = 0  # used so far
    skipped: int = 0  # of these, because their gradient was not finite
    is_selected: bool = False  # whether the supports are chosen


@dataclass(frozen=True)
class Record:
    """What the arrays of a checkpoint are, and which run they belong to."""

    position: Position
    cuts: dict[str, Any]  # leaf: names and counts of its `Shards`
    names: Sequence[str] = ()  # place of each array in the state; none if not known
    run: str = ""  # SHA-256 of its settings, model and data; empty if not known
    rows: str = ""  # SHA-256 of the rows before it; empty if not known


def write_checkpoint(
    folder: Path, record: Record, arrays: Sequence[np.ndarray]
) -> None:
    """Writes a checkpoint atomically; one in the same folder is replaced.

    The items are those of Orbax's tools: `trained` with the arrays, by their number,
    and `told` with the record.

    Raises:
      OSError: or a `ValueError` of Orbax, if it cannot be written.
    """
    named = {str(i): array for i, array in enumerate(arrays)}
    told = {
        **asdict(record),
        "position": record.position._asdict(),
        "arrays": {n: [list(a.shape), str(a.dtype)] for n, a in named.items()},
        "checksums": {n: zlib.crc32(a.tobytes()) for n, a in named.items()},
    }
    told["digest"] = _digest(told)
    ocp = _orbax()
    # Orbax refuses arrays without elements.
    stored = {name: array for name, array in named.items() if array.size}
    args = ocp.args.Composite(
        trained=ocp.args.StandardSave(stored), told=ocp.args.JsonSave(told)
    )
    with _checkpointer() as writer:
        writer.save(folder.absolute(), args=args, force=True)


def read_checkpoint(folder: Path) -> tuple[Record, list[np.ndarray]]:
    """Reads a checkpoint, also one of an earlier version.

    Raises:
      ValueError: or any other error, if a file of it is damaged.
    """
    args = _orbax().args
    with _checkpointer() as reader:
        only = args.Composite(told=args.JsonRestore())
        told = dict(reader.restore(folder.absolute(), args=only)["told"])
        if told.keys() != _FIRST and told.pop("digest", "") != _digest(told):
            raise ValueError("it does not say what was written")
        # Templates of the host: the arrays may come from a mesh.
        host = {
            name: np.empty(shape, dtype)
            for name, (shape, dtype) in told.pop("arrays").items()
        }
        stored = {name: array for name, array in host.items() if array.size}
        only = args.Composite(trained=args.StandardRestore(stored))
        host |= reader.restore(folder.absolute(), args=only)["trained"]
    # Earlier versions had no checksums of arrays that several processes held.
    for name, checksum in told.pop("checksums").items():
        if zlib.crc32(host[name].tobytes()) != checksum:
            raise ValueError("its arrays are not those that were written")
    record = Record(**{**told, "position": Position(**told["position"])})
    return record, [host[str(i)] for i in range(len(host))]


def reason_of_orbax(error: Exception) -> str:
    """Returns the end of a message, which names what went wrong, without the pages."""
    words = re.sub(r" \[\w+=.*", "", str(error), flags=re.DOTALL)
    return reason_of(ValueError(words.rpartition('": ')[2] or type(error).__name__))


def _checkpointer() -> "Checkpointer":
    """Returns what reads and writes in this process, which waits for no other."""
    ocp = _orbax()
    # Between processes Orbax waits for five minutes for one that has failed.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@functools.cache
def _orbax() -> ModuleType:
    """Returns Orbax, which reports at length what is reported here in one line."""
    # It takes seconds to import, so it is imported where it is used.
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def without_late_writes(said: "sys.UnraisableHookArgs") -> None:
        # After a failed write TensorStore's threads find the event loop closed.
        if str(said.exc_value) != "Event loop is closed":
            hook(said)

    sys.unraisablehook = without_late_writes
    return ocp


def _digest(told: Mapping[str, object]) -> str:
    """Returns the SHA-256 of a record."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

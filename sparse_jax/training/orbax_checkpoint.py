"""Checkpoints of earlier versions, which Orbax wrote: they are still read."""

import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sparse_jax.training.checkpoint_file import Position, Record

__all__ = ["is_orbax", "read_orbax"]


def is_orbax(folder: Path) -> bool:
    """Returns whether a folder is a checkpoint that Orbax wrote."""
    return (folder / "told").is_dir()


def read_orbax(folder: Path) -> tuple[Record, list[np.ndarray]]:
    """Reads a checkpoint that Orbax wrote.

    Raises:
      ValueError: or any other error, if a file of it is damaged.
    """
    # Orbax takes seconds to import, so it is imported where it is used.
    import orbax.checkpoint as ocp

    # Both report at length what is reported here in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    args = ocp.args
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        only = args.Composite(told=args.JsonRestore())
        told = reader.restore(folder.absolute(), args=only)["told"]
        # Templates of the host: the arrays may come from a mesh.
        host = {
            name: np.empty(shape, dtype)
            for name, (shape, dtype) in told["arrays"].items()
        }
        standard = args.Composite(trained=args.StandardRestore(host))
        found = reader.restore(folder.absolute(), args=standard)["trained"]
    arrays = [np.asarray(found[str(i)]) for i in range(len(host))]
    for name, checksum in told["checksums"].items():
        if zlib.crc32(arrays[int(name)].tobytes()) != checksum:
            raise ValueError("its arrays are not those that were written")
    return _record(told), arrays


def _record(told: dict[str, Any]) -> Record:
    """Returns what such a checkpoint says of itself."""
    shapes, dtypes = zip(*told["arrays"].values(), strict=True)
    position = Position(**told["position"])
    return Record(position, [], list(shapes), list(dtypes), told["cuts"])

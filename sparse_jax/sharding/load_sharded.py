"""Loading of a model onto the devices of a run."""

import logging
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sparse_jax.models.functional import Model
from sparse_jax.models.hf.pretrained import from_pretrained
from sparse_jax.sharding.devices import Devices, MeshDevices, OneDevice
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.processes import is_first_process

__all__ = ["load_onto"]

_log = logging.getLogger(__name__)


def load_onto(
    mesh: Mesh | None, folder: Path, **options: Any
) -> tuple[Model, Any, Devices]:
    """Returns a model, its parameters, and the devices that they lie on.

    Args:
      mesh: every device then reads its own parts; None is one device.
      folder: of the model.
      **options: of `from_pretrained`.

    Raises:
      InputError: as `from_pretrained`, or if an axis of the mesh divides no leaf.
    """
    if mesh is None:
        return *from_pretrained(folder, **options), OneDevice()
    place = lambda shapes: Placement.of(shapes, mesh).params
    model, params = from_pretrained(folder, place=place, **options)
    placement = Placement.of(params, mesh)
    if placement.remark is not None and is_first_process():
        _log.warning("%s", placement.remark)
    return model, params, MeshDevices(placement)

"""The tuner of a run: what makes its updates."""

from typing import Any, cast

import optax

from sparse_jax.adapters.method import Method
from sparse_jax.compact import Compact, Loss
from sparse_jax.layerwise import Layerwise
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.sharding.devices import Devices
from sparse_jax.sites import Recompute
from sparse_jax.training.optimizer import MAX_NORM, make_optimizer
from sparse_jax.training.settings import Settings

__all__ = ["make_tuner"]


def make_tuner(
    settings: Settings,
    loss: Loss,
    method: Method,
    sampler: Sampler | None,
    devices: Devices,
) -> Compact:
    """Returns what makes the updates of a run; its steps take the `schedule`.

    Args:
      settings: of the run.
      loss: what it minimises.
      method: what it trains.
      sampler: of the layers; None trains all of them at every update.
      devices: where it takes place.
    """
    tx = make_optimizer()
    placed: dict[str, Any] = {
        "cuts": devices.cuts(method.stack),
        "data_axes": devices.data_axes,
    }
    if sampler is None:
        tx = optax.chain(optax.clip_by_global_norm(MAX_NORM), tx)
        return Compact(loss, method, tx, settings.accumulate, **placed)
    return Layerwise(
        loss,
        method,
        tx,
        settings.accumulate,
        sampler=sampler,
        seed=settings.seed,
        max_norm=MAX_NORM,
        restart=settings.restart_layers,
        recompute=cast(Recompute, settings.recompute),
        **placed,
    )

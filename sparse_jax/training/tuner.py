"""The tuner of a run: what makes its updates."""

from typing import Any, cast

import optax

from sparse_jax.compact import Compact
from sparse_jax.layerwise import Layerwise
from sparse_jax.sites import Recompute
from sparse_jax.training.job import Job
from sparse_jax.training.optimizer import MAX_NORM, make_optimizer

__all__ = ["make_tuner"]


def make_tuner(job: Job, total: int) -> Compact:
    """Returns what makes the updates of a run of so many batches."""
    settings = job.settings
    loss = job.objective.make_loss(job.base.model, checkpointing=settings.checkpointing)
    tx = make_optimizer(settings.resolved_learning_rate, total)
    devices = job.base.devices
    placed: dict[str, Any] = {
        "cuts": devices.cuts(job.method.stack),
        "data_axes": devices.data_axes,
    }
    if job.sampler is None:
        tx = optax.chain(optax.clip_by_global_norm(MAX_NORM), tx)
        return Compact(loss, job.method, tx, settings.accumulate, **placed)
    return Layerwise(
        loss,
        job.method,
        tx,
        settings.accumulate,
        sampler=job.sampler,
        seed=settings.seed,
        max_norm=MAX_NORM,
        restart=settings.restart_layers,
        recompute=cast(Recompute, settings.recompute),
        **placed,
    )

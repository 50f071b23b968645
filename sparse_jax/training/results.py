"""The results of a run: its provenance and its adapter."""

import platform
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.errors import InputError
from sparse_jax.models.hf.pretrained import base_config
from sparse_jax.params.names import patterns
from sparse_jax.training.setup import Job

__all__ = ["adapter_of", "provenance", "require_finite"]


_PACKAGES = ("sparse_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def provenance(job: Job) -> dict[str, Any]:
    """Returns what `config.json` says beside the settings."""
    device = jax.local_devices()[0]
    return {
        "learning_rate": job.settings.resolved_learning_rate,
        "base_hash": job.base.hash,
        "base_config": base_config(job.base.model, training=True),
        "labels": list(job.objective.labels),
        "examples": job.feed.sizes,
        "examples_hash": job.feed.digest,
        "max_length": job.feed.max_length,
        "new_parameters": list(job.base.new),
        "dense": list(patterns(job.method.dense)),
        "versions": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform} {device.device_kind} x{jax.device_count()}",
    }


def adapter_of(job: Job, tuner: Tuner, state: CompactState) -> Adapter:
    """Returns the trained values of a run, with all that an evaluation needs."""
    kept = ("learning_rate", "batch_size", "dtype", "seed")
    settings = {name: getattr(job.settings, name) for name in kept}
    return tuner.adapter(
        state,
        new=job.base.new,
        word=job.settings.method_word,
        settings={**settings, **job.objective.settings},
        base_model=job.settings.model,
        base_hash=job.base.hash,
        base_config=base_config(job.base.model),
        task=job.objective.name,
        labels=job.objective.labels,
    )


def require_finite(adapter: Adapter) -> None:
    """Raises if training left a value that is not finite.

    Raises:
      InputError: naming the leaf.
    """
    added = {
        f"{site}/{part}": array
        for site, parts in adapter.added.items()
        for part, array in parts.items()
    }
    for name, array in {**adapter.values, **adapter.dense, **added}.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"`{name}` must be finite after training, and is not. Lower "
                "--learning-rate, or pass --dtype float32. No adapter is written."
            )

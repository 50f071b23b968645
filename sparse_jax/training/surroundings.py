"""What a result depends on beside the settings."""

import platform
from importlib.metadata import version
from typing import Any

import jax

from sparse_jax.models.pretrained import base_config
from sparse_jax.training.job import Job

__all__ = ["surroundings"]

_PACKAGES = ("sparse_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def surroundings(job: Job) -> dict[str, Any]:
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
        "dense": list(_rules(job.method.dense)),
        "versions": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform} {device.device_kind} x{jax.device_count()}",
    }


def _rules(rules: Any) -> tuple[str, ...]:
    """Returns rules as a tuple."""
    return (rules,) if isinstance(rules, str) else tuple(rules or ())

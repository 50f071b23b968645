"""A job: everything a run needs, and what it leaves behind."""

import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.compact.compact import Compact, CompactState
from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method
from sparse_jax.models.hf.pretrained import base_config
from sparse_jax.models.hf.tensor_names import modules_called
from sparse_jax.params.names import leaf_names
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.training.base_model import Base
from sparse_jax.training.build import head_rules, method_of, sampler_of
from sparse_jax.training.feed import Feed
from sparse_jax.training.objective import Objective
from sparse_jax.training.settings import Settings
from sparse_jax.training.setup import load_material

__all__ = ["Job", "adapter_of", "make_job", "require_finite", "surroundings"]


@dataclass(frozen=True, eq=False)
class Job:
    """A run that can start."""

    settings: Settings
    objective: Objective
    base: Base
    method: Method
    sampler: Sampler | None  # of the layers; None trains all
    head: tuple[str, ...]  # rules of the leaves that counts leave out
    feed: Feed


def make_job(settings: Settings) -> Job:
    """Loads the data and the model of a run.

    Raises:
      InputError: for anything wrong with the task, its files, the model's folder, the
        rules, or the length.
    """
    objective, base, feed = load_material(settings)
    head = head_rules(objective.head, base.new)
    method = method_of(settings, head)
    # Rules are compared with the names of the leaves and of the sites.
    try:
        method.roles(base.params)
        jax.eval_shape(method.added, base.params, jax.random.key(0))
    except InputError as error:
        raise InputError(f"{error}{_translation(settings, base)}") from error
    sampler = sampler_of(settings, base.model.config.num_layers)
    return Job(settings, objective, base, method, sampler, head, feed)


def _translation(settings: Settings, base: Base) -> str:
    """Returns our names of the modules that rules call as Hugging Face does."""
    ours = jax.tree.leaves(leaf_names(base.params))
    sentences = []
    for pattern in (*(settings.where or ()), *(settings.dense or ())):
        called = modules_called(base.model.family, pattern)
        modules = [module for module in called if any(module in name for name in ours)]
        if modules and not any(re.search(pattern, name) for name in ours):
            names = " and ".join(f"`{module}`" for module in modules)
            sentences.append(f" What Hugging Face calls {pattern!r} is {names} here.")
    return "".join(sentences)


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


def adapter_of(job: Job, tuner: Compact, state: CompactState) -> Adapter:
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

"""What a run trained, as an adapter."""

from typing import Any

import jax
import numpy as np

from sparse_jax.adapter_file import Adapter
from sparse_jax.compact import CompactState
from sparse_jax.entries import canonical, fetch, read_entries
from sparse_jax.errors import InputError
from sparse_jax.models.pretrained import base_config
from sparse_jax.roles import DENSE, SPARSE, Role, map_roles
from sparse_jax.training.job import Job
from sparse_jax.training.settings import OPTIONS

__all__ = ["adapter_of", "require_finite"]


def adapter_of(job: Job, state: CompactState) -> Adapter:
    """Returns the trained values of a run.

    Leaves that the base's checkpoint lacks are in it as a whole, however much of them
    was trained: the base alone does not define them.
    """
    support, values, dense = {}, {}, {}

    def collect(role: Role, leaf: jax.Array, positions: Any) -> None:
        if role.kind == DENSE or role.name in job.base.new:
            dense[role.name] = fetch(leaf)
        elif role.kind == SPARSE:
            (support[role.name],) = canonical(positions, leaf.shape)
            values[role.name] = read_entries(leaf, support[role.name])

    map_roles(collect, job.method.roles(state.params), state.params, state.support)
    return Adapter(
        support=support,
        values=values,
        dense=dense,
        added=jax.tree.map(fetch, state.added),
        method=job.settings.method,
        settings=_settings(job),
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


def _settings(job: Job) -> dict[str, Any]:
    """Returns the settings that say what the arrays mean."""
    names = OPTIONS[job.settings.method]
    kept = ("learning_rate", "batch_size", "dtype", "seed", "dense", *names)
    given = {name: getattr(job.settings, name) for name in kept}
    return {**given, **job.objective.settings}

"""The results of a run: its provenance, counts, adapter, and metrics."""

import logging
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.file import adapter_digest
from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.data.sources import file_hash
from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method
from sparse_jax.methods.sites import Added
from sparse_jax.models.hf.pretrained import base_config
from sparse_jax.params.fields import Json
from sparse_jax.params.names import first_match
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.supports.roles import Role, map_roles
from sparse_jax.training.build import Job
from sparse_jax.training.figures import draw_curve, draw_layers
from sparse_jax.training.objective import Evaluated, flattened
from sparse_jax.training.output_folder import CURVE, LAYERS
from sparse_jax.training.run_directory import RunDirectory
from sparse_jax.training.run_files import (
    MetricRows,
    evaluations_of,
    outcome_warnings,
    selection_seconds,
    updates_of,
)
from sparse_jax.training.start import with_start

__all__ = [
    "Counts",
    "adapter_of",
    "count_trained",
    "draw_pictures",
    "kl_of",
    "metrics_of",
    "optimizer_bytes",
    "provenance",
    "require_finite",
]

_log = logging.getLogger(__name__)

_PACKAGES = ("sparse_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def provenance(job: Job) -> dict[str, Json]:
    """Returns what `config.json` says beside the settings."""
    device, text = jax.local_devices()[0], job.settings.kl_text
    return {
        "base_hash": job.base.hash,
        "base_config": base_config(job.base.model, training=True),
        "labels": list(job.objective.labels),
        "examples": job.feed.sizes,
        "examples_hash": job.feed.digest,
        "adapter_hash": None if job.start is None else adapter_digest(job.start),
        "avoid_hash": [adapter_digest(one) for one in job.earlier],
        "kl_text_hash": text and file_hash(Path(text)),
        "new_parameters": list(job.base.new),
        "versions": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform} {device.device_kind} x{jax.device_count()}",
    }


def adapter_of(
    job: Job,
    tuner: Tuner,
    state: CompactState,
    earlier: Mapping[str, np.ndarray] | None = None,
) -> Adapter:
    """Returns the trained values of a run, with all that an evaluation needs.

    Args:
      job: the run.
      tuner: made the state.
      state: whose values they are.
      earlier: positions of entries of earlier selections, by the name of the leaf.
    """
    kept = ("batch_size", "dtype", "seed")
    settings = {name: getattr(job.settings, name) for name in kept}
    settings["learning_rate"] = job.settings.resolved_learning_rate
    trained = tuner.adapter(
        state,
        new=job.base.new,
        word=job.settings.method_word,
        settings={**settings, **job.objective.settings},
        base_model=job.settings.model,
        base_hash=job.base.hash,
        base_leaves=job.base.leaves,
        base_config=base_config(job.base.model),
        task=job.objective.name,
        labels=job.objective.labels,
    )
    if earlier:
        chosen = Adapter({**earlier}, {**earlier})
        trained = with_start(chosen, trained, state.params, job.earlier)
    if job.start is None:
        return trained
    return with_start(job.start, trained, state.params, job.earlier)


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
                "`learning_rate`, or pass `dtype=float32`. No adapter is written."
            )


class Counts(NamedTuple):
    """Numbers of parameters."""

    trained: int
    trained_without_head: int  # as tables in papers give it
    total: int  # of the model with its head


def count_trained(
    method: Method,
    params: optax.Params,
    added: Added,
    head: Sequence[str],
    sampler: Sampler | None = None,
) -> Counts:
    """Counts what a method trains.

    Args:
      method: the method.
      params: parameters, or their shapes.
      added: arrays that the method adds, or their shapes.
      head: rules of the leaves that belong to the head.
      sampler: of the layers; those that it never draws do not count.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparse_jax.methods.sparse import Sparse
      >>> params = {"w": jnp.zeros((10, 10)), "classifier": jnp.zeros(7)}
      >>> method = Sparse(density=0.05, dense="classifier", stack=None)
      >>> count_trained(method, params, {}, head=["^classifier"])
      Counts(trained=12, trained_without_head=5, total=107)
    """
    reached = lambda size: size if sampler is None else sampler.reached(size)
    extra = sum(leaf.size for leaf in jax.tree.leaves(added))
    sizes = {True: 0, False: reached(extra)}

    def add(role: Role, leaf: jax.Array) -> None:
        is_head = first_match({"head": head}, role.name, "") == "head"
        size = method.trained_size(role, leaf.shape)
        is_layer = role.name.startswith(f"{method.stack}/")
        sizes[is_head] += reached(size) if is_layer else size

    map_roles(add, method.roles(params), params)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Counts(sizes[True] + sizes[False], sizes[False], total)


def optimizer_bytes(state: CompactState) -> int:
    """Returns the bytes kept for training beside the model and what it adds.

    These are the optimizer's state, masters, and supports.
    """
    kept = (state.opt_state, state.masters, state.support)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def draw_pictures(job: Job, directory: RunDirectory) -> None:
    """Draws the curve of a run, and which layers were trained."""
    objective, settings = job.objective, job.settings
    title = f"{settings.method_word} on {objective.name}, seed {settings.seed}"
    about = {"title": title, "loss": objective.loss_name, "metric": objective.primary}
    rows = directory.rows
    directory.draw(CURVE, lambda path: draw_curve(path, rows, **about))
    if job.sampler is not None:
        title = (
            f"{settings.method_word}, layers by {settings.sampler_word}, "
            f"{objective.name}"
        )
        about = {"title": title, "num_layers": job.sampler.num_layers}
        directory.draw(LAYERS, lambda path: draw_layers(path, rows, **about))


def metrics_of(job: Job, rows: MetricRows, step: int) -> dict[str, Json]:
    """Returns what `metrics.json` says that follows from the rows of a run.

    Args:
      job: the run.
      rows: all of them.
      step: updates of the model that the run ends with.
    """
    results, reports = _results_at(rows, step)
    vocab_size = job.base.model.config.vocab_size
    for line in outcome_warnings(rows, results, vocab_size):
        _log.warning(line)
    return {
        "eval": flattened(results),
        "splits": results,
        "reports": reports,
        **_speed(rows),
        "selection_seconds": selection_seconds(rows),
    }


def kl_of(job: Job, rows: MetricRows) -> dict[str, Json]:
    """Returns the KL budget of a run, and how much of what it learned is in that."""
    strength = rows[-1].get("strength", 1.0)
    return {"kl_budget": job.settings.kl_budget, "strength": strength}


def _results_at(rows: MetricRows, step: int) -> Evaluated:
    """Returns the last evaluation after some updates, by split, a text last."""
    place = ("step", "epoch", "split", "strength", "is_best", "report")
    found, reports = {}, {}
    for row in evaluations_of(rows):
        if row["step"] == step:
            # A text may be compared before and after the others are evaluated.
            found.pop(row["split"], None)
            found[row["split"]] = {k: v for k, v in row.items() if k not in place}
            if "report" in row:
                reports[row["split"]] = row["report"]
    return Evaluated(found, reports)


def _speed(rows: MetricRows) -> dict[str, float]:
    """Returns the pace of the updates, without those that compile if others exist."""
    updates = updates_of(rows)
    timed = [row for row in updates if not row["is_compiling"]] or updates
    if not timed:
        return {"seconds_per_step": 0.0, "tokens_per_second": 0.0}
    seconds = sum(row["seconds"] for row in timed)
    return {
        "seconds_per_step": statistics.median(row["seconds"] for row in timed),
        "tokens_per_second": sum(row["tokens"] for row in timed) / seconds,
    }

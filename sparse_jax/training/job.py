"""A job: everything a run needs, loaded and checked before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.adapters.method import Method
from sparse_jax.models.hub import local_folder
from sparse_jax.models.pretrained import base_hash, from_pretrained, new_leaves
from sparse_jax.models.pure import PureModel
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.tasks.files import load
from sparse_jax.tasks.glue import Task, find_task
from sparse_jax.tasks.tokens import load_tokenizer
from sparse_jax.training.feed import Feed, make_feed
from sparse_jax.training.methods import head_rules, method_of
from sparse_jax.training.sampling import sampler_of
from sparse_jax.training.settings import Settings

__all__ = ["Base", "Job", "load_base", "make_job"]


@dataclass(frozen=True, eq=False)
class Base:
    """A pre-trained model with a head for a task."""

    folder: Path
    hash: str  # SHA-256 of the weights
    model: PureModel
    params: Any
    new: tuple[str, ...]  # leaves that the checkpoint does not have


@dataclass(frozen=True, eq=False)
class Job:
    """A run that can start."""

    settings: Settings
    task: Task  # with the labels found in the data
    base: Base
    method: Method
    sampler: Sampler | None  # of the layers; None trains all
    head: tuple[str, ...]  # rules of the leaves that counts leave out
    feed: Feed


def load_base(model: str, task: Task, dtype: str, seed: int) -> Base:
    """Loads a model for a task; parts that it lacks are drawn from the seed."""
    folder = local_folder(model)
    key = jax.random.key(seed)
    options = {"num_labels": task.num_outputs, "dtype": jnp.dtype(dtype), "key": key}
    pure, params = from_pretrained(folder, **options)
    return Base(folder, base_hash(folder), pure, params, new_leaves(pure, folder))


def make_job(settings: Settings) -> Job:
    """Loads the data and the model of a run.

    Raises:
      InputError: for anything wrong with the task, its files, the model's folder, the
        rules, or the length.
    """
    task = find_task(settings.task)
    # The folder first: data from the Hub takes minutes to arrive, or to fail.
    local_folder(settings.model)
    splits = load(task, settings.data)
    base = load_base(settings.model, splits.task, settings.dtype, settings.seed)
    feed = make_feed(
        splits,
        load_tokenizer(base.folder),
        base.model,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        seed=settings.seed,
    )
    method = method_of(settings, base.new)
    # Rules are compared with the names of the leaves and of the sites.
    method.roles(base.params)
    jax.eval_shape(method.added, base.params, jax.random.key(0))
    sampler = sampler_of(settings, base.model.config.num_layers)
    head = head_rules(base.new)
    return Job(settings, splits.task, base, method, sampler, head, feed)

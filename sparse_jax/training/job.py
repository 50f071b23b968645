"""A job: everything a run needs, loaded and checked before anything is written."""

import re
from dataclasses import dataclass

import jax

from sparse_jax.adapters.method import Method
from sparse_jax.errors import InputError
from sparse_jax.models.hf_names import modules_called
from sparse_jax.names import leaf_names
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.training.base import Base
from sparse_jax.training.feed import Feed
from sparse_jax.training.material import load_material
from sparse_jax.training.methods import head_rules, method_of
from sparse_jax.training.objective import Objective
from sparse_jax.training.sampling import sampler_of
from sparse_jax.training.settings import Settings

__all__ = ["Job", "make_job"]


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

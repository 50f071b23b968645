"""From settings to what they name: a method, a sampler, a tuner."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, cast

import optax

from sparse_jax.compact.compact import Compact, Loss, Tuner
from sparse_jax.compact.layerwise import Layerwise
from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method
from sparse_jax.methods.registry import METHODS
from sparse_jax.models.attachment import Recompute
from sparse_jax.samplers.registry import SamplerOptions, make_sampler, num_active
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.sharding.placement import Placement
from sparse_jax.training.optimizer import MAX_NORM, make_optimizer
from sparse_jax.training.settings import Settings

__all__ = ["head_rules", "make_tuner", "method_of", "sampler_of"]


def head_rules(head: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """Returns the rules of a head: that of the task, and whatever a checkpoint lacks.

    BERT's pooler is part of it only if the checkpoint comes without one, because it
    then starts at random.

    Args:
      head: subtrees of the task.
      new: names of the leaves that the checkpoint does not have.

    Example:
      >>> head_rules(["classifier"], ["classifier/bias", "pooler/bias"])
      ('^classifier/', '^pooler/')
    """
    roots = {*head, *(name.partition("/")[0] for name in new)}
    return tuple(f"^{root}/" for root in sorted(roots))


def method_of(settings: Settings, head: tuple[str, ...]) -> Method:
    """Returns the method that settings ask for.

    Args:
      settings: a run's settings; `dense` replaces the rules of the head.
      head: rules of the leaves that are trained in full, as from `head_rules`.

    Example:
      >>> settings = Settings(model="m", task="cola", output="o", method="bitfit")
      >>> method_of(settings, ("^classifier/",)).dense
      ('bias$', '^classifier/')
    """
    method = settings.method
    if isinstance(method, str):
        return METHODS[method].make(vars(settings), head)
    if method.dense is None:
        method = replace(method, dense=settings.dense or head)
    return method


def sampler_of(settings: Settings, num_layers: int) -> Sampler | None:
    """Returns the sampler that settings ask for, or None to train all layers.

    Raises:
      InputError: if its numbers do not fit a model of so many layers.

    Example:
      >>> settings = Settings(model="m", task="mrpc", output="o", sampler="ist")
      >>> sampler_of(settings, 12).num_active
      3
    """
    if settings.sampler is None:
        return None
    if isinstance(settings.sampler, Sampler):
        if settings.sampler.num_layers != num_layers:
            raise InputError(
                f"`num_layers` of the sampler must be {num_layers}, the layers of the "
                f"model, got {settings.sampler.num_layers}."
            )
        return settings.sampler
    names = [field.name for field in fields(SamplerOptions)]
    options = {name: getattr(settings, name) for name in names}
    number = num_active(options.pop("active"), num_layers)
    word = settings.sampler
    return make_sampler(word, num_layers=num_layers, num_active=number, **options)


def make_tuner(
    settings: Settings,
    loss: Loss,
    method: Method,
    sampler: Sampler | None,
    placement: Placement,
) -> Tuner:
    """Returns what makes the updates of a run.

    Its steps take the `schedule`, unless the settings bring an optimizer.

    Args:
      settings: of the run.
      loss: what it minimizes.
      method: what it trains.
      sampler: of the layers; None trains all of them at every update.
      placement: of the parameters.
    """
    tx, max_norm = make_optimizer(), MAX_NORM
    if settings.optimizer is not None:
        tx, max_norm = settings.optimizer, None
    placed: dict[str, Any] = {
        "shards": placement.shards(method.stack),
        "data_axes": placement.data_axes,
    }
    if sampler is None:
        if max_norm is not None:
            tx = optax.chain(optax.clip_by_global_norm(max_norm), tx)
        return Compact(loss, method, tx, settings.accumulate, **placed)
    return Layerwise(
        loss,
        method,
        tx,
        settings.accumulate,
        sampler=sampler,
        seed=settings.seed,
        max_norm=max_norm,
        restart=settings.restart_layers,
        recompute=cast(Recompute, settings.recompute),
        **placed,
    )

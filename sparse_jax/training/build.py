"""From settings to what they name: a method, a sampler, a tuner."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import optax

from sparse_jax.compact.compact import Compact, Loss
from sparse_jax.compact.layerwise import Layerwise
from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method
from sparse_jax.methods.registry import METHODS
from sparse_jax.models.attachment import Recompute
from sparse_jax.samplers.gradient_norm import GradientNorm
from sparse_jax.samplers.importance import Importance
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.samplers.simple import Cyclic, Fixed, Static, Uniform
from sparse_jax.sharding.devices import Devices
from sparse_jax.training.optimizer import MAX_NORM, make_optimizer
from sparse_jax.training.settings import Settings

__all__ = ["head_rules", "make_tuner", "method_of", "num_active", "sampler_of"]


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
    return METHODS[settings.method].make(vars(settings), head)


# (settings, layers of the model, layers to update at a time) -> sampler
_Make = Callable[[Settings, dict[str, Any]], Sampler]


def num_active(active: float, num_layers: int) -> int:
    """Returns the layers that are updated at a time.

    Rounded down as in the released code, but at least one.

    Example:
      >>> [num_active(0.25, layers) for layers in (32, 6, 2)]
      [8, 1, 1]
    """
    # 0.29 * 100 is a little less than 29.
    return max(1, int(active * num_layers + 1e-9))


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
    sizes = {
        "num_layers": num_layers,
        "num_active": num_active(settings.active, num_layers),
        "hold": settings.hold,
    }
    return _SAMPLERS[settings.sampler](settings, sizes)


def _static(settings: Settings, sizes: dict[str, int]) -> Sampler:
    """Returns the sampler of the layers that were listed."""
    layers, num_layers = settings.layers or (), sizes["num_layers"]
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise InputError(
            f"`layers` must be in [0, {num_layers}), the layers of the model, got "
            f"{outside[0]}."
        )
    return Static.of(*layers, num_layers=num_layers)


def _fixed(settings: Settings, sizes: dict[str, Any]) -> Sampler:
    """Returns the sampler with the weights that were listed."""
    weights, num_layers = settings.layer_weights or (), sizes["num_layers"]
    if len(weights) != num_layers:
        raise InputError(
            f"`layer_weights` must be given once for each of the {num_layers} layers "
            f"of the model, got {len(weights)}."
        )
    positive = sum(weight > 0 for weight in weights)
    if not all(0 <= weight < math.inf for weight in weights):
        raise InputError(f"`layer_weights` must not be negative, got {weights}.")
    if positive < sizes["num_active"]:
        raise InputError(
            f"`layer_weights` must have {sizes['num_active']} positive numbers, the "
            f"layers of an update, got {positive}. A layer of weight 0 is never drawn."
        )
    return Fixed(**sizes, proportions=weights)


def _importance(settings: Settings, sizes: dict[str, int]) -> Sampler:
    """Returns the sampler of IST."""
    return Importance.fitted(
        **sizes,
        probe_every=settings.probe_every,
        importance_rate=settings.importance_rate,
    )


_SAMPLERS: dict[str, _Make] = {
    "ist": _importance,
    "uniform": lambda settings, sizes: Uniform(**sizes),
    "cyclic": lambda settings, sizes: Cyclic(**sizes),
    "fixed": _fixed,
    "static": _static,
    "norm": lambda settings, sizes: GradientNorm(**sizes),
}


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

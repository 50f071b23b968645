"""The samplers of the command line: which layers a run trains at a time."""

import math
from collections.abc import Callable
from typing import Any

from sparse_jax.errors import InputError
from sparse_jax.samplers.cyclic import Cyclic
from sparse_jax.samplers.fixed import Fixed
from sparse_jax.samplers.gradient_norm import GradientNorm
from sparse_jax.samplers.importance import Importance
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.samplers.static import Static
from sparse_jax.samplers.uniform import Uniform
from sparse_jax.training.settings import Settings

__all__ = ["num_active", "sampler_of"]

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

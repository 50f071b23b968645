"""Sites: where a model lets a method look at a layer and change what it computes."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

__all__ = ["MEMORY", "Attachment", "Memory", "Module", "Recompute", "Respond", "Slots"]

# Where an attention asks for a `Memory`.
MEMORY = "attention/memory"

Module = Callable[[jax.Array], jax.Array]
# (site, module, x) -> y, what a layer calls instead of `module(x)`
Respond = Callable[[str, Module, jax.Array], jax.Array]
# Layers that compute again in the backward pass what they need there.
Recompute = Literal["none", "frozen", "all"]


def _keep_weights(layer_params: Any, trained: Any) -> Any:
    """Leaves the weights of a layer as they are."""
    del trained
    return layer_params


def _call(
    site: str, module: Module, x: jax.Array, trained: Any, key: jax.Array | None
) -> jax.Array:
    """Leaves a site as it is."""
    del site, trained, key
    return module(x)


class Memory(NamedTuple):
    """What an attention sees beside its tokens: P keys and values."""

    keys: jax.Array  # shape=(P, H * K)
    values: jax.Array  # shape=(P, H * K)
    bias: jax.Array  # of their scores, shape=(), float32


class Slots(NamedTuple):
    """The layers that are trained, where most are not.

    Only `rows` has a gradient then, and none of it is ever of size L.
    """

    rows: Any  # pytree of arrays, shape=(num_active, ...)
    active: jax.Array  # numbers of the layers, shape=(num_active,), int32, sorted
    rows_of: Callable[[Any, Any], Any]  # (layer_params, trained[l]) -> row of layer l
    recompute: Recompute


class Attachment(NamedTuple):
    """What a method attaches to a stack of layers.

    A model that runs a stack of `L` layers hands layer `l` the slice `trained[l]`,
    replaces the parameters of the layer by `weights(layer_params, trained[l])` and
    asks for the output of every site with `response(site, module, x, trained[l], key)`,
    where `key` is for dropout inside the method, or None without dropout. A
    site is a module inside the layer that owns weights (a linear map or a norm), named
    after them: the kernel of site "mlp/up" is the leaf "layers/mlp/up/kernel". The one
    other site is "attention/memory", which is asked for a `Memory` and whose `module`
    returns None. The default attaches nothing and returns `module(x)`.

    With `slots` the slice `trained[l]`, a mapping, also has the trained values of the
    layer under "row", and only those of active layers have a gradient.

    Example:
      >>> attachment = Attachment()
      >>> attachment.response("attention/query", lambda x: 2 * x, 1.0, None, None)
      2.0
    """

    trained: Any = None  # pytree of arrays, shape=(L, ...)
    weights: Callable[[Any, Any], Any] = _keep_weights
    response: Callable[[str, Module, jax.Array, Any, Any], jax.Array] = _call
    slots: Slots | None = None

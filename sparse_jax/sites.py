"""Sites: where a model lets a method look at a layer and add to it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

__all__ = ["Attachment"]


def _keep_weights(layer_params: Any, trained: Any) -> Any:
    """Leaves the weights of a layer as they are."""
    del trained
    return layer_params


def _keep_output(site: str, x: jax.Array, y: jax.Array, trained: Any) -> jax.Array:
    """Leaves the output of a site as it is."""
    del site, x, trained
    return y


class Attachment(NamedTuple):
    """What a method attaches to a stack of layers.

    A model that runs a stack of `L` layers hands layer `l` the slice `trained[l]`,
    replaces the parameters of the layer by `weights(layer_params, trained[l])` and the
    output of every site (a linear map `y = x @ kernel + bias` inside the layer) by
    `response(site, x, y, trained[l])`. The default attaches nothing.

    Example:
      >>> attachment = Attachment()
      >>> attachment.response("attention/query", None, 1.0, None)
      1.0
    """

    trained: Any = None  # pytree of arrays, shape=(L, ...)
    weights: Callable[[Any, Any], Any] = _keep_weights
    response: Callable[[str, jax.Array, jax.Array, Any], jax.Array] = _keep_output

"""Attachments: how a method looks at the layers of a model and changes them."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from sparse_jax.params.names import Tree

__all__ = [
    "MEMORY",
    "Added",
    "Arrays",
    "Attachment",
    "LayerValues",
    "Memory",
    "Module",
    "Parts",
    "Recompute",
    "Respond",
    "Slots",
    "Stack",
]

# Where an attention asks for a `Memory`.
MEMORY = "attention/memory"

Arrays = Tree[jax.typing.ArrayLike | None]
Parts = Mapping[str, jax.Array]  # what a method adds at a site, by part
Added = Mapping[str, Parts]  # by site
Module = Callable[[jax.Array], jax.Array]
# (site, module, x) -> y, what a layer calls instead of `module(x)`
Respond = Callable[[str, Module, jax.Array], jax.Array]
# Layers that compute again in the backward pass what they need there.
Recompute = Literal["none", "frozen", "all"]


def _keep_weights(layer_params: Arrays, trained: object) -> Arrays:
    """Leaves the weights of a layer as they are."""
    del trained
    return layer_params


def _call(
    site: str, module: Module, x: jax.Array, trained: object, key: jax.Array | None
) -> jax.Array:
    """Leaves a site as it is."""
    del site, trained, key
    return module(x)


class Memory(NamedTuple):
    """What an attention sees beside its tokens: P keys and values."""

    keys: jax.Array  # shape=(P, H * K)
    values: jax.Array  # shape=(P, H * K)
    bias: jax.Array  # of their scores, shape=(), float32


class LayerValues(NamedTuple):
    """What a method hands to the layers of a stack, shape=(L, ...); to one, its slice.

    Trees of leaves have the structure of the parameters of a layer.
    """

    added: Added = {}
    leaves: Arrays = None  # values that belong to leaves of the layer
    support: Arrays = None  # where in the leaves
    strength: jax.Array | None = None  # of what was learned, shape=(L,); None is 1

    @property
    def factor(self) -> jax.typing.ArrayLike:
        """The strength, as a number also where nothing is damped."""
        return 1.0 if self.strength is None else self.strength

    def with_row(self, row: "LayerValues") -> "LayerValues":
        """Returns the values with those of one layer that has a gradient."""
        return self._replace(added=row.added, leaves=row.leaves)


class Slots(NamedTuple):
    """The layers that are trained, where most are not.

    Only `rows` has a gradient then, and none of it is ever of size L.
    """

    rows: LayerValues  # `added` and `leaves`, shape=(num_active, ...)
    active: jax.Array  # numbers of the layers, shape=(num_active,), int32, sorted
    # (layer_params, trained[l]) -> row of layer l
    rows_of: Callable[[Arrays, LayerValues], LayerValues]
    recompute: Recompute


class Stack(NamedTuple):
    """A stack of layers that is about to run, as `loop` of an attachment gets it."""

    layer: Callable[..., jax.Array]  # (x, one, context) -> the next x, [B, T, D]
    x: jax.Array  # input of the first layer
    params: Arrays  # shape=(L, ...)
    rest: Any  # keys and kinds of the layers, shape=(L, ...)
    context: Any  # what layers see beside x
    checkpoint: bool  # whether the backward pass computes each layer again


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

    With `slots` a layer gets `trained[l].with_row(row)`, and only rows of active layers
    have a gradient.

    Example:
      >>> attachment = Attachment()
      >>> attachment.response("attention/query", lambda x: 2 * x, 1.0, None, None)
      2.0
    """

    # Arrays of shape (L, ...); a method of your own may have any pytree of them.
    trained: Any = LayerValues()
    weights: Callable[[Arrays, Any], Arrays] = _keep_weights
    response: Callable[[str, Module, jax.Array, Any, jax.Array | None], jax.Array] = (
        _call
    )
    slots: Slots | None = None
    # What runs the layers, in place of a loop that JAX differentiates.
    loop: Callable[[Stack], jax.Array] | None = None
    # Whether the layers run in a loop on a CPU too, as a program should that runs once:
    # 30 layers with a search for entries in each compile in 17 s instead of 57, are
    # read back in 0.2 s instead of 9.5, and run no slower.
    is_loop: bool = False

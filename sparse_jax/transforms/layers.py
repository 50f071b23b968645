"""Layers: which leaf of a tree belongs to which layer of the model."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from sparse_jax.errors import InputError
from sparse_jax.params.names import (
    Rule,
    Tree,
    first_match,
    leaf_names,
    map_named,
    patterns,
    require_match,
)

__all__ = [
    "FROZEN",
    "LAYER",
    "OUTSIDE",
    "STACKED",
    "LayerOf",
    "Place",
    "is_place",
    "places_of",
    "places_only",
]

# Expressions searched for in the leaf names, or a function of a name. The first group
# of an expression is the number of the layer; without a group the leaf is a stack.
LayerOf = Rule | Callable[[str], int | None]

STACKED, LAYER, OUTSIDE, FROZEN = "stacked", "layer", "outside", "frozen"


class Place(NamedTuple):
    """Where a leaf belongs."""

    kind: str  # STACKED, LAYER, OUTSIDE (updated always) or FROZEN
    layer: int  # number of the layer of a LAYER leaf, and -1 of any other


_STACK = Place(STACKED, -1)


def places_of(
    tree: object, layer_of: LayerOf, num_layers: int, always_on: Rule | None = None
) -> Tree[Place]:
    """Returns the place of every leaf.

    Leaves that `always_on` matches are updated always and come first. Leaves outside
    the layers are too if `always_on` is None, and frozen otherwise.

    Raises:
      InputError: if a pattern matches no leaf, a layer has no leaf or a number
        outside [0, num_layers), or the first axis of a stack is not num_layers.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros(2)
      >>> [tuple(place) for place in places_of([x, x, x], "^(0|1)$", 2)]
      [('layer', 0), ('layer', 1), ('outside', -1)]
    """
    names = jax.tree.leaves(leaf_names(tree))
    # `optax.tree.map_params` calls `init` with a placeholder that has no leaves.
    if names:
        require_match("always_on", always_on, names)
        if not callable(layer_of):
            require_match("layer_of", layer_of, names)
    found: set[int] = set()

    def place(name: str, leaf: jax.Array) -> Place:
        if first_match({"on": always_on}, name, "") == "on":
            return Place(OUTSIDE, -1)
        inside = _inside(layer_of, name)
        if inside is None:
            return Place(OUTSIDE if always_on is None else FROZEN, -1)
        if inside.kind == STACKED:
            _require_stack(name, leaf, num_layers)
            found.update(range(num_layers))
        else:
            _require_number(name, inside.layer, num_layers)
            found.add(inside.layer)
        return inside

    places = map_named(place, tree)
    missing = sorted(set(range(num_layers)) - found) if names else []
    if missing:
        raise InputError(
            f"`layer_of` must find a leaf for every layer, got none for layer "
            f"{', '.join(map(str, missing))} of num_layers={num_layers}. The first "
            f"leaves are {', '.join(f'`{name}`' for name in names[:4])}."
        )
    return places


def places_only(
    tree: optax.Params, places: Tree[Place], kind: str, layer: int = -1
) -> optax.Params:
    """Returns the leaves of one place; others become `optax.MaskedNode()`."""
    pick = lambda place, leaf: leaf if place == (kind, layer) else optax.MaskedNode()
    return jax.tree.map(pick, places, tree, is_leaf=is_place)


def _inside(layer_of: LayerOf, name: str) -> Place | None:
    """Returns the place of a leaf inside the layers, or None if it is outside."""
    if callable(layer_of):
        number = layer_of(name)
        return None if number is None else Place(LAYER, number)
    for pattern in patterns(layer_of):
        if match := re.search(pattern, name):
            return Place(LAYER, _number(name, match[1])) if match.re.groups else _STACK
    return None


def _number(name: str, word: str) -> int:
    """Returns the number that an expression found in a name."""
    if not word.isdecimal():
        raise InputError(
            f"`layer_of` must find a number in `{name}`, got {word!r}. Write the "
            r"group as (\d+)."
        )
    return int(word)


def _require_number(name: str, layer: int, num_layers: int) -> None:
    """Raises unless a layer is one of the model's."""
    if not 0 <= layer < num_layers:
        raise InputError(
            f"`num_layers` must be more than {layer}, the layer of `{name}`, got "
            f"{num_layers}."
        )


def _require_stack(name: str, leaf: jax.Array, num_layers: int) -> None:
    """Raises unless the first axis of a leaf counts the layers."""
    if not leaf.shape or leaf.shape[0] != num_layers:
        raise InputError(
            f"`{name}` must have num_layers={num_layers} as its first axis, got shape "
            f"{list(leaf.shape)}. An expression of `layer_of` with a group, such as "
            r"'layers/(\d+)/', means one leaf a layer."
        )


def is_place(node: object) -> bool:
    """Returns whether a node of a tree is a place."""
    return isinstance(node, Place)

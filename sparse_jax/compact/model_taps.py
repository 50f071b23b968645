"""Taps in a model: for its trained values, and to select what is trained."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax.compact.channels import respond_by_channels
from sparse_jax.compact.tap import (
    Draw,
    Selection,
    Wanted,
    empty_selection,
    selecting_tap,
    support_of,
    tap,
)
from sparse_jax.methods.method import Method
from sparse_jax.models.attachment import Added, Arrays, Attachment, LayerValues
from sparse_jax.params.names import Tree
from sparse_jax.supports.packing import route
from sparse_jax.supports.roles import SPARSE, TRAINED, Role, Roles, map_roles
from sparse_jax.supports.scores import Score, leaf_key

__all__ = [
    "Candidates",
    "Chosen",
    "Sums",
    "TrainedValues",
    "choose_by_gradient",
    "choose_from",
    "in_stack",
    "tap_leaf",
    "tap_leaves",
]

# (parameters, attachment, batch, key) -> (sum of the losses, what they are averaged by)
Sums = Callable[..., tuple[jax.Array, jax.Array]]
# Supports, whether the statistic was finite, and counts as of `Layout.choose`.
Chosen = tuple[optax.Params, jax.Array, optax.Params]

_map_sparse = functools.partial(map_roles, only=(SPARSE,))


class TrainedValues(NamedTuple):
    """What the optimizer sees, as a dict of the same names; in this order."""

    added: Added  # arrays that the method adds
    leaves: optax.Params  # packed values of the leaves


def tap_leaf(
    role: Role, leaf: jax.Array, value: jax.Array, support: jax.Array
) -> jax.Array:
    """Returns a sparse leaf whose gradient at the support belongs to the values."""
    return tap(leaf, value, support, role.layout)


def tap_leaves(
    method: Method,
    roles: Roles,
    params: optax.Params,
    support: optax.Params,
    values: TrainedValues,
) -> tuple[optax.Params, Attachment]:
    """Returns parameters and an attachment whose gradients belong to the values."""
    # The backward pass makes gradients in the dtype of their weights: until all
    # layers have theirs, bfloat16 holds the same numbers in half of the bytes.
    coarse = lambda role, leaf, value: value.astype(leaf.dtype)
    leaves = map_roles(coarse, roles, params, values.leaves, only=TRAINED)
    tapped, (inside, where) = route(roles, params, tap_leaf, leaves, support)
    layers = LayerValues(values.added, inside, where)
    attachment = _attach_taps(method, roles, tap_leaf, layers)
    leaves_of = lambda layer: layer.leaves
    response = respond_by_channels(method, in_stack(method, roles), leaves_of)
    return tapped, attachment._replace(response=response)


class Candidates(NamedTuple):
    """The entries that a selection chooses among, and what ranks them.

    Attributes:
      method: what is trained.
      score: ranks the entries.
      roles: of the leaves.
      params: parameters of the model.
      support: supports of the lengths that are wanted.
      key: for scores that draw.
      avoid: supports of entries that are not chosen, by the name of the leaf.
    """

    method: Method
    score: Score
    roles: Roles
    params: optax.Params
    support: optax.Params
    key: jax.Array
    avoid: Mapping[str, jax.Array]

    def draws(self) -> Tree[Draw]:
        """Returns what a choice depends on beside the statistic, layer by layer."""

        def draw(role: Role, leaf: jax.Array) -> Draw:
            own = leaf_key(self.key, role.name)
            fold = jax.vmap(lambda layer: jax.random.fold_in(own, layer))
            keys = fold(jnp.arange(len(leaf))) if role.stacked else own
            return Draw(keys, self.avoid.get(role.name))

        return _map_sparse(draw, self.roles, self.params)


def choose_by_gradient(
    among: Candidates, added: Added, batch: Any, key: jax.Array, sums: Sums
) -> Chosen:
    """Returns the supports, found layer by layer in one backward pass.

    Args:
      among: what is chosen from.
      added: arrays that the method adds.
      batch: what `sums` takes.
      key: for dropout.
      sums: the loss.
    """
    roles, params = among.roles, among.params

    def select_leaf(
        role: Role, leaf: jax.Array, selection: Selection, draw: Draw
    ) -> jax.Array:
        size = among.method.support_size(role)
        wanted = Wanted(among.score, size, role.layout)
        return selecting_tap(wanted, leaf, selection, draw)

    def mean(selections: Tree[Selection]) -> jax.Array:
        tapped, (inside, drawn) = route(roles, params, select_leaf, selections, draws)
        # A selection needs draws where an update has supports.
        values = LayerValues(added, inside, drawn)
        attachment = _attach_taps(among.method, roles, select_leaf, values)
        attachment = attachment._replace(is_loop=True)
        total, weight = sums(tapped, attachment, batch, key)
        return total / weight

    draws = among.draws()
    empty = lambda role, support: empty_selection(support.shape, role.layout)
    chosen = jax.grad(mean)(_map_sparse(empty, roles, among.support))
    found = lambda role, selection: support_of(selection, role.layout)
    bad = lambda role, selection: jnp.any(selection.bad > 0)
    count = lambda role, selection: selection.count.astype(jnp.int32)
    return (
        _map_sparse(found, roles, chosen),
        ~jnp.any(jnp.array(jax.tree.leaves(_map_sparse(bad, roles, chosen)), bool)),
        _map_sparse(count, roles, chosen),
    )


def choose_from(statistic: optax.Params, among: Candidates) -> Chosen:
    """Returns the supports without a backward pass.

    Args:
      statistic: what the score sees for the gradients; anything if it sees none.
      among: what is chosen from.
    """
    roles, score = among.roles, among.score

    def choose(
        role: Role, statistic: jax.Array, leaf: jax.Array, support: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        args = (score, statistic, leaf, among.method.support_size(role))
        return role.layout.choose(
            *args,
            leaf_key(among.key, role.name),
            avoid=among.avoid.get(role.name),
            stacked=role.stacked,
            capacity=support.shape[-1],
        )

    both = _map_sparse(choose, roles, statistic, among.params, among.support)
    pick = lambda i: _map_sparse(lambda role, pair: pair[i], roles, both)
    bad = lambda role, leaf: score.needs_gradient and ~jnp.isfinite(leaf).all()
    is_bad = jnp.array(jax.tree.leaves(_map_sparse(bad, roles, statistic)), bool)
    return pick(0), ~jnp.any(is_bad), pick(1)


def _attach_taps(
    method: Method,
    roles: Roles,
    tap_leaf: Callable[..., jax.Array],
    values: LayerValues,
) -> Attachment:
    """Returns the attachment that taps the leaves of the layers.

    Args:
      method: what is trained.
      roles: of all leaves.
      tap_leaf: (role, leaf, value, support) -> leaf.
      values: whose `leaves` and `support` are trees like the parameters.
    """
    inside, leaves, support = (
        in_stack(method, tree) for tree in (roles, values.leaves, values.support)
    )

    def weights(layer_params: Arrays, layer: LayerValues) -> Arrays:
        def one(role: Role, leaf: jax.Array, *values: optax.Params) -> jax.Array:
            return tap_leaf(role, leaf, *values) if role.kind == SPARSE else leaf

        if not inside:
            return layer_params
        return map_roles(one, inside, layer_params, layer.leaves, layer.support)

    values = values._replace(leaves=leaves, support=support)
    return Attachment(values, weights, method.respond)


def in_stack(method: Method, tree: object) -> Any:
    """Returns the subtree of the layers, empty if there is none."""
    name = method.stack
    return tree[name] if isinstance(tree, Mapping) and name in tree else {}

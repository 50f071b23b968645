"""Supports chosen by the gradients of several batches, one layer at a time.

    for l = L, ..., 1:
        for every batch b:  dx_b, g = pullback of layer l (dx_b);  sum += g
        support_l = entries with the best scores of sum

What enters a layer is kept for every batch, and the sum of one layer: the gradient of
all layers is never there. Each layer is computed again in the backward pass.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.errors import ConcretizationTypeError, UnexpectedTracerError

from sparse_jax.compact.checks import require_batches
from sparse_jax.compact.layer_by_layer import Loop, after_tracing, runs_own_layers
from sparse_jax.compact.model_taps import choose_from, draws_of, in_stack
from sparse_jax.compact.tap import Draw
from sparse_jax.methods.method import Method
from sparse_jax.models.attachment import (
    Added,
    Arrays,
    Attachment,
    LayerValues,
    Stack,
)
from sparse_jax.params.arguments import require_key
from sparse_jax.supports.packing import value_dtype
from sparse_jax.supports.roles import (
    SPARSE,
    Role,
    Roles,
    is_role,
    map_roles,
    sides_of,
)
from sparse_jax.supports.scores import Score

__all__ = ["choose_by_batches", "first_of", "is_several"]

# (parameters, attachment, batch, key) -> (sum of the losses, what they are averaged by)
Sums = Callable[..., tuple[jax.Array, jax.Array]]
# Supports, whether the gradient was finite, and counts as of `Layout.choose`.
Chosen = tuple[optax.Params, jax.Array, optax.Params]

_map_sparse = functools.partial(map_roles, only=(SPARSE,))


def is_several(key: Any) -> bool:
    """Returns whether these are the keys of several batches, new-style or raw.

    Example:
      >>> is_several(jax.random.key(0)), is_several(jax.random.split(jax.random.key(0)))
      (False, True)
      >>> raw = jax.random.PRNGKey(0)
      >>> is_several(raw), is_several(jax.random.split(raw))
      (False, True)

    Raises:
      InputError: if it is neither one key nor several.
    """
    several = False
    if isinstance(key, jax.Array | np.ndarray) and key.shape[:1] != (0,):
        is_raw = not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        several = key.ndim == 1 + is_raw
    require_key("key", key[0] if several else key)
    return several


def first_of(key: jax.Array) -> jax.Array:
    """Returns the key of the first batch, of a key or of several."""
    return key[0] if is_several(key) else key


def choose_by_batches(
    method: Method,
    score: Score,
    roles: Roles,
    params: optax.Params,
    support: optax.Params,
    added: Added,
    batches: Any,
    keys: jax.Array,
    sums: Sums,
    avoid: Mapping[str, jax.Array],
) -> Chosen:
    """Returns the supports that the sum of several gradients chooses.

    Where sparse leaves are outside the layers, or a loss does not run the layers of
    `params` once, by `run_layers`, this holds a dense float32 array for every sparse
    leaf.

    Args:
      batches: leaves of shape (N, ...).
      keys: of the batches, shape=(N,); scores draw by the first.
      sums: the loss.

    The other arguments and the results are those of `choose_by_gradient`.

    Raises:
      InputError: if there are not as many batches as keys.
    """
    require_batches(batches, len(keys))
    each = _Each(method, score, roles, params, added, sums)
    _, outside = sides_of(roles)
    first = jax.tree.map(lambda leaf: leaf[0], (batches, keys))
    if not jax.tree.leaves(_map_sparse(lambda *_: 0, outside)) and each.runs(*first):
        draws = draws_of(roles, params, keys[0], avoid)
        return each.choose(batches, keys, support, draws)
    statistic = each.summed(batches, keys)
    trees = (method, score, roles, params, support)
    return choose_from(statistic, *trees, keys[0], avoid)


class _Each:
    """A loss of every batch, whose layers are run one after the other."""

    def __init__(
        self,
        method: Method,
        score: Score,
        roles: Roles,
        params: optax.Params,
        added: Added,
        sums: Sums,
    ):
        self.method, self.score, self.roles, self.params = method, score, roles, params
        self.added, self._sums = added, sums
        self.layers, own = in_stack(method, params), in_stack(method, roles)
        self.own: Roles = own
        self.layer: Callable[..., jax.Array]

    def sums(
        self, batch: object, key: jax.Array, loop: Loop
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the sums of the loss of one batch."""

        def weights(layer_params: Arrays, layer: LayerValues) -> Arrays:
            put = lambda role, leaf, own: own if role.kind == SPARSE else leaf
            return map_roles(put, self.own, layer_params, layer.leaves)

        values = LayerValues(self.added, self._sparse(self.layers))
        loop = after_tracing(loop, values)
        attachment = Attachment(values, weights, self.method.respond, loop=loop)
        return self._sums(self.params, attachment, batch, key)

    def runs(self, batch: object, key: jax.Array) -> bool:
        """Returns whether the layers can be run one after the other, without the loss.

        They cannot if the loss runs them more than once, or by a loop of its own, or
        changes their parameters before, or if they are a part of another program: of
        `jax.jit`, `jax.checkpoint` or `jax.vmap` inside the loss.
        """
        if not self.own:
            return False
        seen: list[Stack] = []

        def enter(batch: object, key: jax.Array) -> list[tuple]:
            self.sums(batch, key, lambda stack: seen.append(stack) or stack.x)
            return [(stack.x, stack.rest, stack.context) for stack in seen]

        def run(x: jax.Array, trees: tuple, context: Any) -> jax.Array:
            layer, one, rest = jax.tree.map(lambda leaf: leaf[0], trees)
            return seen[0].layer(x, (layer, one, *rest), context)

        try:
            program, entered = jax.make_jaxpr(enter, return_shape=True)(batch, key)
            if len(seen) != 1 or not runs_own_layers(seen[0], self.layers):
                return False
            ((x, rest, context),) = entered
            values = LayerValues(self.added, self._sparse(self.layers))
            layer = jax.make_jaxpr(run)(x, (self.layers, values, rest), context)
        except (UnexpectedTracerError, ConcretizationTypeError):
            return False
        return self._are_known([*program.consts, *layer.consts])

    def _are_known(self, values: Sequence[object]) -> bool:
        """Returns whether what is traced among these is all from the state.

        Anything else may be of a program that is traced inside the loss, and must not
        be used outside of it.
        """
        known = {id(leaf) for leaf in jax.tree.leaves((self.params, self.added))}
        traced = [value for value in values if isinstance(value, Tracer)]
        return all(id(value) in known for value in traced)

    def choose(
        self, batches: Any, keys: jax.Array, support: optax.Params, draws: Any
    ) -> Chosen:
        """Returns the supports, one layer at a time."""
        x, rest, context = lax.map(lambda one: self._enter(*one), (batches, keys))
        rest = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), rest)  # (L, N, ...)
        xs, y = self._forward(x, rest, context)
        dx = lax.map(lambda one: self._leave(*one), (batches, keys, y))

        one_layer = lambda role: role._replace(stacked=False)
        roles = jax.tree.map(one_layer, self.own, is_leaf=is_role)

        def back(dx: jax.Array, one: tuple) -> tuple[jax.Array, Any]:
            x, layer, added, rest, support, draw = one
            leaves = self._sparse(layer)

            def add(total: Arrays, one: tuple) -> tuple[Arrays, jax.Array]:
                x, dx, rest, context = one
                run = lambda x, leaves: self.layer(
                    x, (layer, LayerValues(added, leaves), *rest), context
                )
                dx, grads = jax.vjp(run, x, leaves)[1](dx)
                more = lambda role, total, g: total + self._added(role, g)
                return map_roles(more, roles, total, grads, only=(SPARSE,)), dx

            zeros = lambda role, leaf: jnp.zeros(leaf.shape, value_dtype(leaf))
            total = map_roles(zeros, roles, layer, only=(SPARSE,))
            total, dx = lax.scan(add, total, (x, dx, rest, context))
            trees = (total, layer, support, draw)
            return dx, map_roles(self._choose, roles, *trees, only=(SPARSE,))

        kept, drawn = (in_stack(self.method, tree) for tree in (support, draws))
        rows = (xs, self.layers, self.added, rest, kept, drawn)
        _, found = lax.scan(back, dx, rows, reverse=True)
        pick = lambda i: map_roles(lambda _, one: one[i], roles, found, only=(SPARSE,))
        others: Any = _map_sparse(lambda role: None, self.roles)
        whole = lambda i: {**others, self.method.stack: pick(i)}
        is_bad = jnp.array(jax.tree.leaves(pick(2)), bool)
        return whole(0), ~jnp.any(is_bad), whole(1)

    def summed(self, batches: Any, keys: jax.Array) -> optax.Params:
        """Returns the sums of all layers at once."""

        def mean(leaves: optax.Params, batch: object, key: jax.Array) -> jax.Array:
            put = lambda role, leaf, own: own if role.kind == SPARSE else leaf
            params = map_roles(put, self.roles, self.params, leaves)
            values, respond = LayerValues(self.added), self.method.respond
            attachment = Attachment(values, response=respond, is_loop=True)
            total, weight = self._sums(params, attachment, batch, key)
            return total / weight

        def add(total: optax.Params, one: tuple) -> tuple[optax.Params, None]:
            more = lambda role, total, g: total + self._added(role, g)
            return _map_sparse(more, self.roles, total, jax.grad(mean)(own, *one)), None

        own = _map_sparse(lambda role, leaf: leaf, self.roles, self.params)
        zeros = lambda role, leaf: jnp.zeros(leaf.shape, value_dtype(leaf))
        start = _map_sparse(zeros, self.roles, self.params)
        return lax.scan(add, start, (batches, keys))[0]

    def _enter(self, batch: object, key: jax.Array) -> tuple[jax.Array, Any, Any]:
        """Returns what a batch brings to the first layer, and to each of them."""
        seen: list[Stack] = []
        self.sums(batch, key, lambda stack: seen.append(stack) or stack.x)
        self.layer = seen[0].layer
        return seen[0].x, seen[0].rest, seen[0].context

    def _forward(
        self, x: jax.Array, rest: Any, context: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what enters each layer, (L, N, ...), and what leaves the last."""

        def through(x: jax.Array, one: tuple) -> tuple[jax.Array, jax.Array]:
            layer, added, rest = one
            values = LayerValues(added, self._sparse(layer))

            def run(one: tuple) -> jax.Array:
                x, rest, context = one
                return self.layer(x, (layer, values, *rest), context)

            return lax.map(run, (x, rest, context)), x

        y, xs = lax.scan(through, x, (self.layers, self.added, rest))
        return xs, y

    def _leave(self, batch: object, key: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the gradient of the loss for what leaves the last layer."""
        leave = lambda y: self.sums(batch, key, lambda stack: y)
        _, pull, weight = jax.vjp(leave, y, has_aux=True)
        return pull(1 / weight)[0]

    def _added(self, role: Role, gradient: jax.Array) -> jax.Array:
        """Returns what the gradient of one batch adds to the sum."""
        return self.score.added(gradient, role.stacked).astype(value_dtype(gradient))

    def _choose(
        self,
        role: Role,
        total: jax.Array,
        leaf: jax.Array,
        support: jax.Array,
        draw: Draw,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the support of one layer, its count, and whether the sum is bad."""
        found = role.layout.choose(
            self.score,
            total,
            leaf,
            self.method.support_size(role),
            draw.key,
            avoid=draw.avoid,
            capacity=support.shape[-1],
        )
        return *found, ~jnp.isfinite(total).all()

    def _sparse(self, layers: Arrays) -> Arrays:
        """Returns the sparse leaves of the layers, or of one of them."""
        return map_roles(lambda role, leaf: leaf, self.own, layers, only=(SPARSE,))

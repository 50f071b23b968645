"""Supports chosen by the gradients of several batches, one layer at a time.

    for l = L, ..., 1:
        for every batch b:  dx_b, g = pullback of layer l (dx_b);  sum += g
        support_l = entries with the best scores of sum

What enters a layer is kept for every batch, and the sum of one layer: the gradient of
all layers is never there. Each layer is computed again in the backward pass.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.errors import NonConcreteBooleanIndexError, UnexpectedTracerError

from sparse_jax.compact.checks import require_batches
from sparse_jax.compact.layer_by_layer import Loop, after_tracing, runs_own_layers
from sparse_jax.compact.model_taps import (
    Candidates,
    Chosen,
    Sums,
    choose_from,
    in_stack,
)
from sparse_jax.compact.tap import Draw
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
    rule = "one PRNG key, or an array of one for each of several batches"
    require_key("key", key[0] if several else key, rule)
    return several


def first_of(key: jax.Array) -> jax.Array:
    """Returns the key of the first batch, of a key or of several."""
    return key[0] if is_several(key) else key


def choose_by_batches(
    among: Candidates, added: Added, batches: Any, keys: jax.Array, sums: Sums
) -> Chosen:
    """Returns the supports that the sum of several gradients chooses.

    Where sparse leaves are outside the layers, or a loss does not run the layers of
    the parameters once, by `run_layers`, this holds a dense float32 array for every
    sparse leaf.

    Args:
      among: what is chosen from, with the key of the first batch.
      added: arrays that the method adds.
      batches: leaves of shape (N, ...).
      keys: of the batches, shape=(N,).
      sums: the loss.

    Raises:
      InputError: if there are not as many batches as keys.
    """
    require_batches(batches, len(keys))
    loss = _LayeredLoss(among, added, sums)
    _, outside = sides_of(among.roles)
    first = jax.tree.map(lambda leaf: leaf[0], (batches, keys))
    if not jax.tree.leaves(_map_sparse(lambda *_: 0, outside)) and loss.opens(*first):
        return _choose_by_layers(loss, batches, keys)
    return choose_from(_summed(loss, batches, keys), among)


class _LayeredLoss:
    """A loss, and what its gradients are of; perhaps its layers run outside of it."""

    def __init__(self, among: Candidates, added: Added, sums: Sums):
        self.among, self.added, self._sums = among, added, sums
        self.layers = in_stack(among.method, among.params)
        self.roles: Roles = in_stack(among.method, among.roles)

    def sparse(self, layers: Arrays) -> Arrays:
        """Returns the sparse leaves of the layers, or of one of them."""
        return map_roles(lambda role, leaf: leaf, self.roles, layers, only=(SPARSE,))

    def opens(self, batch: object, key: jax.Array) -> bool:
        """Returns whether the layers can be run one after the other, without the loss.

        They cannot if the loss runs them more than once, or by a loop of its own, or
        changes their parameters before, or asks for what enters each of them, or hands
        them something other than arrays; or if they are a part of another program: of
        `jax.jit`, `jax.checkpoint` or `jax.vmap` inside the loss.
        """
        if not self.roles:
            return False
        seen: list[Stack] = []

        def enter(batch: object, key: jax.Array) -> list[tuple]:
            seen.extend(self.stacks(batch, key))
            return [(stack.x, stack.rest, stack.context) for stack in seen]

        def run(x: jax.Array, trees: tuple, context: Any) -> jax.Array:
            layer, one, rest = jax.tree.map(lambda leaf: leaf[0], trees)
            return seen[0].layer(x, (layer, one, *rest), context)

        try:
            program, entered = jax.make_jaxpr(enter, return_shape=True)(batch, key)
            if len(seen) != 1 or not runs_own_layers(seen[0], self.layers):
                return False
            ((x, rest, context),) = entered
            values = LayerValues(self.added, self.sparse(self.layers))
            layer = jax.make_jaxpr(run)(x, (self.layers, values, rest), context)
        except (UnexpectedTracerError, TypeError, NonConcreteBooleanIndexError):
            # Of another program, or the layers see numbers that are known or no arrays.
            # An error of the loss itself comes again where it runs as a whole.
            return False
        return self._are_known([*program.consts, *layer.consts])

    def stacks(self, batch: object, key: jax.Array) -> list[Stack]:
        """Returns what the loss runs, with what enters it."""
        seen: list[Stack] = []
        self._without_layers(batch, key, lambda stack: seen.append(stack) or stack.x)
        return seen

    def leave(self, batch: object, key: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the gradient of the loss for what leaves the last layer."""
        leave = lambda y: self._without_layers(batch, key, lambda stack: y)
        _, pull, weight = jax.vjp(leave, y, has_aux=True)
        return pull(1 / weight)[0]

    def sums(
        self, leaves: optax.Params, batch: object, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the sums of the loss of one batch, by sparse leaves of the model."""
        outside = lambda role, leaf, own: (
            own if role.kind == SPARSE and not role.stacked else leaf
        )
        params = map_roles(outside, self.among.roles, self.among.params, leaves)
        values = LayerValues(self.added, in_stack(self.among.method, leaves))
        # In a loop, as a program that runs once.
        attachment = self._attachment(values)._replace(is_loop=True)
        return self._sums(params, attachment, batch, key)

    def _without_layers(
        self, batch: object, key: jax.Array, loop: Loop
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the sums of the loss of one batch, with a loop for its layers."""
        values = LayerValues(self.added, self.sparse(self.layers))
        loop = after_tracing(loop, values)
        attachment = self._attachment(values)._replace(loop=loop)
        return self._sums(self.among.params, attachment, batch, key)

    def _attachment(self, values: LayerValues) -> Attachment:
        """Returns what gives the gradients of weights in layers to these values."""

        def one(role: Role, leaf: jax.Array, own: jax.Array) -> jax.Array:
            return _credited(leaf, own) if role.kind == SPARSE else leaf

        def weights(layer_params: Arrays, layer: LayerValues) -> Arrays:
            if not self.roles:
                return layer_params
            return map_roles(one, self.roles, layer_params, layer.leaves)

        return Attachment(values, weights, self.among.method.respond)

    def _are_known(self, values: Sequence[object]) -> bool:
        """Returns whether what is traced among these is all from the state.

        Anything else may be of a program that is traced inside the loss, and must not
        be used outside of it.
        """
        state = (self.among.params, self.added)
        known = {id(leaf) for leaf in jax.tree.leaves(state)}
        traced = [value for value in values if isinstance(value, Tracer)]
        return all(id(value) in known for value in traced)


def _choose_by_layers(loss: _LayeredLoss, batches: Any, keys: jax.Array) -> Chosen:
    """Returns the supports, with the sum of one layer at a time."""
    among, layers, added = loss.among, loss.layers, loss.added
    one_layer = lambda role: role._replace(stacked=False)
    roles = jax.tree.map(one_layer, loss.roles, is_leaf=is_role)
    seen: list[Stack] = []

    def enter(one: tuple) -> tuple[jax.Array, Any, Any]:
        (stack,) = loss.stacks(*one)
        seen.append(stack)
        return stack.x, stack.rest, stack.context

    x, rest, context = lax.map(enter, (batches, keys))
    rest = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), rest)  # (L, N, ...)
    run_layer = seen[-1].layer

    def forward(x: jax.Array, one: tuple) -> tuple[jax.Array, jax.Array]:
        layer, added, rest = one
        values = LayerValues(added, loss.sparse(layer))

        def run(one: tuple) -> jax.Array:
            x, rest, context = one
            return run_layer(x, (layer, values, *rest), context)

        return lax.map(run, (x, rest, context)), x

    y, xs = lax.scan(forward, x, (layers, added, rest))  # xs: (L, N, ...)
    dx = lax.map(lambda one: loss.leave(*one), (batches, keys, y))

    def back(dx: jax.Array, one: tuple) -> tuple[jax.Array, Any]:
        x, layer, added, rest, support, draw = one
        leaves = loss.sparse(layer)

        def add(total: optax.Params, one: tuple) -> tuple[optax.Params, jax.Array]:
            x, dx, rest, context = one
            run = lambda x, leaves: run_layer(
                x, (layer, LayerValues(added, leaves), *rest), context
            )
            dx, grads = jax.vjp(run, x, leaves)[1](dx)
            return _plus(among.score, roles, total, grads), dx

        total, dx = lax.scan(add, _zeros(roles, layer), (x, dx, rest, context))
        choose = functools.partial(_choose_in_layer, among)
        return dx, _map_sparse(choose, roles, total, layer, support, draw)

    trees = (among.support, among.draws())
    support, draws = (in_stack(among.method, tree) for tree in trees)
    rows = (xs, layers, added, rest, support, draws)
    _, found = lax.scan(back, dx, rows, reverse=True)
    pick = lambda i: _map_sparse(lambda _, one: one[i], roles, found)
    others: Any = _map_sparse(lambda role: None, among.roles)
    whole = lambda i: {**others, among.method.stack: pick(i)}
    is_bad = jnp.array(jax.tree.leaves(pick(2)), bool)
    return whole(0), ~jnp.any(is_bad), whole(1)


def _choose_in_layer(
    among: Candidates,
    role: Role,
    total: jax.Array,
    leaf: jax.Array,
    support: jax.Array,
    draw: Draw,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the support of one layer, its count, and whether the sum is bad."""
    found = role.layout.choose(
        among.score,
        total,
        leaf,
        among.method.support_size(role),
        draw.key,
        avoid=draw.avoid,
        capacity=support.shape[-1],
    )
    return *found, ~jnp.isfinite(total).all()


def _summed(loss: _LayeredLoss, batches: Any, keys: jax.Array) -> optax.Params:
    """Returns the sums of all leaves at once."""
    among = loss.among
    own = _map_sparse(lambda role, leaf: leaf, among.roles, among.params)

    def mean(leaves: optax.Params, batch: object, key: jax.Array) -> jax.Array:
        total, weight = loss.sums(leaves, batch, key)
        return total / weight

    def add(total: optax.Params, one: tuple) -> tuple[optax.Params, None]:
        grads = jax.grad(mean)(own, *one)
        return _plus(among.score, among.roles, total, grads), None

    return lax.scan(add, _zeros(among.roles, among.params), (batches, keys))[0]


@jax.custom_vjp
def _credited(leaf: jax.Array, own: jax.Array) -> jax.Array:
    """Returns a leaf whose gradient belongs to another array of its shape.

    As a tap gives it: where a loss makes the weights of its layers of `params`, or
    adds a penalty on them, updates know nothing of that, nor does a choice by them.
    """
    del own
    return leaf


def _credited_forward(leaf, own):
    """Keeps a dtype."""
    return leaf, jnp.empty(0, own.dtype)


def _credited_backward(like, cotangent):
    """Gives the gradient away."""
    return None, cotangent.astype(like.dtype)


_credited.defvjp(_credited_forward, _credited_backward)


def _zeros(roles: Roles, params: optax.Params) -> optax.Params:
    """Returns sums of nothing."""
    zeros = lambda role, leaf: jnp.zeros(leaf.shape, value_dtype(leaf))
    return _map_sparse(zeros, roles, params)


def _plus(
    score: Score, roles: Roles, total: optax.Params, grads: optax.Params
) -> optax.Params:
    """Returns sums with what the gradients of one batch add."""

    def plus(role: Role, total: jax.Array, grad: jax.Array) -> jax.Array:
        return total + score.added(grad, role.stacked).astype(value_dtype(grad))

    return _map_sparse(plus, roles, total, grads)

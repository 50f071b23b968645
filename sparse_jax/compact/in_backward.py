"""The compact tier with updates inside the backward pass: one layer's gradient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast, final

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax.compact.channels import respond_by_channels
from sparse_jax.compact.checks import sums_of
from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.compact.gradients import choose_if, update_if
from sparse_jax.compact.layer_by_layer import (
    LayerByLayer,
    Loop,
    after_stack,
    after_tracing,
    before_stack,
    runs_own_layers,
)
from sparse_jax.compact.model_taps import TrainedValues, in_stack, tap_leaf
from sparse_jax.errors import InputError
from sparse_jax.models.attachment import Added, Arrays, Attachment, LayerValues
from sparse_jax.params.axes import platform
from sparse_jax.params.names import leaves_by_name, map_named
from sparse_jax.supports.masters import current_values, keep_masters
from sparse_jax.supports.packing import pack, route, write_back
from sparse_jax.supports.roles import (
    DENSE,
    SPARSE,
    TRAINED,
    Role,
    Roles,
    map_roles,
    sides_of,
)
from sparse_jax.transforms.layer_state import init_rows

__all__ = ["InBackward"]

Rows = TypeVar("Rows")


class _Kept(NamedTuple):
    """What the update of a layer writes: shape=(L, ...), or of one layer."""

    leaves: Any  # parameters that are trained; of one layer what is trained of them
    masters: Any
    added: Added
    opt_state: dict[str, jax.Array]  # what the optimizer keeps of layers, by name


class _Carry(NamedTuple):
    """What goes from a layer to the one below."""

    dx: jax.Array  # gradient of what is between them
    finite: jax.Array  # whether all gradients were, so far
    squares: jax.Array  # sum over these gradients
    kept: _Kept
    above: _Kept | None  # the layer above, updated; None if it is written by then


@final
@dataclass(frozen=True)
class InBackward(Tuner):
    """Fine-tunes as `Compact`, and updates each layer inside the backward pass.

        for l = L, ..., 1:
            dx, g_l = pullback of layer l (dx)
            values_l, state_l = tx(g_l, state_l, values_l)

    so that packed gradients exist for one layer at a time. Leaves outside the layers
    are updated at the end. Updates and state are those of `Compact` with the same `tx`,
    if `tx` updates every number independently, as Adam, SGD or Lion do. Nothing can
    depend on the gradients of all layers at once: there is no clipping by the global
    norm, and no sum over micro-batches or replicas. The leaves outside the layers are
    updated with `global_norm`, that of all gradients, as an extra argument, which is
    what `clip_by_previous_norm` asks for.

    A step whose loss, or whose gradient outside and above the layers, is not finite
    changes nothing. If the gradient stops being finite at layer l, then layer l, the
    layers below it and the leaves outside are not updated, and the step is reported as
    skipped: the layers above l have already been updated, and the count of updates
    does not advance.

    The attributes are those of `Compact`; `accumulate` and `data_axes` stay as they
    are. The loss must run the layers by `run_layers`, as the models here do.

    Example:
      >>> from sparse_jax import Sparse
      >>> InBackward(lambda *_: (0.0, 1), Sparse(density=0.01), optax.adam(1e-3),
      ...            split_masters=True).split_masters
      True

    References:
      Lv et al., 2023, LOMO: https://arxiv.org/abs/2306.09782
    """

    def __post_init__(self):
        super().__post_init__()
        if self.method.stack is None:
            raise InputError(
                "`stack` of the method must name the subtree of the layers, got None."
            )
        if self.accumulate != 1 or self.data_axes:
            given = {"accumulate": self.accumulate, "data_axes": self.data_axes}
            name = "accumulate" if self.accumulate != 1 else "data_axes"
            raise InputError(
                f"`{name}` must be left out where layers are updated inside the "
                f"backward pass, got {given[name]!r}: their gradients are never there "
                "to be added up. Use `Compact`."
            )

    def step(
        self, state: CompactState, batch: object, key: jax.Array, **extra_args: object
    ) -> tuple[CompactState, dict[str, jax.Array]]:
        """Makes one update.

        The arguments are those of `Compact.step`; `tx` gets the `extra_args` for every
        layer.

        Returns:
          The new state, and `loss`, `gradient_norm` and `is_skipped` as of `Compact`.
        """
        self._require_state(state)
        step = _Step(self, state)
        read = lambda role, leaf, support: role.read(leaf, support)
        trees = (state.params, state.support)
        beyond = map_roles(read, step.outside, *trees, only=TRAINED)
        sums = lambda beyond, loop: step.sums(beyond, batch, key, loop)
        stack, pull_input = before_stack(sums, beyond)
        if not runs_own_layers(stack, step.params):
            raise InputError(
                "`loss` must run the layers of its `params` as they are, got others. "
                "Cast the parameters before `init`, or use `Compact`."
            )
        layers = LayerByLayer(stack, step.leaves_of)
        x, residuals = layers.forward(step.params, step.values)
        total, weight, pull_output = after_stack(sums, beyond, x)
        mean = lambda grads: jax.tree.map(lambda grad: grad / weight, grads)
        d_beyond, dx = pull_output(jnp.ones_like(total))
        loss = total / weight
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(mean(d_beyond)))
        finite &= jnp.greater_equal(state.count, 0)
        # A layer is written before anything is read of the next one: where rows are
        # read and written side by side, XLA for CPUs copies their stacks (all moments,
        # twice for every layer). The compiler of TPUs does not, and a layer less waits.
        waits = platform() != "tpu"

        def back(carry: _Carry, one: tuple) -> tuple[_Carry, None]:
            dx, finite, squares, kept, above = carry
            number, residuals, rest, support, frozen = one
            if above is not None:
                kept = step.written(kept, above, jnp.minimum(number + 1, step.last))
            layer = _at(number, kept)
            weights = _merged(step.roles, layer.leaves, frozen)
            values = LayerValues(layer.added, support=support)
            dx, *grads = layers.back(dx, residuals, weights, values, rest)
            grads = mean(grads)
            part = optax.tree.norm(grads, squared=True)
            finite &= jnp.isfinite(part)
            # Read again for the update: a TPU would hold the weights until then.
            dx, grads, leaves = lax.optimization_barrier((dx, grads, kept.leaves))
            kept = kept._replace(leaves=leaves)
            layer = layer._replace(leaves=_at(number, leaves))
            above = step.updated(layer, support, grads, finite, **extra_args)
            if not waits:
                kept, above = step.written(kept, above, number), None
            return _Carry(dx, finite, squares + part, kept, above), None

        first = step.first() if waits else None
        carry = _Carry(dx, finite, jnp.float32(0), step.kept, first)
        numbers = jnp.arange(step.last + 1)
        rows = (numbers, residuals, stack.rest, step.values.support, step.frozen)
        carry, _ = lax.scan(back, carry, rows, reverse=True)
        kept = carry.kept
        if carry.above is not None:
            kept = step.written(kept, carry.above, jnp.int32(0))

        (d_input,) = pull_input(carry.dx)
        d_beyond = mean(jax.tree.map(jnp.add, d_beyond, d_input))
        norm = jnp.sqrt(carry.squares + optax.tree.norm(d_beyond, squared=True))
        ready = carry.finite & jnp.isfinite(norm)
        state = step.finished(kept, d_beyond, norm, ready, **extra_args)
        return state, {"loss": loss, "gradient_norm": norm, "is_skipped": ~ready}

    def _start(
        self, roles: Roles, params: optax.Params, values: TrainedValues
    ) -> optax.OptState:
        """Returns the state of the optimizer before the first update."""
        layers, outside = sides_of(roles)
        pick = lambda side: map_roles(keep, side, values.leaves, only=TRAINED)
        keep = lambda role, leaf: leaf
        rows = values._replace(leaves=pick(layers))._asdict()
        count = jax.tree.leaves(in_stack(self.method, params))[0].shape[0]
        # Of each layer on its own, because some states depend on what is together, as
        # blocks of 8-bit moments do.
        found = leaves_by_name(init_rows(self.tx, rows, count))
        beyond = TrainedValues({}, pick(outside))._asdict()
        found |= leaves_by_name(self.tx.init(beyond))
        whole = jax.eval_shape(self.tx.init, values._asdict())
        return map_named(lambda name, _: found[name], whole)


class _Step:
    """The parts of a state, of which a step updates one layer at a time."""

    def __init__(self, tuner: InBackward, state: CompactState):
        self.tuner, self.state = tuner, state
        self.tx = optax.with_extra_args_support(tuner.tx)
        self.stack = cast(str, tuner.method.stack)  # as required of a tuner
        inside, self.outside = sides_of(tuner.roles(state.params))
        self.roles, self.params, support, masters = (
            in_stack(tuner.method, tree)
            for tree in (inside, state.params, state.support, state.masters)
        )
        self.values = LayerValues(state.added, support=support)
        self.last = len(jax.tree.leaves(self.params)[0]) - 1  # layer
        rest = lambda role, leaf: optax.MaskedNode() if role.kind in TRAINED else leaf
        self.frozen = map_roles(rest, self.roles, self.params)
        own = map_roles(lambda role, leaf: leaf, self.roles, self.params, only=TRAINED)
        self.kept = _Kept(own, masters, state.added, self._rows())

    def sums(
        self, beyond: optax.Params, batch: object, key: jax.Array, loop: Loop
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the sums of the loss of some values outside the layers."""

        def weight(
            role: Role, leaf: jax.Array, row: jax.Array, support: jax.Array
        ) -> jax.Array:
            if role.kind == SPARSE:
                return tap_leaf(role, leaf, row, support)
            return row.astype(leaf.dtype) if role.kind == DENSE else leaf

        def weights(layer_params: Arrays, layer: LayerValues) -> Arrays:
            trees = (layer_params, layer.leaves, layer.support)
            return map_roles(weight, self.roles, *trees)

        tuner, state = self.tuner, self.state
        leaves = jax.vmap(self.leaves_of)(self.params, self.values.support)
        values = self.values._replace(leaves=leaves)
        params, _ = route(self.outside, state.params, tap_leaf, beyond, state.support)
        leaves_of = lambda layer: layer.leaves
        response = respond_by_channels(tuner.method, self.roles, leaves_of)
        loop = after_tracing(loop, values)
        attachment = Attachment(values, weights, response, loop=loop)
        return sums_of(tuner.loss, self.stack, params, attachment, batch, key)

    def leaves_of(self, params: Arrays, support: Arrays) -> Arrays:
        """Returns what the leaves of one layer are differentiated by."""

        def one(role: Role, leaf: jax.Array, support: jax.Array) -> jax.Array:
            if role.kind == DENSE:
                return leaf
            # The values are in the weights; a tap does not read them.
            shape = role.layout.packed_shape(support.shape, role.shape)
            return jnp.zeros(shape, leaf.dtype)

        return map_roles(one, self.roles, params, support, only=TRAINED)

    def first(self) -> _Kept:
        """Returns the last layer as it is, which is where the backward pass begins."""
        at = lambda tree: _at(jnp.int32(self.last), tree)
        read = lambda role, leaf, support: role.read(leaf, support)
        layer, support = at((self.kept, self.values.support))
        leaves = map_roles(read, self.roles, layer.leaves, support, only=TRAINED)
        return layer._replace(leaves=leaves)

    def updated(
        self,
        layer: _Kept,
        support: Any,
        grads: Sequence[Any],
        finite: jax.Array,
        **extra_args: object,
    ) -> _Kept:
        """Returns what is trained of a layer, updated if its gradient is finite."""
        weights, masters, added, own = layer
        leaves = current_values(self.roles, support, masters, weights)
        now = TrainedValues(added, {self.stack: leaves})._asdict()
        given = TrainedValues(grads[0], {self.stack: grads[1]})._asdict()
        opt_state = self._part(now, own)
        updates, new = self.tx.update(given, opt_state, now, **extra_args)
        moved: Any = optax.apply_updates(now, updates)
        moved, new = choose_if(finite, (moved, new), (now, opt_state))
        leaves, new = moved["leaves"][self.stack], leaves_by_name(new)
        split = self.tuner.split_masters
        rounded = lambda role, leaf, value: value.astype(leaf.dtype)
        return _Kept(
            map_roles(rounded, self.roles, weights, leaves, only=TRAINED),
            keep_masters(self.roles, leaves, weights, split),
            moved["added"],
            {name: new[name] for name in own},
        )

    def written(self, kept: _Kept, layer: _Kept, number: jax.Array) -> _Kept:
        """Returns the stacks with one layer replaced."""

        def write(
            role: Role, leaf: jax.Array, support: jax.Array, row: jax.Array
        ) -> jax.Array:
            if role.kind == DENSE:
                return _put(number, leaf, row)
            one = (support[None], row[None], number[None])
            return role.layout.scatter(leaf, *one)

        support = _at(number, self.values.support)
        trees = (kept.leaves, support, layer.leaves)
        leaves = map_roles(write, self.roles, *trees, only=TRAINED)
        rest = (kept._replace(leaves=()), layer._replace(leaves=()))
        return _put(number, *rest)._replace(leaves=leaves)

    def finished(
        self,
        kept: _Kept,
        grads: optax.Updates,
        norm: jax.Array,
        ready: jax.Array,
        **extra_args: object,
    ) -> CompactState:
        """Returns the state with the layers as kept, and the rest updated if ready."""
        state, outside = self.state, self.outside
        now = current_values(outside, state.support, state.masters, state.params)
        now, grads = (TrainedValues({}, tree)._asdict() for tree in (now, grads))
        args = (grads, state.count, now, self._part(now, {}))
        given = {"global_norm": norm, **extra_args}
        count, now, new = update_if(ready, self.tx, *args, **given)
        leaves, split = now["leaves"], self.tuner.split_masters
        params: Any = write_back(outside, state.params, state.support, leaves)
        masters: Any = keep_masters(outside, leaves, state.params, split)
        layers = _merged(self.roles, kept.leaves, self.frozen)
        opt = kept.opt_state | leaves_by_name(new)
        return CompactState(
            count=count,
            params={**params, self.stack: layers},
            support=state.support,
            masters={**masters, self.stack: kept.masters},
            added=kept.added,
            opt_state=map_named(lambda name, _: opt[name], state.opt_state),
        )

    def _rows(self) -> dict[str, jax.Array]:
        """Returns what the optimizer keeps of the layers, by name."""

        def one(params: Any, values: Any) -> dict[str, Any]:
            leaves = pack(self.roles, values.support, params)
            return TrainedValues(values.added, {self.stack: leaves})._asdict()

        first = jax.tree.map(lambda leaf: leaf[0], (self.params, self.values))
        shapes = jax.eval_shape(self.tx.init, jax.eval_shape(one, *first))
        whole = leaves_by_name(self.state.opt_state)
        # Counts, which are there without any layer, are the same for all of them.
        nothing: Any = map_roles(lambda *_: None, self.outside, only=())
        none = TrainedValues({}, nothing)
        shared = leaves_by_name(jax.eval_shape(self.tx.init, none._asdict()))
        return {n: whole[n] for n in leaves_by_name(shapes) if n not in shared}

    def _part(self, values: optax.Params, rows: Mapping[str, jax.Array]) -> Any:
        """Returns the state of the optimizer for a part of what it updates."""
        leaves = {**leaves_by_name(self.state.opt_state), **rows}
        shapes = jax.eval_shape(self.tx.init, values)
        return map_named(lambda name, _: leaves[name], shapes)


def _merged(roles: Roles, trained: Any, frozen: Any) -> Any:
    """Returns the parameters of which two trees have one part each."""
    pick = lambda role, new, old: new if role.kind in TRAINED else old
    return map_roles(pick, roles, trained, frozen)


def _at(number: jax.Array, tree: Rows) -> Rows:
    """Returns the arrays of one layer."""
    at = lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False)
    return jax.tree.map(at, tree)


def _put(number: jax.Array, tree: Rows, row: Rows) -> Rows:
    """Returns a tree with the arrays of one layer replaced."""
    put = lambda leaf, row: lax.dynamic_update_index_in_dim(leaf, row, number, 0)
    return jax.tree.map(put, tree, row)

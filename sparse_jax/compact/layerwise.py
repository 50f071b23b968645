"""The compact tier of a few layers at a time: nothing dense, and nothing of size L."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast, final, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax.compact.channels import respond_by_channels
from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.compact.gradients import as_types, choose_if, update_if
from sparse_jax.compact.model_taps import TrainedValues, in_stack, tap_leaf
from sparse_jax.errors import InputError
from sparse_jax.models.attachment import (
    Arrays,
    Attachment,
    LayerValues,
    Recompute,
    Slots,
)
from sparse_jax.params.fields import require_word
from sparse_jax.params.positive import require_positive
from sparse_jax.samplers.registry import (
    SamplerOptions,
    make_sampler,
    num_active,
    require_no_measuring,
)
from sparse_jax.samplers.sampler import (
    Sampler,
    SamplerState,
    advance,
    begin,
    is_active,
    row_of_layers,
)
from sparse_jax.supports.masters import current_values, kept_of, value_of
from sparse_jax.supports.packing import route, write_back
from sparse_jax.supports.roles import (
    DENSE,
    SPARSE,
    TRAINED,
    Role,
    Roles,
    is_role,
    map_roles,
    sides_of,
)
from sparse_jax.transforms.layer_state import (
    init_rows,
    put_rows,
    restart_rows,
    row_norms,
    take_rows,
    update_rows,
)

__all__ = ["Layerwise", "LayerwiseState"]


class LayerwiseState(NamedTuple):
    """The optimizer state of a `CompactState` that trains a few layers at a time."""

    sampler: SamplerState
    rows: optax.OptState  # every array has the layers that are ever active in front
    outside: optax.OptState  # of trained leaves outside the layers
    origin: (
        optax.Params
    )  # values before training, if probes have to damp what was learned


class _Values(NamedTuple):
    """The trained values of an update."""

    outside: optax.Params  # packed values of leaves outside the layers
    rows: TrainedValues  # of the active layers


@final
@dataclass(frozen=True, kw_only=True)
class Layerwise(Tuner):
    """Fine-tunes a few layers at a time by a method.

    With A the layers that `sampler` draws for an update,

        values_l, state_l = tx(d loss / d values_l, state_l, values_l)    for l in A,

    where `values_l` is whatever the method trains in layer l: packed entries, the
    arrays it adds, whole leaves. Gradients are of size (num_active, ...), frozen layers
    keep nothing for a weight gradient, there is no backward pass below the lowest
    active layer, and one compiled step serves all choices of layers. The numbers are
    those of `ist` with the same sampler and key.

    Leaves outside the stack are trained at every update. `tx` sees one layer at a
    time, and all leaves outside as one; use `max_norm` to clip.

    A sampler that probes damps what a layer has learned: it scales what the method
    adds, and moves trained entries back to where they started. This keeps the starting
    values, in the dtype of the parameters: for whole leaves a second copy of them.
    Probes use the (first micro-)batch of the update, without dropout; the released
    code draws another training batch.

    Attributes:
      sampler: which layers are active: an object, or a name such as "ist", which
        then trains a quarter of the layers.
      seed: of the draws.
      max_norm: global norm that the gradient is clipped to, active layers and outside
        leaves together; None does not clip.
      restart: whether a layer that was not active at the last update starts with a
        fresh state of `tx`.
      recompute: which layers run forward again in the backward pass: "none", the
        "frozen" ones, which then keep nothing but their input, or "all".

    Example:
      >>> from sparse_jax import LoRA, Uniform
      >>> Layerwise(lambda *_: (0.0, 1), LoRA(rank=4), optax.adam(1e-3),
      ...           sampler=Uniform(num_layers=12, num_active=3)).recompute
      'none'

    References:
      Yao et al., 2024, https://arxiv.org/abs/2410.11772
    """

    sampler: Sampler | str
    seed: int = 0
    max_norm: float | None = None
    restart: bool = False
    recompute: Recompute = "none"

    def __post_init__(self):
        super().__post_init__()
        if self.method.stack is None:
            raise InputError(
                "`stack` of the method must name the subtree of the layers, got None."
            )
        require_no_measuring(self.sampler)
        require_word("recompute", self.recompute, get_args(Recompute))
        if self.max_norm is not None:
            require_positive("max_norm", self.max_norm, "Leave it out not to clip.")

    def sampler_for(self, params: optax.Params) -> Sampler:
        """Returns the sampler of the layers of some parameters."""
        if isinstance(self.sampler, Sampler):
            return self.sampler
        leaves = jax.tree.leaves(in_stack(self.method, params))
        number = leaves[0].shape[0] if leaves else 1
        active = num_active(SamplerOptions.active, number)
        return make_sampler(self.sampler, num_layers=number, num_active=active)

    @property
    def whole_tx(self) -> optax.GradientTransformation:
        """The transformation of all trained values at once, which clips them."""
        if self.max_norm is None:
            return self.tx
        return optax.chain(optax.clip_by_global_norm(self.max_norm), self.tx)

    def init(
        self,
        params: optax.Params,
        key: jax.Array,
        capacity: Mapping[str, int] | None = None,
    ) -> CompactState:
        """Returns the state before the selection, as `Compact.init`."""
        stack, sampler = self.method.stack, self.sampler_for(params)
        layers = jax.tree.leaves(in_stack(self.method, params))
        numbers = {leaf.shape[:1] for leaf in layers}
        if numbers != {(sampler.num_layers,)}:
            found = sorted(number for shape in numbers for number in shape)
            raise InputError(
                f"`num_layers` of the sampler must be the first axis of all leaves of "
                f"`{stack}`, got {sampler.num_layers} where they have {found}. "
                "Name the subtree of the layers by `stack` of the method."
            )
        return super().init(params, key, capacity)

    def step(
        self, state: CompactState, batch: object, key: jax.Array, **extra_args: object
    ) -> tuple[CompactState, dict[str, jax.Array]]:
        """Makes one update.

        The arguments are those of `Compact.step`; every layer gets the `extra_args`.

        Returns:
          The new state, and `loss`, `gradient_norm` (before clipping), `is_skipped`
          as of `Compact`, `active`, the layers updated, int32, and what the sampler
          has to show.
        """
        self._require_state(state)
        roles = self.roles(state.params)
        opt = cast(LayerwiseState, state.opt_state)
        rule = self.sampler_for(state.params)
        value_fn = lambda strength: self._value(roles, state, batch, strength)
        before = is_active(rule, opt.sampler.active)
        chosen = advance(rule, opt.sampler, value_fn)
        active = chosen.active
        values = self._values(roles, state, active)
        tapped = lambda values: self._tapped(roles, state, values, active)
        loss, mean = self._gradients(tapped, values, batch, key)
        grads = mean()
        norm = optax.tree.norm(grads)
        if self.max_norm is not None:
            grads = optax.tree.scale(jnp.minimum(1.0, self.max_norm / norm), grads)

        # What is taken out of the stacks for the update waits for the gradients: the
        # compiler of TPUs would keep it through both passes.
        active, norm = lax.optimization_barrier((active, norm))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        ready = finite & jnp.greater_equal(state.count, 0)
        values = self._values(roles, state, active)
        inside = values.rows._asdict()
        at = row_of_layers(rule)[active]
        rows = take_rows(opt.rows, at)
        if self.restart:
            is_new = (is_active(rule, active) & ~before)[active]
            fresh = init_rows(self._tx, inside, rule.num_active)
            rows = restart_rows(is_new, fresh, rows)
        row_grads = grads.rows._asdict()
        steps, moved = update_rows(self._tx, row_grads, rows, inside, **extra_args)
        rows = as_types(moved, rows)
        norms = row_norms(row_grads, rule.num_active)
        memory = rule.observe(chosen.memory, active, norms)
        # Nothing is chosen of the states: where nothing is ready they are not written.
        # For a choice or a branch, compilers of TPUs keep the rows of all leaves.
        inside, sampler = choose_if(
            ready,
            (optax.apply_updates(inside, steps), chosen._replace(memory=memory)),
            (inside, opt.sampler),
        )
        kept = (state.count, values.outside, opt.outside)
        count, beyond, outside = update_if(
            ready, self._tx, grads.outside, *kept, **extra_args
        )
        values = _Values(beyond, TrainedValues(**inside))
        rows = put_rows(opt.rows, rows, at, ready)
        opt = opt._replace(sampler=sampler, rows=rows, outside=outside)
        state = self._written(roles, state, values, active)
        state = state._replace(count=count, opt_state=opt)
        metrics = {"loss": loss, "gradient_norm": norm, "is_skipped": ~ready}
        return state, metrics | {"active": active} | rule.shown(sampler.memory)

    def _start(
        self, roles: Roles, params: optax.Params, values: TrainedValues
    ) -> LayerwiseState:
        """Returns the state before the first update."""
        pick = lambda roles: map_roles(keep, roles, values.leaves, only=TRAINED)
        keep = lambda role, leaf: leaf
        layers, beyond = sides_of(roles)
        inside, rule = pick(layers), self.sampler_for(params)
        origin: optax.Params = ()
        if rule.period is not None:
            # A copy, because the step gives away what it gets.
            start = lambda role, values, leaf: jnp.array(values, leaf.dtype)
            origin = map_roles(start, layers, inside, params, only=TRAINED)
        rows, reachable = values._replace(leaves=inside)._asdict(), rule.reachable
        if len(reachable) < rule.num_layers:
            rows = take_rows(rows, jnp.array(reachable, jnp.int32))
        return LayerwiseState(
            sampler=begin(rule, jax.random.key(self.seed)),
            rows=init_rows(self._tx, rows, len(reachable)),
            outside=self._tx.init(pick(beyond)),
            origin=origin,
        )

    def _values(
        self, roles: Roles, state: CompactState, active: jax.Array
    ) -> "_Values":
        """Returns the trained values of the active layers, and those outside."""

        def row(
            role: Role, leaf: jax.Array, support: jax.Array, master: jax.Array
        ) -> jax.Array:
            def read() -> jax.Array:
                if role.kind == DENSE:
                    return take_rows(leaf, active)
                return role.layout.gather(leaf, take_rows(support, active), active)

            return value_of(take_rows(master, active), read)

        inside, outside = sides_of(roles)
        trees = (state.params, state.support, state.masters)
        rows = map_roles(row, inside, *trees, only=TRAINED)
        values = current_values(outside, state.support, state.masters, state.params)
        return _Values(values, TrainedValues(take_rows(state.added, active), rows))

    def _tapped(
        self, roles: Roles, state: CompactState, values: "_Values", active: jax.Array
    ) -> tuple[optax.Params, Attachment]:
        """Returns parameters and an attachment whose taps lead to the values."""

        def row_of(role: Role, leaf: jax.Array, support: jax.Array) -> jax.Array:
            # The values of sparse entries are in the weights; a tap does not read them.
            if role.kind == SPARSE:
                shape = role.layout.packed_shape(support.shape, leaf.shape)
                return jnp.zeros(shape, jnp.float32)
            return leaf.astype(jnp.float32)

        def rows_of(params: Arrays, layer: LayerValues) -> LayerValues:
            leaves = map_roles(row_of, inside, params, layer.support, only=TRAINED)
            return LayerValues(layer.added, {**nothing, stack: leaves})

        def weight(
            role: Role, leaf: jax.Array, row: jax.Array, support: jax.Array
        ) -> jax.Array:
            if role.kind == SPARSE:
                return tap_leaf(role, leaf, row, support)
            return row.astype(leaf.dtype) if role.kind == DENSE else leaf

        weights = lambda layer_params, layer: map_roles(
            weight, inside, layer_params, leaves_of(layer), layer.support
        )
        inside = in_stack(self.method, roles)
        leaves_of = lambda layer: in_stack(self.method, layer.leaves)
        stack = cast(str, self.method.stack)  # as required when the tuner is made
        nothing = jax.tree.map(lambda _: optax.MaskedNode(), roles, is_leaf=is_role)
        layers = LayerValues(state.added, support=in_stack(self.method, state.support))
        slots = Slots(LayerValues(*values.rows), active, rows_of, self.recompute)
        outside = (sides_of(roles)[1], state.params, tap_leaf)
        params, _ = route(*outside, values.outside, state.support)
        response = respond_by_channels(self.method, inside, leaves_of)
        return params, Attachment(layers, weights, response, slots)

    def _value(
        self, roles: Roles, state: CompactState, batch: object, strength: jax.Array
    ) -> jax.Array:
        """Returns the loss when layers are damped to a strength [L]."""
        opt = cast(LayerwiseState, state.opt_state)

        def weights(layer_params: Arrays, layer: LayerValues) -> Arrays:
            def damp(
                role: Role, leaf: jax.Array, support: jax.Array, origin: jax.Array
            ) -> jax.Array:
                if role.kind not in TRAINED:
                    return leaf
                start = origin.astype(jnp.float32)
                now = role.read(leaf, support).astype(jnp.float32)
                return role.write(leaf, support, start + layer.factor * (now - start))

            trees = (layer_params, layer.support, layer.leaves)
            return map_roles(damp, inside, *trees)

        inside = in_stack(self.method, roles)
        origin, support = opt.origin, state.support
        origin, support = (in_stack(self.method, tree) for tree in (origin, support))
        layers = LayerValues(state.added, origin, support, strength)
        attachment = Attachment(layers, weights, self.method.respond)
        first, _ = self.first(batch, jax.random.key(0))
        total, weight = self.loss(state.params, first, None, attachment)
        return total / weight

    def _written(
        self, roles: Roles, state: CompactState, values: "_Values", active: jax.Array
    ) -> CompactState:
        """Returns the state with new values, in place if it is donated."""
        rows, beyond = values.rows, values.outside

        def write(
            role: Role, leaf: jax.Array, support: jax.Array, row: jax.Array
        ) -> jax.Array:
            if role.kind == SPARSE:
                taken = take_rows(support, active)
                return role.layout.scatter(leaf, taken, row, active)
            if role.kind == DENSE:
                return put_rows(leaf, row.astype(leaf.dtype), active)
            return leaf

        def keep(
            role: Role,
            leaf: jax.Array,
            master: jax.Array,
            row: jax.Array,
            value: jax.Array,
        ) -> jax.Array:
            if isinstance(master, optax.MaskedNode):
                return master
            value = row if role.stacked else value
            kept = kept_of(value, leaf.dtype, self.split_masters)
            return put_rows(master, kept, active) if role.stacked else kept

        inside, outside = sides_of(roles)
        params = write_back(outside, state.params, state.support, beyond)
        trees = (state.params, state.masters, rows.leaves, beyond)
        return state._replace(
            params=map_roles(write, inside, params, state.support, rows.leaves),
            masters=map_roles(keep, roles, *trees, only=TRAINED),
            added=put_rows(state.added, rows.added, active),
        )

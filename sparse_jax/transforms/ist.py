"""IST: update a few layers at a time, as an Optax transformation."""

from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax

from sparse_jax.errors import InputError
from sparse_jax.params.arguments import require_key, require_transformation
from sparse_jax.params.names import Rule, Tree
from sparse_jax.samplers.importance import Importance
from sparse_jax.samplers.registry import make_sampler, require_no_measuring
from sparse_jax.samplers.sampler import (
    Sampler,
    SamplerState,
    ValueFn,
    advance,
    begin,
    is_active,
)
from sparse_jax.transforms.layer_state import (
    init_rows,
    put_rows,
    restart_rows,
    take_rows,
    update_rows,
    where,
)
from sparse_jax.transforms.layers import (
    LAYER,
    OUTSIDE,
    STACKED,
    LayerOf,
    Place,
    is_place,
    places_of,
    places_only,
)

__all__ = ["IstState", "ist", "ist_value_fn"]


Params = TypeVar("Params")
Rest = ParamSpec("Rest")  # what a loss takes beside the parameters


class IstState(NamedTuple):
    """State of `ist`."""

    sampler: SamplerState  # count, key, active layers, importance
    stacked: optax.OptState  # of leaves [L, ...]: every array has the layers in front
    layers: tuple[optax.OptState, ...]  # of leaves that belong to one layer, L of them
    outside: optax.OptState  # of leaves that are updated always


def ist(
    inner: optax.GradientTransformation,
    *,
    layer_of: LayerOf,
    num_layers: int,
    num_active: int,
    key: jax.Array,
    probe_every: int = Importance.probe_every,
    num_probes: int | None = None,
    num_suppressed: int | None = None,
    suppression: float = Importance.suppression,
    importance_rate: float = Importance.importance_rate,
    sampler: str | Sampler = "ist",
    always_on: Rule | None = None,
    hold: int = Sampler.hold,
    restart: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Updates a few layers at a time, drawn by importance for the loss.

    With A_t the `num_active` layers drawn for update t,

        params_l, state_l = inner(grads_l, state_l, params_l)    for l in A_t,

    and the parameters, moments and counts of every other layer do not change by a bit,
    even with weight decay. See `Importance` for how layers are drawn.

    Every layer has a state of `inner` of its own, so its Adam counts its updates.
    Schedules count the updates of the model. `inner` sees one layer at a time: clip by
    the global norm outside, `chain(clip_by_global_norm(1.0), ist(...))`, which then
    reads the gradients of frozen layers too.

    The gradients of all layers are computed before they get here; only the compact
    tier saves computing those of frozen layers.

    Args:
      inner: what to do with the active layers.
      layer_of: which layer a leaf belongs to: a regular expression searched for in the
        leaf names, whose group is the number of the layer (`layers/(\d+)/`), or that
        has no group and matches stacks of shape (L, ...) (`^layers/`); or a function
        of the name that returns the number, or None outside the layers.
      num_layers: L.
      num_active: layers updated at a time. The paper takes a quarter.
      key: PRNG key of draws and probes.
      probe_every: updates between two probes.
      num_probes: subsets of layers damped in a probe, one loss each; None is 3, or
        all subsets if there are fewer, as for two layers.
      num_suppressed: layers damped in a subset; None is half of them, but at least 1.
      suppression: what is left of the response of a damped layer.
      importance_rate: how far a probe moves the importance.
      sampler: a name, such as "ist", "uniform", "cyclic" or
        "norm", or any `Sampler`, which brings its own numbers with it.
      always_on: expressions of leaves that are updated always. None takes those
        outside the layers, such as a classifier; `()` freezes them.
      hold: updates that a choice of layers is kept for.
      restart: whether a layer that was not active at the last update starts with a
        fresh state of `inner`, as in BAdam.

    Returns:
      A transformation. With "ist", `update` needs `value_fn=`, which maps a strength
      of shape (L,) to the loss when layer l adds strength[l] times what it learned;
      it is called `num_probes` times in an update that probes, and not in others;
      `ist_value_fn` makes one from a loss.
      `state.sampler` has `active` and `memory.importance`.

    Raises:
      InputError: if an argument breaks its rule, or (in `init`) leaves and layers do
        not fit together.

    Example:
      >>> params = {"layers": jnp.ones((4, 2))}
      >>> tx = ist(optax.adamw(0.1), layer_of="layers", num_layers=4, num_active=1,
      ...          key=jax.random.key(0))
      >>> value_fn = lambda strength: jnp.sum(strength)
      >>> updates, state = tx.update(params, tx.init(params), params, value_fn=value_fn)
      >>> jnp.any(updates["layers"] != 0, axis=1).sum(), state.sampler.active.shape
      (Array(1, dtype=int32), (1,))

    References:
      Yao et al., 2024, https://arxiv.org/abs/2410.11772, and `ist.py` of the released
      code.
    """
    require_transformation("inner", inner)
    require_key("key", key)
    tx = optax.with_extra_args_support(inner)
    require_no_measuring(sampler)
    sizes = {"num_layers": num_layers, "num_active": num_active, "hold": hold}
    rule = (
        _require_same_sizes(sampler, **sizes)
        if isinstance(sampler, Sampler)
        else make_sampler(
            sampler,
            **sizes,
            probe_every=probe_every,
            num_probes=num_probes,
            num_suppressed=num_suppressed,
            suppression=suppression,
            importance_rate=importance_rate,
        )
    )

    def init_fn(params: optax.Params) -> IstState:
        places = places_of(params, layer_of, num_layers, always_on)
        only = lambda kind, layer=-1: places_only(params, places, kind, layer)
        return IstState(
            sampler=begin(rule, key),
            stacked=init_rows(tx, only(STACKED), num_layers),
            layers=tuple(tx.init(only(LAYER, layer)) for layer in range(num_layers)),
            outside=tx.init(only(OUTSIDE)),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value_fn: ValueFn | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, IstState]:
        places = places_of(updates, layer_of, num_layers, always_on)
        before = is_active(rule, state.sampler.active)
        chosen = advance(rule, state.sampler, value_fn)
        on = is_active(rule, chosen.active)
        is_new = on & ~before

        def split(
            kind: str, layer: int = -1
        ) -> tuple[optax.Updates, optax.Params | None]:
            grads = places_only(updates, places, kind, layer)
            if params is None:
                return grads, None
            return grads, places_only(params, places, kind, layer)

        def stack() -> tuple[optax.Updates, optax.OptState]:
            grads, values = split(STACKED)
            if not jax.tree.leaves(grads):
                return grads, state.stacked
            take = lambda tree: take_rows(tree, chosen.active)
            row_grads, rows, values = take(grads), take(state.stacked), take(values)
            if restart:
                start = row_grads if values is None else values
                fresh = init_rows(tx, start, num_active)
                rows = restart_rows(is_new[chosen.active], fresh, rows)
            steps, after = update_rows(tx, row_grads, rows, values, **extra_args)
            zeros = jax.tree.map(
                lambda leaf, step: jnp.zeros_like(leaf, step.dtype), grads, steps
            )
            return (
                put_rows(zeros, steps, chosen.active),
                put_rows(state.stacked, after, chosen.active),
            )

        def layer(number: int) -> tuple[optax.Updates, optax.OptState]:
            grads, values = split(LAYER, number)
            kept = state.layers[number]
            if restart:
                fresh = tx.init(grads if values is None else values)
                kept = where(~is_new[number], kept, fresh)
            step, after = tx.update(grads, kept, values, **extra_args)
            step = jax.tree.map(lambda leaf: jnp.where(on[number], leaf, 0), step)
            return step, where(on[number], after, state.layers[number])

        stacked_steps, stacked_state = stack()
        pairs = [layer(number) for number in range(num_layers)]
        grads, values = split(OUTSIDE)
        outside_steps, outside = tx.update(grads, state.outside, values, **extra_args)
        steps = [stacked_steps, outside_steps, *(step for step, _ in pairs)]
        norms = _norms(rule, updates, places, chosen.active)
        memory = rule.observe(chosen.memory, chosen.active, norms)
        return _joined(updates, steps), IstState(
            sampler=chosen._replace(memory=memory),
            stacked=stacked_state,
            layers=tuple(after for _, after in pairs),
            outside=outside,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ist_value_fn(
    loss: Callable[Concatenate[Params, Rest], jax.Array],
    start: Params,
    *,
    layer_of: LayerOf,
    always_on: Rule | None = None,
) -> Callable[Concatenate[Params, Rest], ValueFn]:
    """Returns what makes the `value_fn` of `ist` from a loss.

        value_fn(strength) = loss(start_l + strength_l * (params_l - start_l), ...)

    for every layer l; leaves outside the layers are those of `params`.

    Args:
      loss: (params, *args, **kwargs) -> loss, the one that is trained.
      start: the parameters before training. Copy them if the step donates its own.
      layer_of, always_on: as given to `ist`.

    Returns:
      A function of the parameters of an update, and of whatever else `loss` takes,
      that returns a function of the strength, shape=(L,).

    Example:
      >>> start = {"layers": jnp.ones((4, 2))}
      >>> loss = lambda params, scale: scale * jnp.sum(params["layers"])
      >>> value_fn = ist_value_fn(loss, start, layer_of="^layers")
      >>> now = {"layers": jnp.full((4, 2), 3.0)}
      >>> value_fn(now, 2.0)(jnp.array([1.0, 0.0, 1.0, 0.5]))  # rows of 3, 1, 3 and 2
      Array(36., dtype=float32)
    """

    def at(params: Params, *args: Rest.args, **kwargs: Rest.kwargs) -> ValueFn:
        def value_fn(strength: jax.Array) -> jax.Array:
            places = places_of(params, layer_of, strength.shape[0], always_on)

            def damp(place: Place, now: jax.Array, start: jax.Array) -> jax.Array:
                if place.kind not in (STACKED, LAYER):
                    return now
                s = strength if place.kind == STACKED else strength[place.layer]
                s = s.reshape(s.shape + (1,) * (now.ndim - s.ndim))
                first, last = (
                    leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
                    for leaf in (start, now)
                )
                # At strength 1 it is the layer itself, to the last bit.
                return jnp.where(s == 1, last, first + s * (last - first)).astype(
                    now.dtype
                )

            damped = jax.tree.map(damp, places, params, start, is_leaf=is_place)
            return loss(damped, *args, **kwargs)

        return value_fn

    return at


def _require_same_sizes(
    sampler: Sampler, num_layers: int, num_active: int, hold: int
) -> Sampler:
    """Returns a sampler whose numbers are those of the other arguments."""
    given = {"num_layers": num_layers, "num_active": num_active}
    for name, value in given.items():
        if getattr(sampler, name) != value:
            raise InputError(
                f"`{name}` must be {getattr(sampler, name)} as in `sampler`, got "
                f"{value}."
            )
    if hold not in (1, sampler.hold):
        raise InputError(
            f"`hold` must be {sampler.hold} as in `sampler`, got {hold}. Leave it out."
        )
    return sampler


def _joined(updates: optax.Updates, steps: list[optax.Updates]) -> optax.Updates:
    """Returns the one tree whose leaves the others share out; zeros elsewhere."""

    def join(update: jax.Array, *parts: jax.Array | optax.MaskedNode) -> jax.Array:
        found = [part for part in parts if not isinstance(part, optax.MaskedNode)]
        return found[0] if found else jnp.zeros_like(update)

    return jax.tree.map(join, updates, *steps)


def _norms(
    rule: Sampler, updates: optax.Updates, places: Tree[Place], active: jax.Array
) -> jax.Array:
    """Returns the norms of the gradients of the active layers, if the rule asks."""
    squares = jnp.zeros(rule.num_layers, jnp.float32)
    if rule.needs_norms:
        of = jax.tree.leaves(places, is_leaf=is_place)
        for place, leaf in zip(of, jax.tree.leaves(updates), strict=True):
            square = jnp.square(leaf.astype(jnp.float32))
            if place.kind == STACKED:
                squares += jnp.sum(square.reshape(rule.num_layers, -1), axis=1)
            elif place.kind == LAYER:
                squares = squares.at[place.layer].add(jnp.sum(square))
    return jnp.sqrt(squares[active])

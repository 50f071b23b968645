"""SIFT: train the entries with the largest gradients, as an Optax transformation."""

import logging
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.params.arguments import (
    require_key,
    require_one_device_view,
    require_transformation,
)
from sparse_jax.params.names import Rule
from sparse_jax.supports.granularity import ENTRY, granularity_named
from sparse_jax.supports.layout import Layout, require_density
from sparse_jax.supports.masters import current_values, keep_masters
from sparse_jax.supports.packing import (
    pack,
    rounded_step,
    unpack,
    value_dtype,
    zeros_like,
)
from sparse_jax.supports.roles import (
    DENSE,
    SPARSE,
    TRAINED,
    Role,
    Roles,
    map_roles,
    roles_of,
)
from sparse_jax.supports.scores import SCORES, Score, leaf_key, score_named
from sparse_jax.transforms.adam_8bit import decoded
from sparse_jax.transforms.carry import carry_state, carry_values, origins_of
from sparse_jax.transforms.selections import Selections
from sparse_jax.transforms.torch_sift import torch_sift

__all__ = ["SiftState", "sift"]

_log = logging.getLogger(__name__)

_PARAMS_MISSING = (
    "`params` must be passed to `update`, got None. `sift` reads the current values "
    "of the entries it trains."
)


class SiftState(NamedTuple):
    """State of `sift`. Leaves that are not concerned hold `optax.MaskedNode()`."""

    count: jax.typing.ArrayLike  # shape=(), int32: gradients accepted
    skipped: jax.typing.ArrayLike  # shape=(), int32: non-finite gradients skipped
    support: optax.Params  # sparse leaves: shape=(k,) or (L, k), int32; see `Layout`
    masters: optax.Updates  # trained leaves below float32: their float32 values
    summed: optax.Updates  # sparse leaves if select_batches > 1: float32 gradients
    inner_state: optax.OptState


def sift(
    inner: optax.GradientTransformation | None = None,
    density: float | Fraction = 0.01,
    *,
    where: Rule | None = None,
    dense: Rule | None = None,
    score: str | Score | Callable[..., jax.Array] = "gradient",
    select_after: int = 0,
    select_batches: int = 1,
    reselect_every: int | None = None,
    reselect_state: Literal["carry", "restart"] = "carry",
    stacked: Rule | None = None,
    key: jax.Array | None = None,
    compat: Literal["torch-sift"] | None = None,
    granularity: str | Layout = "entry",
) -> optax.GradientTransformationExtraArgs:
    r"""Trains only the entries of each array with the largest gradients.

    With g_t the incoming update of one array of n entries, k = ceil(density * n), and
    S the positions of the k largest |g| of the first gradient,

        w_{t+1}[S] = w_t[S] + inner(g_t[S]),      w_{t+1} = w_t elsewhere.

    `inner` sees float32 vectors of k entries, so its state is O(k), and whatever it
    does (including weight decay) stays inside S. Entries outside S and frozen leaves
    get an update of exactly zero. With `inner=None` the masked gradient is passed on.

    A transformation that treats matrices differently from vectors (muon, factored
    adafactor, shampoo, galore) treats everything as vectors here; `init` warns of it.
    Inside `jax.shard_map` every shard gets a support of its own, with
    `check_vma=False`.

    Differs from the released code: the gradient that selects is also used, updates
    are applied at once, weight decay acts, and parameters below float32 keep float32
    masters (`compat="torch-sift"` restores the original behavior).

    Args:
      inner: transformation of the packed gradients, or None to only mask.
      density: fraction of entries trained in each array, in (0, 1].
      where: regular expressions, searched for in the leaf names (`layers/0/kernel`),
        of the leaves trained sparsely; None means all that are not `dense`.
      dense: expressions of the leaves trained in full, such as the classifier. It
        wins over `where`. Everything else is frozen.
      score: what to rank by: "gradient", "lift", another word of docs/scores.md or of
        `register_score`, or a function (gradient, param[, key]) -> scores of the same
        shape, of which the largest magnitudes win. Static under `inject_hyperparams`.
      select_after: updates of the `dense` leaves alone before the selection, for which
        `inner` sees zeros elsewhere. At the selection all of its state starts again.
      select_batches: gradients summed (of "fisher" squares) for the selection; nothing
        moves meanwhile. More than one keeps a dense float32 sum in the state.
      reselect_every: updates between two selections; None selects once, which the
        paper does and later studies confirm (arXiv 2412.13488).
      reselect_state: what re-selection does to the state of `inner`. "carry": entries
        that stay keep theirs and new ones start fresh while counts run on, so that
        Adam's first steps on a new entry are up to 3 times too long. "restart": all
        of it is initialized again, counts included.
      stacked: expressions of the leaves whose first axis counts layers; each layer
        then gets a support of its own.
      key: PRNG key, needed by a score that draws, such as "random".
      compat: "torch-sift" reproduces the released PyTorch code update by update.
      granularity: "entry", or "lane" to choose as many entries of every 128 rows of a
        column, ceil(128 * density), which a TPU reaches without gather or scatter:
        `inner` then sees arrays of shape (m, rows / 128, columns), of a stack with L
        in front. Or blocks: "row", "column", "4x4", "256x256", a `Blocks`.

    Returns:
      A transformation whose updates have the shapes and dtypes of the gradients. For
      parameters below float32 the update is master minus parameter, so adding it
      gives the rounded master. Gradients that are not finite are skipped and counted
      while they would decide a selection.

    Raises:
      InputError: if an argument breaks its rule, or (in `init`) an expression matches
        no leaf, or a leaf cannot be trained by lanes.

    Example:
      >>> params = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}
      >>> tx = sift(optax.sgd(1.0), density=0.5)
      >>> grads = {"w": jnp.array([0.1, -0.4, 0.3, 0.2])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["w"], state.support["w"]
      (Array([ 0. ,  0.4, -0.3,  0. ], dtype=float32), Array([1, 2], dtype=int32))

    References:
      Song et al., 2024, https://arxiv.org/abs/2312.11875, and `sift/sift.py` of the
      released code.
    """
    density = require_density(density)
    if inner is not None:
        require_transformation("inner", inner)
    if key is not None:
        require_key("key", key)
    rank, layout = score_named(score), granularity_named(granularity)
    selections = Selections(select_after, select_batches, reselect_every)
    selections.require()
    if reselect_state not in ("carry", "restart"):
        raise InputError(
            f"`reselect_state` must be 'carry' or 'restart', got {reselect_state!r}."
        )
    if rank.needs_key and key is None:
        raise InputError(
            f"`key` must be given when `score` is {score!r}, got None. Pass "
            "`key=jax.random.key(seed)`."
        )
    if compat is not None:
        kept = rank == SCORES["gradient"] and layout == ENTRY
        given = (score, *selections, granularity)
        is_default = kept and selections == Selections()
        original = _require_original(compat, inner, () if is_default else given)
        return torch_sift(original, density, where=where, dense=dense, stacked=stacked)

    # Without an inner transformation nothing is known of the step, so there is no
    # value to keep a master of.
    has_masters = inner is not None
    tx = optax.with_extra_args_support(optax.identity() if inner is None else inner)
    # Only a score that draws looks at the key.
    base_key = jax.random.key(0) if key is None else key

    def masters_of(
        roles: Roles, values: optax.Params, params: optax.Params
    ) -> optax.Params:
        kept = keep_masters(roles, values, params)
        return kept if has_masters else map_roles(lambda role: role, roles, only=())

    def roles_in(tree: optax.Params) -> Roles:
        rules = {"where": where, "dense": dense, "stacked": stacked}
        return roles_of(tree, **rules, layout=layout, score=rank)

    def init_fn(params: optax.Params) -> SiftState:
        roles = roles_in(params)
        selections.require_roles(roles)

        empty = lambda role, leaf: layout.empty(
            leaf.shape, layout.size(density, role.shape), stacked=role.stacked
        )
        zeros = lambda role, leaf: jnp.zeros_like(leaf, value_dtype(leaf))
        packed = lambda role, leaf, support: (
            zeros(role, leaf)
            if role.kind == DENSE
            else jnp.zeros(
                layout.packed_shape(support.shape, role.shape), value_dtype(leaf)
            )
        )
        summed = (SPARSE,) if select_batches > 1 else ()
        support = map_roles(empty, roles, params, only=(SPARSE,))
        # Only shapes matter here, the values come with the first selection: `init`
        # accepts abstract parameters.
        values = map_roles(packed, roles, params, support, only=TRAINED)
        if _looks_at_shapes(tx, roles, params, values):
            _log.warning(
                "`inner` treats matrices otherwise than vectors; `sift` gives it the "
                "entries that are trained as vectors"
            )
        return SiftState(
            count=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            support=support,
            masters=masters_of(roles, values, params),
            summed=map_roles(zeros, roles, params, only=summed),
            inner_state=tx.init(values),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, SiftState]:
        if params is None:
            if has_masters or rank.needs_param:
                raise ValueError(_PARAMS_MISSING)
            params = updates
        require_one_device_view("updates", updates)
        roles = roles_in(updates)
        collecting, due = selections.at(state.count)

        added = lambda role, leaf: rank.added(leaf, role.stacked)
        scored = lambda: map_roles(added, roles, updates, only=(SPARSE,))

        def skip() -> tuple[optax.Updates, SiftState]:
            zeros = zeros_like(updates)
            return zeros, state._replace(skipped=optax.safe_increment(state.skipped))

        def accept() -> tuple[optax.Updates, SiftState]:
            ready = state._replace(
                count=optax.safe_increment(state.count),
                summed=_sum(roles, state.summed, scored(), collecting),
            )
            same = lambda ready: ready
            if select_after:
                ready = lax.cond(state.count == 0, begin, same, ready)
            ready = lax.cond(due, reselect, same, ready)
            if select_batches == 1:
                return move(ready)
            return lax.cond(selections.waits(state.count), wait, move, ready)

        def begin(ready: SiftState) -> SiftState:
            values = shown(pack(roles, ready.support, params))
            masters = masters_of(roles, values, params)
            return ready._replace(masters=masters, inner_state=tx.init(values))

        def shown(packed: optax.Params) -> optax.Params:
            if not select_after:
                return packed
            chosen = selections.selected(state.count)
            show = lambda role, value: (
                jnp.where(chosen, value, 0) if role.kind == SPARSE else value
            )
            return map_roles(show, roles, packed, only=TRAINED)

        def reselect(ready: SiftState) -> SiftState:
            draw = jax.random.fold_in(base_key, state.count)

            def choose(role: Role, gradient: jax.Array, param: jax.Array) -> jax.Array:
                k, own = layout.size(density, role.shape), leaf_key(draw, role.name)
                args = (rank, gradient, param, k, own)
                return layout.choose(*args, stacked=role.stacked)[0]

            source = scored() if select_batches == 1 else ready.summed
            support = map_roles(choose, roles, source, params, only=(SPARSE,))
            values = pack(roles, support, params)
            kept = (values, tx.init(values))
            if reselect_every is not None:
                again = jnp.asarray(state.count) >= select_after + select_batches
                kept = lax.cond(again, carry, lambda support, kept: kept, support, kept)
            values, inner_state = kept
            return ready._replace(
                support=support,
                masters=masters_of(roles, values, params),
                summed=jax.tree.map(jnp.zeros_like, ready.summed),
                inner_state=inner_state,
            )

        def carry(
            support: optax.Params, fresh: tuple[optax.Params, optax.OptState]
        ) -> tuple[optax.Params, optax.OptState]:
            values, inner_state = fresh
            origins = origins_of(roles, state.support, support)
            if has_masters:
                values = carry_values(roles, origins, state.masters, values)
            if reselect_state == "carry":
                inner_state = carry_state(tx, origins, state.inner_state, inner_state)
            return values, inner_state

        def wait(ready: SiftState) -> tuple[optax.Updates, SiftState]:
            return zeros_like(updates), ready

        def move(ready: SiftState) -> tuple[optax.Updates, SiftState]:
            grads = shown(pack(roles, ready.support, updates))
            if has_masters:
                values = current_values(roles, ready.support, ready.masters, params)
            else:
                values = pack(roles, ready.support, params)
            values = shown(values)
            step, inner_state = tx.update(
                grads, ready.inner_state, values, **extra_args
            )
            ready = ready._replace(inner_state=inner_state)
            if has_masters:
                values = optax.apply_updates(values, step)
                step = rounded_step(roles, ready.support, step, values, params)
                ready = ready._replace(masters=masters_of(roles, values, params))
            return unpack(roles, ready.support, updates, shown(step)), ready

        finite = lax.cond(collecting, lambda: _finite(roles, updates), lambda: True)
        return lax.cond(finite, accept, skip)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _looks_at_shapes(
    tx: optax.GradientTransformation,
    roles: Roles,
    params: optax.Params,
    values: optax.Params,
) -> bool:
    """Returns whether the state of packed matrices is other than packed state."""
    shape_of = lambda tree: map_roles(
        lambda role, value, leaf: (
            jax.ShapeDtypeStruct(value.shape, value_dtype(leaf))
            if role.kind == SPARSE and leaf.ndim > 1 + role.stacked
            else optax.MaskedNode()
        ),
        roles, tree, params, only=TRAINED,
    )  # fmt: skip

    def state_of(tree: object) -> tuple[object, list[tuple[int, ...]]]:
        shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]

        def owner(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
            ends = (shape for shape in shapes if leaf.shape[-len(shape) :] == shape)
            return next((leaf.shape[: -len(end)] for end in ends), leaf.shape + (0,))

        state = jax.eval_shape(lambda tree: decoded(tx.init(tree)), tree)
        return jax.tree.structure(state), [*map(owner, jax.tree.leaves(state))]

    return state_of(shape_of(params)) != state_of(shape_of(values))


def _require_original(
    compat: str, inner: optax.GradientTransformation | None, changed: tuple
) -> optax.GradientTransformation:
    """Returns `inner`, or raises if an argument is not one the released code has."""
    if compat != "torch-sift":
        raise InputError(f"`compat` must be 'torch-sift' or None, got {compat!r}.")
    if changed:
        raise InputError(
            "`score`, `select_after`, `select_batches`, `reselect_every` and "
            "`granularity` must keep their defaults with `compat='torch-sift'`, got "
            f"{changed}. The released code selects entries once, from one gradient."
        )
    if inner is None:
        raise InputError(
            "`inner` must be a transformation with `compat='torch-sift'`, got None. "
            "Pass `optax.adamw(learning_rate)`: the original delays its step."
        )
    return inner


def _finite(roles: Roles, updates: optax.Updates) -> jax.Array:
    """Returns whether every trained leaf is finite."""
    finite = lambda role, leaf: jnp.all(jnp.isfinite(leaf))
    checks = jax.tree.leaves(map_roles(finite, roles, updates, only=TRAINED))
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def _sum(
    roles: Roles, summed: optax.Updates, updates: optax.Updates, collecting: jax.Array
) -> optax.Updates:
    """Adds this gradient to the sums while a selection is being prepared."""
    if not jax.tree.leaves(summed):
        return summed
    add = lambda role, total, leaf: total + leaf.astype(total.dtype)
    added = lambda: map_roles(add, roles, summed, updates, only=(SPARSE,))
    return lax.cond(collecting, added, lambda: summed)

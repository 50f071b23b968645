"""The compact tier: a training step whose gradients are never dense."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, final

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax.adapter.adapter import Adapter, adapter_of
from sparse_jax.compact.by_batches import choose_by_batches, first_of, is_several
from sparse_jax.compact.checks import (
    Loss,
    require_groups,
    require_loss,
    require_same,
    sums_of,
)
from sparse_jax.compact.gradients import Values, as_types, summed_gradients
from sparse_jax.compact.model_taps import (
    Candidates,
    Chosen,
    TrainedValues,
    choose_by_gradient,
    choose_from,
    tap_leaves,
)
from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method
from sparse_jax.models.attachment import Added, Attachment, LayerValues
from sparse_jax.params.arguments import (
    require_count,
    require_key,
    require_transformation,
)
from sparse_jax.supports.layout import Shards
from sparse_jax.supports.masters import current_values, keep_masters
from sparse_jax.supports.packing import pack, write_back
from sparse_jax.supports.positions import fetch
from sparse_jax.supports.roles import SPARSE, TRAINED, Role, Roles, map_roles

__all__ = ["Compact", "CompactState", "Loss", "TrainedValues", "Tuner"]

Batch = TypeVar("Batch")


class CompactState(NamedTuple):
    """What a step reads and returns; donate it to `jax.jit`."""

    count: jax.typing.ArrayLike  # shape=(), int32: updates made; -1 before a selection
    params: optax.Params  # current parameters, in their own dtypes
    support: Any  # sparse leaves: shape=(k,) or (L, k), int32; see `Layout`
    masters: optax.Params  # trained leaves below float32: see `masters.py`
    added: Added  # arrays that the method adds, float32
    opt_state: optax.OptState  # of the trained values


class UnselectedState(CompactState):
    """A state whose supports hold nothing yet, which `step` refuses."""

    __slots__ = ()


@dataclass(frozen=True)
class Tuner(ABC):
    """What `Compact` and `Layerwise` have in common: all but the update itself.

    The attributes are those of `Compact`.
    """

    loss: Loss
    method: Method
    tx: optax.GradientTransformation
    accumulate: int = 1
    shards: Mapping[str, Shards] = field(default_factory=dict)
    data_axes: tuple[str, ...] = ()
    split_masters: bool = False

    def __post_init__(self):
        require_loss(self.loss)
        if not isinstance(self.method, Method):
            raise InputError(
                f"`method` must be a `Method`, got {self.method!r}. Pass one that is "
                "made, such as `Sparse(density=0.01)`."
            )
        require_transformation("tx", self.tx)
        require_count("accumulate", self.accumulate)

    def roles(self, params: optax.Params) -> Roles:
        """Returns the role of every leaf, with its layout as it is sharded.

        Raises:
          InputError: if the method does not fit the parameters, or their shards.
        """

        def sharded(role: Role, leaf: jax.Array) -> Role:
            layout = role.layout.sharded(self.shards.get(role.name))
            if role.kind == SPARSE:
                layout.require(role.name, leaf.shape[int(role.stacked) :])
            return role._replace(layout=layout)

        return map_roles(sharded, self.method.roles(params), params)

    def init(
        self,
        params: optax.Params,
        key: jax.Array,
        capacity: Mapping[str, int] | None = None,
    ) -> CompactState:
        """Returns the state before the selection, whose supports hold nothing.

        Args:
          params: parameters of the model.
          key: of the arrays that the method adds.
          capacity: room in the supports of shards, by name, as from the layouts.

        Raises:
          InputError: if the method does not fit the parameters.
        """
        require_key("key", key)
        roles = self.roles(params)

        def support(role: Role, leaf: jax.Array) -> jax.Array:
            room = (capacity or {}).get(role.name)
            options = {"stacked": role.stacked, "capacity": room}
            k = self.method.support_size(role)
            return role.layout.empty(leaf.shape, k, **options)

        empty = map_roles(support, roles, params, only=(SPARSE,))
        state = self.begin(params, empty, self.method.added(params, key))
        if not jax.tree.leaves(empty):
            return state
        # Where a compiled `select` returns it, only the count says what it is.
        return UnselectedState(*state._replace(count=jnp.full([], -1, jnp.int32)))

    def select(
        self,
        state: CompactState,
        batch: object,
        key: jax.Array,
        avoid: Mapping[str, jax.Array] | None = None,
    ) -> tuple[CompactState, jax.Array]:
        """Chooses the supports and resets the state of the optimizer.

        Args:
          state: as returned by `init`, or by `step` to select again.
          batch: the batch whose gradient decides; with accumulation its first
            micro-batch does, as in the released code. With N keys, N batches or
            micro-batches in leaves of shape (N, ...), whose gradients are summed.
          key: as for `step`, so that both see the same dropout; or shape=(N,).
          avoid: supports of entries that are not chosen, as of `entries_to_avoid`.

        Returns:
          The new state, and whether the gradient was finite. If it was not, the
          state is as before: try another batch. Without a selection every step skips.
        """
        support, finite, _ = self.choose(state, batch, key, avoid)
        chosen = self.begin(state.params, support, state.added)
        # The parameters are the same in both, and must not be copied.
        pick = lambda new, old: jnp.where(finite, new, old)
        before = CompactState(*state)._replace(params=())
        small = jax.tree.map(pick, chosen._replace(params=()), before)
        return small._replace(params=state.params), finite

    def choose(
        self,
        state: CompactState,
        batch: object,
        key: jax.Array,
        avoid: Mapping[str, jax.Array] | None = None,
    ) -> Chosen:
        """Returns supports, as `select` chooses them, without starting anything.

        The arguments are those of `select`.

        Returns:
          Supports, whether the gradient was finite, and counts as of `Layout.choose`.
        """
        score = self.method.ranking
        if score is None:
            return state.support, jnp.array(True), state.support
        trees = (self.roles(state.params), state.params, state.support)
        among = Candidates(self.method, score, *trees, first_of(key), avoid or {})
        if not score.needs_gradient:
            return choose_from(state.params, among)
        sums = functools.partial(sums_of, self.loss, self.method.stack)
        if is_several(key):
            return choose_by_batches(among, state.added, batch, key, sums)
        return choose_by_gradient(among, state.added, *self.first(batch, key), sums)

    def first(self, batch: Batch, key: jax.Array) -> tuple[Batch, jax.Array]:
        """Returns the first micro-batch, and its key."""
        require_groups(batch, self.accumulate)
        if self.accumulate == 1:
            return batch, key
        keys = jax.random.split(key, self.accumulate)
        return jax.tree.map(lambda leaf: leaf[0], batch), keys[0]

    @abstractmethod
    def step(
        self, state: CompactState, batch: object, key: jax.Array, **extra_args: object
    ) -> tuple[CompactState, dict[str, jax.Array]]:
        """Makes one update, and returns the new state and metrics."""

    @abstractmethod
    def _start(
        self, roles: Roles, params: optax.Params, values: TrainedValues
    ) -> optax.OptState:
        """Returns the state of the optimizer before the first update."""

    @property
    def whole_tx(self) -> optax.GradientTransformation:
        """The transformation of all trained values at once."""
        return self.tx

    @property
    def _tx(self) -> optax.GradientTransformationExtraArgs:
        """The transformation, which takes extra arguments."""
        return optax.with_extra_args_support(self.tx)

    def attach(self, state: CompactState) -> Attachment:
        """Returns what a model needs, beside `state.params`, to compute its outputs."""
        return Attachment(LayerValues(state.added), response=self.method.respond)

    def adapter(
        self, state: CompactState, *, new: Sequence[str] = (), **about: Any
    ) -> Adapter:
        """Returns what was trained, for `save_adapter`.

        Args:
          state: after any number of steps.
          new: leaves that the checkpoint of the base lacks, stored as a whole.
          **about: other fields of `Adapter`.

        Raises:
          InputError: if the state is that of another tuner, nothing was selected, or
            the parameters have no leaf of `new`.
        """
        self._require_state(state)
        if int(fetch(jnp.asarray(state.count))) < 0:
            raise InputError(
                "`state` must have its supports, got one whose selection failed. Call "
                "`select` with another batch."
            )
        _, params, support, _, added, _ = state
        args = (self.method, self.roles(params), params, support, added)
        return adapter_of(*args, new=new, **about)

    def begin(
        self, params: optax.Params, support: optax.Params, added: Added
    ) -> CompactState:
        """Returns a state with these supports in which nothing has been updated."""
        roles = self.roles(params)
        leaves = pack(roles, support, params)
        return CompactState(
            count=jnp.zeros([], jnp.int32),
            params=params,
            support=support,
            masters=keep_masters(roles, leaves, params, self.split_masters),
            added=added,
            opt_state=self._start(roles, params, TrainedValues(added, leaves)),
        )

    def _gradients(
        self,
        tapped: Callable[[Values], tuple[optax.Params, Attachment]],
        values: Values,
        batch: object,
        key: jax.Array,
    ) -> tuple[jax.Array, Callable[[], Values]]:
        """Returns the loss, and its gradient once it is called for."""
        given = self.loss, self.method.stack
        total = lambda values, *args: sums_of(*given, *tapped(values), *args)
        require_groups(batch, self.accumulate)
        parts = {"accumulate": self.accumulate, "data_axes": self.data_axes}
        (loss, weight), grads = summed_gradients(total, values, batch, key, **parts)
        return loss / weight, lambda: jax.tree.map(lambda grad: grad / weight, grads)

    def _require_state(self, state: CompactState) -> None:
        """Raises unless a state has its supports, and all arrays of this tuner."""
        if isinstance(state, UnselectedState):
            raise InputError(
                "`state` must have its supports, got one of `init`. Call `select` "
                "before the first step: `state, finite = tuner.select(...)`."
            )
        init = lambda params: self.init(params, jax.random.key(0))
        fresh = jax.eval_shape(init, state.params)
        # Supports of shards are as long as the fullest shard needs.
        require_same("support", state.support, None if self.shards else fresh.support)
        require_same("added", state.added, fresh.added)
        begun = jax.eval_shape(self.begin, state.params, state.support, state.added)
        require_same("masters", state.masters, begun.masters)
        require_same("opt_state", state.opt_state, begun.opt_state)


@final
@dataclass(frozen=True)
class Compact(Tuner):
    """Fine-tunes by a method with gradients, state and updates of O(k).

        packed = w[S];   packed += tx(d loss / d packed);   w[S] = packed

    Float32 leaves are their own masters; low-precision leaves keep float32 masters of
    the trained values, or halves of them. `tx` sees only trained values, so clipping
    by the global norm uses their norm. Every method is pure and meant to be
    compiled with the state donated: then no weight has a second copy.

    Attributes:
      loss: (params, batch, key, attachment) -> (total, weight). The loss is total /
        weight; hand `attachment` to the model, or ignore it if `method.stack` is None.
      method: what to train.
      tx: any Optax transformation.
      accumulate: micro-batches per update. Above one, the leaves of a batch are
        [accumulate, ...] and only packed gradients are summed.
      shards: how leaves are sharded, by name, as from `Placement.shards`.
      data_axes: mesh axes over which replicas see different examples. They exchange
        gradients of the trained values, never dense ones.
      split_masters: whether bfloat16 leaves keep 2 bytes per trained value instead of
        4, as `remainder_of` says. An update then also reads the weights.

    Example:
      >>> from sparse_jax.methods.sparse import Sparse
      >>> def loss(params, x, key, attachment):
      ...     return jnp.sum((x @ params["w"]) ** 2), x.shape[0]
      >>> tuner = Compact(loss, Sparse(density=0.5, stack=None), optax.sgd(0.25))
      >>> state = tuner.init({"w": jnp.array([1.0, 2.0])}, jax.random.key(0))
      >>> x = jnp.array([[1.0, 3.0]])
      >>> state, finite = tuner.select(state, x, jax.random.key(1))
      >>> state, metrics = tuner.step(state, x, jax.random.key(1))
      >>> state.params["w"], metrics["loss"]
      (Array([ 1. , -8.5], dtype=float32), Array(49., dtype=float32))
    """

    def step(
        self, state: CompactState, batch: object, key: jax.Array, **extra_args: object
    ) -> tuple[CompactState, dict[str, jax.Array]]:
        """Makes one update.

        Args:
          state: with supports chosen; donate it.
          batch: whatever `loss` takes.
          key: for dropout.
          **extra_args: of the `update` of `tx`.

        Returns:
          The new state, and `loss`, `gradient_norm` of the trained values, and
          `is_skipped`: whether one of these is not finite, or nothing was selected.
          The state is then as before, bit for bit.

        Raises:
          InputError: while it is traced, if the supports were never selected, the state
            is that of another tuner, or the model asks for nothing of its attachment.
        """
        self._require_state(state)
        roles = self.roles(state.params)
        trees = (roles, state.params, state.support)
        tapped = lambda values: tap_leaves(self.method, *trees, values)
        # Gradients of coarse leaves are float32 where they are summed, and else from
        # the update on: until then their own dtype holds the same numbers.
        is_sum = self.accumulate > 1 or bool(self.data_axes)
        leaves = map_roles(Role.read, *trees, only=TRAINED)
        leaves = pack(roles, state.support, state.params) if is_sum else leaves
        values = TrainedValues(state.added, leaves)
        loss, mean = self._gradients(tapped, values, batch, key)
        norm = optax.tree.norm(mean())
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        ready = finite & jnp.greater_equal(state.count, 0)

        def update(state: CompactState) -> CompactState:
            trees = (state.support, state.masters, state.params)
            now = TrainedValues(state.added, current_values(roles, *trees))
            kept = (state.opt_state, values := now._asdict())
            updates, opt_state = self._tx.update(mean()._asdict(), *kept, **extra_args)
            moved: Any = optax.apply_updates(values, updates)
            added, leaves = TrainedValues(**moved)
            new = CompactState(
                count=optax.safe_increment(state.count),
                params=write_back(roles, state.params, state.support, leaves),
                support=state.support,
                masters=keep_masters(roles, leaves, state.params, self.split_masters),
                added=added,
                opt_state=opt_state,
            )
            return as_types(new, state)

        # A choice between arrays would copy whole leaves that are trained (measured on
        # a CPU: 10 times the time of the update), a branch works in place.
        state = lax.cond(ready, update, lambda state: state, state)
        return state, {"loss": loss, "gradient_norm": norm, "is_skipped": ~ready}

    def _start(
        self, roles: Roles, params: optax.Params, values: TrainedValues
    ) -> optax.OptState:
        """Returns the state of the optimizer before the first update."""
        del roles, params
        return self.tx.init(values._asdict())

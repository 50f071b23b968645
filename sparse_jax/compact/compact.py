"""The compact tier: a training step whose gradients are never dense."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_jax.adapter.adapter import Adapter, adapter_of
from sparse_jax.compact.checks import (
    require_groups,
    require_loss,
    require_state,
    sums_of,
)
from sparse_jax.compact.gradients import summed_gradients, update_if
from sparse_jax.compact.state import CompactState, UnselectedState
from sparse_jax.compact.tap import (
    Wanted,
    empty_selection,
    selecting_tap,
    support_of,
    tap,
)
from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method
from sparse_jax.models.attachment import Attachment
from sparse_jax.params.arguments import (
    require_count,
    require_key,
    require_transformation,
)
from sparse_jax.supports.layout import Shards
from sparse_jax.supports.packing import (
    current_values,
    keep_masters,
    pack,
    route,
    write_back,
)
from sparse_jax.supports.roles import SPARSE, TRAINED, Role, map_roles
from sparse_jax.supports.scores import Score, leaf_key

__all__ = ["Compact", "CompactState", "Loss"]

# (params, batch, key, attachment) -> (sum of the losses, number they are averaged by)
Loss = Callable[[Any, Any, Any, Attachment], tuple[jax.Array, jax.typing.ArrayLike]]

_map_sparse = functools.partial(map_roles, only=(SPARSE,))
# trained values -> parameters and attachment of a forward pass that depends on them
Place = Callable[[Any], tuple[Any, Attachment]]


@dataclass(frozen=True)
class Compact:
    """Fine-tunes by a method with gradients, state and updates of O(k).

        packed = w[S];   packed += tx(d loss / d packed);   w[S] = packed

    Float32 leaves are their own masters; coarser leaves keep float32 masters of the
    trained values. `tx` sees nothing but trained values, so clipping by the global
    norm is the norm of these. Every method is pure and meant to be compiled with the
    state donated: then no weight has a second copy.

    Attributes:
      loss: (params, batch, key, attachment) -> (total, weight). The loss is total /
        weight; hand `attachment` to the model, or ignore it if `method.stack` is None.
      method: what to train.
      tx: any Optax transformation.
      accumulate: micro-batches per update. Above one, the leaves of a batch are
        [accumulate, ...] and only packed gradients are summed.
      shards: how leaves are sharded, by name; `sparse_jax.sharding` knows.
      data_axes: mesh axes over which replicas see different examples. They exchange
        gradients of the trained values, never dense ones.

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

    loss: Loss
    method: Method
    tx: optax.GradientTransformation
    accumulate: int = 1
    shards: Mapping[str, Shards] = field(default_factory=dict)
    data_axes: tuple[str, ...] = ()

    def __post_init__(self):
        require_loss(self.loss)
        if not isinstance(self.method, Method):
            raise InputError(
                f"`method` must be a `Method`, got {self.method!r}. Pass one that is "
                "made, such as `Sparse(density=0.01)`."
            )
        require_transformation("tx", self.tx)
        require_count("accumulate", self.accumulate)

    def roles(self, params: Any) -> Any:
        """Returns the role of every leaf, with its layout as it is sharded.

        Raises:
          InputError: if the method does not fit the parameters, or their shards.
        """

        def sharded(role: Role, leaf: Any) -> Role:
            layout = role.layout.sharded(self.shards.get(role.name))
            if role.kind == SPARSE:
                layout.require(role.name, leaf.shape[int(role.stacked) :])
            return role._replace(layout=layout)

        return map_roles(sharded, self.method.roles(params), params)

    def init(
        self, params: Any, key: jax.Array, capacity: Mapping[str, int] | None = None
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

        def support(role: Role, leaf: Any) -> jax.Array:
            room = (capacity or {}).get(role.name)
            options = {"stacked": role.stacked, "capacity": room}
            k = self.method.support_size(role)
            return role.layout.empty(leaf.shape, k, **options)

        empty = _map_sparse(support, roles, params)
        state = self.begin(params, empty, self.method.added(params, key))
        if not jax.tree.leaves(empty):
            return state
        # Where a compiled `select` returns it, only the count says what it is.
        return UnselectedState(*state._replace(count=jnp.full([], -1, jnp.int32)))

    def select(
        self, state: CompactState, batch: Any, key: jax.Array
    ) -> tuple[CompactState, jax.Array]:
        """Chooses the supports and starts the optimiser afresh.

        Args:
          state: as returned by `init`, or by `step` to select again.
          batch: the batch whose gradient decides; with accumulation its first
            micro-batch does, as in the released code.
          key: as for `step`, so that both see the same dropout.

        Returns:
          The new state, and whether the gradient was finite. If it was not, the
          state is as before: try another batch. Without a selection every step skips.
        """
        support, finite, _ = self.choose(state, batch, key)
        chosen = self.begin(state.params, support, state.added)
        # The parameters are the same in both, and must not be copied.
        pick = lambda new, old: jnp.where(finite, new, old)
        before = CompactState(*state)._replace(params=())
        small = jax.tree.map(pick, chosen._replace(params=()), before)
        return small._replace(params=state.params), finite

    def choose(
        self, state: CompactState, batch: Any, key: jax.Array
    ) -> tuple[Any, jax.Array, Any]:
        """Returns supports, as `select` chooses them, without starting anything.

        The arguments are those of `select`.

        Returns:
          Supports, whether the gradient was finite, and counts as of `Layout.choose`.
        """
        roles = self.roles(state.params)
        require_groups(batch, self.accumulate)
        score = self.method.ranking
        if score is None or not score.needs_gradient:
            return self._choose_by_weight(roles, score, state, key)
        return self._choose_by_gradient(roles, score, state, batch, key)

    def step(
        self, state: CompactState, batch: Any, key: jax.Array, **extra_args: Any
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
        values = self._values(roles, state)
        place = lambda values: self._place(roles, state, values)
        loss, grads = self._gradients(place, values, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        ready = finite & jnp.greater_equal(state.count, 0)

        def update(count: Any, values: Any, opt_state: Any) -> tuple[Any, Any, Any]:
            updates, opt_state = self._tx.update(grads, opt_state, values, **extra_args)
            values = optax.apply_updates(values, updates)
            return optax.safe_increment(count), values, opt_state

        kept = (state.count, values, state.opt_state)
        count, values, opt_state = update_if(ready, update, *kept)
        leaves = values["leaves"]
        state = state._replace(
            count=count,
            params=write_back(roles, state.params, state.support, leaves),
            masters=keep_masters(roles, leaves, state.params),
            added=values["added"],
            opt_state=opt_state,
        )
        return state, {"loss": loss, "gradient_norm": norm, "is_skipped": ~ready}

    @property
    def _tx(self) -> optax.GradientTransformationExtraArgs:
        """The transformation, which takes extra arguments."""
        return optax.with_extra_args_support(self.tx)

    def attach(self, state: CompactState) -> Attachment:
        """Returns what a model needs, beside `state.params`, to compute its outputs."""
        return Attachment({"added": state.added}, response=self._respond)

    def adapter(
        self, state: CompactState, *, new: Sequence[str] = (), **about: Any
    ) -> Adapter:
        """Returns what was trained, for `save_adapter`.

        Args:
          state: after any number of steps.
          new: leaves that the checkpoint of the base lacks, stored as a whole.
          **about: other fields of `Adapter`.
        """
        self._require_state(state)
        _, params, support, _, added, _ = state
        args = (self.method, self.roles(params), params, support, added)
        return adapter_of(*args, new=new, **about)

    def begin(self, params: Any, support: Any, added: Any) -> CompactState:
        """Returns a state with these supports in which nothing has been updated."""
        roles = self.roles(params)
        leaves = pack(roles, support, params)
        return CompactState(
            count=jnp.zeros([], jnp.int32),
            params=params,
            support=support,
            masters=keep_masters(roles, leaves, params),
            added=added,
            opt_state=self._start(roles, params, leaves, added),
        )

    def _start(self, roles: Any, params: Any, leaves: Any, added: Any) -> Any:
        """Returns the state of the optimiser before the first update."""
        del roles, params
        return self.tx.init({"leaves": leaves, "added": added})

    def _values(self, roles: Any, state: CompactState) -> dict[str, Any]:
        """Returns the trained values, float32."""
        leaves = current_values(roles, state.support, state.masters, state.params)
        return {"leaves": leaves, "added": state.added}

    def _place(
        self, roles: Any, state: CompactState, values: Any
    ) -> tuple[Any, Attachment]:
        """Returns what the loss needs for a gradient of the trained values."""
        tap_leaf = lambda role, *leaves: tap(*leaves, role.layout)
        # The backward pass makes gradients in the dtype of their weights: until all
        # layers have theirs, bfloat16 holds the same numbers in half of the bytes.
        coarse = lambda role, leaf, value: value.astype(leaf.dtype)
        leaves = map_roles(coarse, roles, state.params, values["leaves"], only=TRAINED)
        trees = (leaves, state.support)
        params, stacked = route(roles, state.params, tap_leaf, *trees)
        return params, self._attachment(roles, tap_leaf, stacked, values["added"])

    def _gradients(
        self, place: Place, values: Any, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Returns the loss and its gradient with respect to the trained values."""
        total = lambda values, batch, key: sums_of(self, *place(values), batch, key)
        require_groups(batch, self.accumulate)
        parts = {"accumulate": self.accumulate, "data_axes": self.data_axes}
        (loss, weight), grads = summed_gradients(total, values, batch, key, **parts)
        return loss / weight, jax.tree.map(lambda grad: grad / weight, grads)

    def _require_state(self, state: CompactState) -> None:
        """Raises unless a state has its supports, and all arrays of this tuner."""
        if isinstance(state, UnselectedState):
            raise InputError(
                "`state` must have its supports, got one of `init`. Call `select` "
                "before the first step: `state, finite = tuner.select(...)`."
            )
        require_state(self, state)

    def _choose_by_gradient(
        self, roles: Any, score: Score, state: CompactState, batch: Any, key: jax.Array
    ) -> tuple[Any, jax.Array, Any]:
        """Returns the supports, found layer by layer in one backward pass."""

        def draw(role: Role, leaf: jax.Array) -> jax.Array:
            own = leaf_key(key, role.name)
            fold = jax.vmap(lambda layer: jax.random.fold_in(own, layer))
            return fold(jnp.arange(len(leaf))) if role.stacked else own

        def tap_leaf(role: Role, *leaves: Any) -> jax.Array:
            k = self.method.support_size(role)
            return selecting_tap(Wanted(score, k, role.layout), *leaves)

        def total(selections: Any) -> jax.Array:
            params, stacked = route(roles, state.params, tap_leaf, selections, draws)
            attachment = self._attachment(roles, tap_leaf, stacked, state.added)
            loss, weight = sums_of(self, params, attachment, *first)
            return loss / weight

        first = batch, key
        if self.accumulate > 1:
            one = jax.tree.map(lambda leaf: leaf[0], batch)
            first = one, jax.random.split(key, self.accumulate)[0]
        draws = _map_sparse(draw, roles, state.params)
        empty = lambda role, support: empty_selection(support.shape)
        chosen = jax.grad(total)(_map_sparse(empty, roles, state.support))
        support = lambda role, selection: support_of(selection, role.layout)
        bad = lambda role, selection: jnp.any(selection.bad > 0)
        count = lambda role, selection: selection.count.astype(jnp.int32)
        return (
            _map_sparse(support, roles, chosen),
            ~jnp.any(jnp.array(jax.tree.leaves(_map_sparse(bad, roles, chosen)), bool)),
            _map_sparse(count, roles, chosen),
        )

    def _choose_by_weight(
        self, roles: Any, score: Score | None, state: CompactState, key: jax.Array
    ) -> tuple[Any, jax.Array, Any]:
        """Returns the supports of a score that looks at no gradient, and counts."""

        def chosen(role: Role, leaf: jax.Array, support: jax.Array) -> Any:
            assert score is not None
            # Nothing reads the gradient.
            args = (score, leaf, leaf, self.method.support_size(role))
            options = {"stacked": role.stacked, "capacity": support.shape[-1]}
            return role.layout.choose(*args, leaf_key(key, role.name), **options)

        both = _map_sparse(chosen, roles, state.params, state.support)
        pick = lambda i: _map_sparse(lambda role, pair: pair[i], roles, both)
        return pick(0), jnp.array(True), pick(1)

    def _inside(self, tree: Any) -> Any:
        """Returns the subtree of the layers, empty if there is none."""
        name = self.method.stack
        return tree[name] if isinstance(tree, Mapping) and name in tree else {}

    def _attachment(
        self, roles: Any, tap_leaf: Callable[..., Any], stacked: tuple, added: Any
    ) -> Attachment:
        """Returns the attachment that taps the layers of the stack.

        Args:
          roles: of all leaves.
          tap_leaf: (role, leaf, a value of every tree) -> leaf.
          stacked: trees of arrays, of which a layer gets its slices.
          added: what the method adds.
        """
        inside = tuple(map(self._inside, stacked))

        def weights(layer_params: Any, trained: Any) -> Any:
            def one(role: Role, leaf: jax.Array, *values: Any) -> jax.Array:
                return tap_leaf(role, leaf, *values) if role.kind == SPARSE else leaf

            if not trained["tapped"][0]:
                return layer_params
            return map_roles(one, self._inside(roles), layer_params, *trained["tapped"])

        return Attachment({"tapped": inside, "added": added}, weights, self._respond)

    def _respond(self, site: str, module: Any, x: Any, trained: Any, key: Any) -> Any:
        """Computes what a module of a layer returns, as `Attachment.response`."""
        return self.method.response(site, module, x, trained["added"], key=key)

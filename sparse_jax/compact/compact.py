"""The compact tier: a training step whose gradients are never dense."""

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
    Selection,
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
from sparse_jax.params.roles import SPARSE, TRAINED, Role, map_roles
from sparse_jax.supports.packing import (
    current_values,
    keep_masters,
    pack,
    route,
    write_back,
)
from sparse_jax.supports.scores import leaf_key
from sparse_jax.supports.sharded import Cut
from sparse_jax.supports.support import Support

__all__ = ["Compact", "CompactState", "Loss"]

# (params, batch, key, attachment) -> (sum of the losses, number they are averaged by)
Loss = Callable[[Any, Any, Any, Attachment], tuple[jax.Array, jax.typing.ArrayLike]]

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
      cuts: how leaves are cut over a mesh, by name; `sparse_jax.sharding` knows.
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
    cuts: Mapping[str, Cut] = field(default_factory=dict)
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

    def init(
        self, params: Any, key: jax.Array, capacity: Mapping[str, int] | None = None
    ) -> CompactState:
        """Returns the state before the selection, whose supports hold nothing.

        Args:
          params: parameters of the model.
          key: of the arrays that the method adds.
          capacity: slots of every shard of a leaf that is cut over a mesh, by name.

        Raises:
          InputError: if the method does not fit the parameters.
        """
        require_key("key", key)
        roles = self.method.roles(params)

        def support(role: Role, leaf: Any) -> Support:
            k, cut = self.method.support_size(role), self.cuts.get(role.name)
            slots = (capacity or {}).get(role.name, k)
            return self.method.unit.empty(role, leaf.shape, k, cut, slots)

        empty = map_roles(support, roles, params, only=(SPARSE,))
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
          The supports, whether the gradient was finite, and for sparse leaves the
          number of chosen entries, of every layer and shard: where that is more than
          the slots of a table, the support lacks entries.
        """
        roles = self.method.roles(state.params)
        require_groups(batch, self.accumulate)
        if not self.method.needs_gradient:
            support, counts = self._choose_by_weight(roles, state, key)
            return support, jnp.array(True), counts
        if self.accumulate > 1:
            batch = jax.tree.map(lambda leaf: leaf[0], batch)
            key = jax.random.split(key, self.accumulate)[0]
        return self._choose_by_gradient(roles, state, batch, key)

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
        roles = self.method.roles(state.params)
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
        args = (self.method, self.method.roles(params), params, support, added)
        return adapter_of(*args, new=new, **about)

    def begin(self, params: Any, support: Any, added: Any) -> CompactState:
        """Returns a state with these supports in which nothing has been updated."""
        roles = self.method.roles(params)
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
        tap_leaf = lambda role, leaf, value, support: tap(leaf, value, support)
        # The backward pass makes gradients in the dtype of their weights: until all
        # layers have theirs, bfloat16 holds the same numbers in half of the bytes.
        coarse = lambda role, leaf, value: value.astype(leaf.dtype)
        leaves = map_roles(coarse, roles, state.params, values["leaves"], only=TRAINED)
        trees = (leaves, state.support)
        params, stacked = route(roles, state.params, tap_leaf, *trees)
        return params, self._attachment(tap, stacked, values["added"])

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
        self, roles: Any, state: CompactState, batch: Any, key: jax.Array
    ) -> tuple[Any, jax.Array, Any]:
        """Returns the supports, found layer by layer in one backward pass."""
        empty = map_roles(
            lambda role, support: empty_selection(support.shape),
            roles, state.support, only=(SPARSE,),
        )  # fmt: skip
        wanted = map_roles(self._wanted, roles, only=(SPARSE,))

        def total(selections: Any) -> jax.Array:
            tap_leaf = lambda role, leaf, chosen: selecting_tap(
                self._wanted(role), leaf, chosen
            )
            params, stacked = route(roles, state.params, tap_leaf, selections)
            tap_layer = lambda leaf, chosen, wanted: selecting_tap(wanted, leaf, chosen)
            attachment = self._attachment(
                tap_layer, stacked, state.added, self._inside(wanted)
            )
            loss, weight = sums_of(self, params, attachment, batch, key)
            return loss / weight

        selections = jax.grad(total)(empty)
        is_selection = lambda node: isinstance(node, Selection)
        bad = [
            jnp.any(selection.bad > 0)
            for selection in jax.tree.leaves(selections, is_leaf=is_selection)
        ]
        only = {"only": (SPARSE,)}
        positions = lambda role, chosen: support_of(
            chosen, self.cuts.get(role.name), self.method.unit
        )
        support = map_roles(positions, roles, selections, **only)
        count = lambda role, chosen: chosen.count.astype(jnp.int32)
        counts = map_roles(count, roles, selections, **only)
        finite = ~jnp.any(jnp.stack(bad)) if bad else jnp.array(True)
        return support, finite, counts

    def _choose_by_weight(
        self, roles: Any, state: CompactState, key: jax.Array
    ) -> tuple[Any, Any]:
        """Returns the supports of a score that looks at no gradient, and counts."""

        def chosen(role: Role, leaf: jax.Array, support: Any) -> tuple[Support, Any]:
            score, k, cut, unit = self._wanted(role)
            options = {"cut": cut, "slots": support.shape[-1], "stacked": role.stacked}
            # Nothing reads the gradient.
            args = (score, leaf, leaf, k, leaf_key(key, role.name))
            return unit.choose(*args, **options)

        both = map_roles(chosen, roles, state.params, state.support, only=(SPARSE,))
        first, second = (
            map_roles(lambda role, pair, i=i: pair[i], roles, both, only=(SPARSE,))
            for i in (0, 1)
        )
        return first, second

    def _wanted(self, role: Role) -> Wanted:
        """Returns what to select in a leaf, or in each layer of it."""
        k, cut = self.method.support_size(role), self.cuts.get(role.name)
        return Wanted(self.method.score, k, cut, self.method.unit)

    def _inside(self, tree: Any) -> Any:
        """Returns the subtree of the layers, empty if there is none."""
        name = self.method.stack
        return tree[name] if isinstance(tree, Mapping) and name in tree else {}

    def _attachment(
        self, tap_leaf: Callable[..., Any], stacked: tuple, added: Any, *static: Any
    ) -> Attachment:
        """Returns the attachment that taps the layers of the stack.

        Args:
          tap_leaf: (leaf, a value of every tree, a value of every static tree) -> leaf.
          stacked: trees of arrays, of which a layer gets its slices.
          added: what the method adds.
          *static: trees of the layers that hold no arrays.
        """
        inside = tuple(map(self._inside, stacked))

        def weights(layer_params: Any, trained: Any) -> Any:
            def one(leaf: jax.Array, *values: Any) -> jax.Array:
                masked = isinstance(values[0], optax.MaskedNode)
                return leaf if masked else tap_leaf(leaf, *values)

            if not trained["tapped"][0]:
                return layer_params
            return jax.tree.map(one, layer_params, *trained["tapped"], *static)

        return Attachment({"tapped": inside, "added": added}, weights, self._respond)

    def _respond(self, site: str, module: Any, x: Any, trained: Any, key: Any) -> Any:
        """Computes what a module of a layer returns, as `Attachment.response`."""
        return self.method.response(site, module, x, trained["added"], key=key)

"""Slots: run a stack of layers, and keep what only active layers need for these.

Which layers are active is known at run time only, and one compiled program serves every
choice. What a layer keeps for its backward pass are its residuals. Some of them serve
the gradient of its input; the others, such as the input of every linear map, only the
gradient of its trained values. A frozen layer has no use for the second kind, so there
is room for those of the active layers alone: one slot each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.models.attachment import Arrays, Recompute
from sparse_jax.models.pullback import Pull, Pullback

__all__ = ["SAMPLED", "run_slots"]

# The name of the backward loop in programs, which do not say how often it runs.
SAMPLED = "sampled_layers"

# (x, one, row, context) -> the next x, [B, T, D], of one layer
Layer = Callable[..., jax.Array]


def run_slots(
    layer: Layer,
    x: jax.Array,
    stacked: Arrays,
    rows: Arrays,
    context: Arrays,
    active: jax.Array,
    *,
    rows_of: Callable[..., Arrays],
    own: Callable[..., Arrays],
    recompute: Recompute,
) -> jax.Array:
    """Runs a stack of layers of which a few are trained.

    The result is that of

        for l in range(L):
            one = stacked[l]
            x = layer(x, one, rows_of(one), own(context, one))

    with a gradient for `rows` and `x` only. No backward pass is made below the lowest
    active layer unless the gradient of `x` is asked for.

    Args:
      layer: the function of one layer.
      x: input of the first layer.
      stacked: pytree of arrays (L, ...): parameters, trained values, keys.
      rows: the trained values of the active layers, (num_active, ...): what
        `rows_of(stacked)` holds at `active`.
      context: arrays that layers see, such as the attention mask.
      active: numbers of the active layers, shape=(num_active,), int32, sorted.
      rows_of: returns the trained values among the arrays of one layer.
      own: returns what one layer sees of the context; it is called again for the
        backward pass, and nothing of it is kept.
      recompute: which layers run forward again in the backward pass: "none" of them,
        which keeps the residuals that the gradient of the input needs for every
        layer; the "frozen" ones, which keeps nothing but its input for a frozen
        layer; or "all" of them.
    """
    run = _Stack(layer, rows_of, own, recompute)
    stack = jax.custom_vjp(run.forward_only)
    stack.defvjp(run.forward, run.backward, symbolic_zeros=True)
    return stack(x, rows, stacked, context, active)


class _Kept(NamedTuple):
    """What the backward pass finds."""

    everywhere: Arrays  # (L, ...): inputs of the layers, or residuals of all of them
    slots: Arrays  # (num_active, ...): residuals of the active layers
    stacked: Arrays
    context: Arrays
    active: jax.Array
    first: jax.Array  # shape=(), int32: the lowest layer with a backward pass


class _Stack:
    """The two passes over a stack; its fields pass from the first to the second."""

    def __init__(
        self,
        layer: Layer,
        rows_of: Callable[..., Arrays],
        own: Callable[..., Arrays],
        recompute: str,
    ):
        self.layer = layer
        self.rows_of = rows_of
        self.own = own
        self.recompute = recompute
        self.pullback: _Pullback

    def forward_only(self, x, rows, stacked, context, active):
        """Runs the layers, where no gradient is asked for."""
        del rows, active

        def body(x: jax.Array, one: Arrays) -> tuple[jax.Array, None]:
            own = self.own(context, one)
            return self.layer(x, one, self.rows_of(one), own), None

        return lax.scan(body, x, stacked)[0]

    def forward(self, x, rows, stacked, context, active):
        """Runs the layers and fills the slots."""
        is_asked = x.perturbed
        x, rows, stacked, context, active = jax.tree.map(
            lambda primal: primal.value, (x, rows, stacked, context, active),
            is_leaf=lambda node: hasattr(node, "perturbed"),
        )  # fmt: skip
        num_layers = jax.tree.leaves(stacked)[0].shape[0]
        num_active = active.shape[0]
        slot_of = _slot_of(num_layers, active)
        shapes = jax.eval_shape(
            lambda x, one: self._run(x, one, context)[1:],
            x, jax.tree.map(lambda leaf: leaf[0], stacked),
        )  # fmt: skip
        # The last slot is shared by the frozen layers: a write that may or may not
        # happen would cost a copy of all slots.
        slots = jax.tree.map(
            lambda leaf: jnp.zeros((num_active + 1, *leaf.shape), leaf.dtype), shapes[1]
        )

        # The context is carried so that the body meets it as an argument, and finds
        # that no copy of it has to be kept for every layer.
        def body(carry: tuple, one: tuple) -> tuple[tuple, Arrays]:
            (x, context, slots), (one, slot) = carry, one
            y, everywhere, residuals = self._run(x, one, context)
            slots = jax.tree.map(
                lambda slots, new: lax.dynamic_update_index_in_dim(slots, new, slot, 0),
                slots, residuals,
            )  # fmt: skip
            return (y, context, slots), everywhere

        carry = (x, context, slots)
        (y, _, slots), everywhere = lax.scan(body, carry, (stacked, slot_of))
        first = jnp.zeros([], jnp.int32) if is_asked else active[0]
        return y, _Kept(everywhere, slots, stacked, context, active, first)

    def backward(self, kept, dy):
        """Goes back through the layers, down to the lowest that matters."""
        num_layers = jax.tree.leaves(kept.stacked)[0].shape[0]
        num_active = kept.active.shape[0]
        slot_of = _slot_of(num_layers, kept.active)
        rows = self.rows_of(kept.stacked)
        grads = jax.tree.map(
            lambda leaf: jnp.zeros((num_active, *leaf.shape[1:]), leaf.dtype), rows
        )

        def body(step: jax.Array, carry: tuple) -> tuple:
            dx, grads = carry
            number = num_layers - 1 - step
            at = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
            slot = slot_of[number]

            # A layer is taken out of its stack inside the branches, where compilers
            # read it in place: handed to them, every weight would be copied first
            # (24 of the 388 ms of an update of Llama-7B on a TPU v5p).
            def layer() -> tuple[Arrays, Arrays, Arrays]:
                one, everywhere = at((kept.stacked, kept.everywhere), number)
                return one, self.own(kept.context, one), everywhere

            def active(dx: jax.Array, grads: Arrays) -> tuple:
                residuals = at(kept.slots, slot)
                dx, row = self._pull_active(dx, *layer(), residuals)
                put = lambda grads, row: lax.dynamic_update_index_in_dim(
                    grads, row.astype(grads.dtype), slot, 0
                )
                return dx, jax.tree.map(put, grads, row)

            def frozen(dx: jax.Array, grads: Arrays) -> tuple:
                return self._pull_frozen(dx, *layer()), grads

            return lax.cond(slot < num_active, active, frozen, dx, grads)

        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            zero: Any = dy
            dy = jnp.zeros(zero.shape, zero.dtype)
        # The bound is a traced number, so this loop really ends there.
        with jax.named_scope(SAMPLED):
            carry = lax.fori_loop(0, num_layers - kept.first, body, (dy, grads))
        return (*carry, None, None, None)

    def _run(
        self, x: jax.Array, one: Arrays, context: Arrays
    ) -> tuple[jax.Array, Arrays, Arrays]:
        """Returns the output of a layer, what all layers keep, and what slots keep."""
        context = self.own(context, one)
        if self.recompute == "all":
            return self.layer(x, one, self.rows_of(one), context), x, ()
        y, vjp = self._vjp(x, one, context)
        inputs = (one, context, x) if self.recompute == "frozen" else (one, context)
        self.pullback = _Pullback(vjp, inputs, y)
        residuals = self.pullback.residuals(vjp)
        if self.recompute == "frozen":
            return y, x, residuals
        return y, *self.pullback.split(residuals)

    def _pull_active(
        self,
        dy: jax.Array,
        one: Arrays,
        context: Arrays,
        everywhere: Any,
        slot: Any,
    ) -> tuple[jax.Array, Arrays]:
        """Returns the gradients of a layer's input and of its trained values."""
        if self.recompute == "all":
            return self._vjp(everywhere, one, context)[1](dy)
        if self.recompute == "frozen":
            return self.pullback.rebuild(slot, (one, context, everywhere))(dy)
        residuals = self.pullback.join(everywhere, slot)
        return self.pullback.rebuild(residuals, (one, context))(dy)

    def _pull_frozen(
        self, dy: jax.Array, one: Arrays, context: Arrays, everywhere: Any
    ) -> jax.Array:
        """Returns the gradient of a layer's input."""
        if self.recompute == "none":
            # The compiler drops whatever reads the zeros, with the other gradient.
            residuals = self.pullback.join(everywhere, self.pullback.empty_slot())
            return self.pullback.rebuild(residuals, (one, context))(dy)[0]
        return self._vjp(everywhere, one, context)[1](dy)[0]

    def _vjp(
        self, x: jax.Array, one: Arrays, context: Arrays
    ) -> tuple[jax.Array, Pull]:
        """Returns the output of a layer and its pullback."""
        run = lambda x, row: self.layer(x, one, row, context)
        return jax.vjp(run, x, self.rows_of(one))


def _slot_of(num_layers: int, active: jax.Array) -> jax.Array:
    """Returns the slot of every layer, shape=(L,); frozen ones have the last."""
    num_active = active.shape[0]
    slots = jnp.full(num_layers, num_active)
    return slots.at[active].set(jnp.arange(num_active), unique_indices=True)


class _Pullback(Pullback):
    """The pullback of a layer, with what only its trained values need apart."""

    def __init__(self, vjp: Pull, inputs: Arrays, dy: jax.Array):
        super().__init__(vjp, inputs)
        leaves = jax.tree.leaves(vjp)
        serves = self._serves_input(leaves, dy)
        kept = [
            (leaf, serve)
            for leaf, serve, source in zip(leaves, serves, self.sources, strict=True)
            if source is None
        ]
        self.is_everywhere = [serve for _, serve in kept]
        self.slot = [
            (leaf.shape, jnp.dtype(leaf.dtype)) for leaf, serve in kept if not serve
        ]

    def split(self, residuals: list[jax.Array]) -> tuple[list, list]:
        """Returns those that the gradient of the input needs, and the others."""
        pairs = list(zip(residuals, self.is_everywhere, strict=True))
        everywhere = [leaf for leaf, is_everywhere in pairs if is_everywhere]
        return everywhere, [leaf for leaf, is_everywhere in pairs if not is_everywhere]

    def empty_slot(self) -> list[jax.Array]:
        """Returns zeros in place of what slots keep."""
        return [jnp.zeros(shape, dtype) for shape, dtype in self.slot]

    def join(self, everywhere: list, slots: list) -> list[jax.Array]:
        """Returns what `split` took apart."""
        ours, others = iter(everywhere), iter(slots)
        return [next(ours if here else others) for here in self.is_everywhere]

    def _serves_input(self, leaves: list, dy: jax.Array) -> list[bool]:
        """Says of every array whether the gradient of the input needs it."""

        def pull(leaves: list, dy: jax.Array) -> jax.Array:
            return jax.tree.unflatten(self.treedef, leaves)(dy)[0]

        jaxpr = jax.make_jaxpr(pull)(leaves, dy).jaxpr
        variable = type(jaxpr.invars[-1])  # as opposed to a literal
        variables = lambda atoms: {x for x in atoms if isinstance(x, variable)}
        needed = variables(jaxpr.outvars)
        for equation in reversed(jaxpr.eqns):
            if needed & variables(equation.outvars):
                needed |= variables(equation.invars)
        return [var in needed for var in jaxpr.invars[: len(leaves)]]

"""A loss taken apart at its stack of layers, so that a step can run these itself."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.models.attachment import Added, Arrays, LayerValues, Stack
from sparse_jax.models.pullback import Pull, Pullback

__all__ = [
    "LayerByLayer",
    "Loop",
    "after_stack",
    "after_tracing",
    "before_stack",
    "runs_own_layers",
]

Loop = Callable[[Stack], jax.Array]
# (trained values outside the layers, what runs the layers) -> (total, weight)
Sums = Callable[[optax.Params, Loop], tuple[jax.Array, jax.Array]]


def before_stack(sums: Sums, outside: optax.Params) -> tuple[Stack, Pull]:
    """Returns a stack as the model is about to run it, and the pullback of its input.

    Args:
      sums: of a model that runs its layers by the `loop` of an attachment.
      outside: what is differentiated with respect to.

    Raises:
      InputError: if the model runs its layers in another way.
    """
    seen: list[Stack] = []

    def enter(outside: optax.Params) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
        sums(outside, lambda stack: seen.append(stack) or stack.x)
        if len(seen) != 1:
            raise InputError(
                "`loss` must run the layers of a model once, by `run_layers` of "
                "`sparse_jax.models.stack` without `states`, got "
                f"{len(seen)} runs of them. Use `Compact` for another model."
            )
        return seen[0].x, (seen[0].rest, seen[0].context)

    x, pull, (rest, context) = jax.vjp(enter, outside, has_aux=True)
    return seen[0]._replace(x=x, rest=rest, context=context), pull


def after_stack(
    sums: Sums, outside: optax.Params, x: jax.Array
) -> tuple[jax.Array, jax.Array, Pull]:
    """Returns total and weight for what leaves a stack, and the pullback of the total.

    Args:
      sums: as of `before_stack`.
      outside: what is differentiated with respect to, beside x.
      x: output of the last layer.
    """
    leave = lambda outside, x: sums(outside, lambda stack: x)
    total, pull, weight = jax.vjp(leave, outside, x, has_aux=True)
    return total, weight, pull


def after_tracing(loop: Loop, values: LayerValues) -> Loop:
    """Returns a loop that traces a layer first, for what it asks of its attachment.

    Args:
      loop: what runs the layers, or leaves that to another program.
      values: what the method hands to the layers, (L, ...).
    """

    def traced(stack: Stack) -> jax.Array:
        trees = (stack.params, values, stack.rest)
        params, one, rest = jax.tree.map(lambda leaf: leaf[0], trees)
        jax.eval_shape(stack.layer, stack.x, (params, one, *rest), stack.context)
        return loop(stack)

    return traced


def runs_own_layers(stack: Stack, layers: Arrays) -> bool:
    """Returns whether a stack runs these layers, and nothing that is made of them."""
    both = [jax.tree.leaves(tree) for tree in (stack.params, layers)]
    same = len(both[0]) == len(both[1])
    return same and all(one is own for one, own in zip(*both, strict=True))


class LayerByLayer:
    """The two passes over a stack; its fields pass from the first to the second.

    Args:
      stack: as from `before_stack`.
      leaves_of: (parameters, support) of one layer -> what the gradient is with respect
        to, beside the arrays that the method adds.
    """

    def __init__(self, stack: Stack, leaves_of: Callable[[Arrays, Arrays], Arrays]):
        self.stack, self.leaves_of = stack, leaves_of
        self.pullback: Pullback

    def forward(self, params: Arrays, values: LayerValues) -> tuple[jax.Array, Arrays]:
        """Runs all layers.

        Args:
          params: of the layers, (L, ...).
          values: what the method hands to them, (L, ...), without leaves.

        Returns:
          The output of the last layer, and what the backward pass needs of each.
        """

        # The context is carried so that the body meets it as an argument, and finds
        # that no copy of it has to be kept for every layer.
        def body(carry: tuple, one: tuple) -> tuple[tuple, Arrays]:
            x, context = carry
            y, vjp = self._vjp(x, one, context)
            if self.stack.checkpoint:
                return (y, context), x
            self.pullback = Pullback(vjp, (one, context))
            return (y, context), self.pullback.residuals(vjp)

        carry = (self.stack.x, self.stack.context)
        (x, _), kept = lax.scan(body, carry, (params, values, self.stack.rest))
        return x, kept

    def back(
        self,
        dx: jax.Array,
        kept: Any,
        params: Arrays,
        values: LayerValues,
        rest: Arrays,
    ) -> tuple[jax.Array, Added, Arrays]:
        """Returns the gradients of the input of one layer and of its trained values.

        Args:
          dx: gradient of its output.
          kept: of this layer, as the other arguments.
          params: as they were in the forward pass.
          values: likewise.
          rest: of the stack.
        """
        one, context = (params, values, rest), self.stack.context
        if self.stack.checkpoint:
            return self._vjp(kept, one, context)[1](dx)
        return self.pullback.rebuild(kept, (one, context))(dx)

    def _vjp(self, x: jax.Array, one: tuple, context: Arrays) -> tuple[jax.Array, Pull]:
        """Returns the output of a layer and its pullback."""
        params, values, rest = one
        leaves = self.leaves_of(params, values.support)

        def run(x: jax.Array, added: Added, leaves: Arrays) -> jax.Array:
            trained = values._replace(added=added, leaves=leaves)
            return self.stack.layer(x, (params, trained, *rest), context)

        return jax.vjp(run, x, values.added, leaves)

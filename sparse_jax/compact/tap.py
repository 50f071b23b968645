"""Taps: reach the gradient of a weight without ever keeping it.

A tap stands in the forward pass between a weight and the layer that uses it and
changes nothing. In the backward pass it sees the dense gradient of that one weight,
takes from it what is wanted, and lets go of the rest. Inside a scan over layers, one
layer's dense gradient is alive at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.supports.granularity import ENTRY, Granularity
from sparse_jax.supports.scores import Score
from sparse_jax.supports.sharded import Cut, Tables
from sparse_jax.supports.support import Support, gather

__all__ = [
    "Selection",
    "Wanted",
    "empty_selection",
    "selecting_tap",
    "support_of",
    "tap",
]


@jax.custom_vjp
def tap(param: jax.Array, packed: jax.Array, support: Support) -> jax.Array:
    """Returns `param`, so that the gradient at `support` belongs to `packed`.

        forward:  w           backward:  d loss / d packed = (d loss / d w)[support]

    Nothing is propagated to `param` itself. The values of `packed` are not used: write
    them into `param` with `scatter` after each update. Reverse mode only.

    Args:
      param: weight of any shape, of one layer.
      packed: shape=(k,), float32 or the dtype of `param`; what to differentiate with
        respect to. The gradient has its dtype.
      support: positions, shape=(k,), int32; or tables, and `packed` in their shape.

    Example:
      >>> w, support = jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 2])
      >>> loss = lambda packed: jnp.sum(tap(w, packed, support) ** 2)
      >>> jax.grad(loss)(jnp.zeros(2))
      Array([2., 6.], dtype=float32)
    """
    del packed, support
    return param


def _tap_forward(param, packed, support):
    """Keeps the support, and a dtype."""
    return param, (support, jnp.empty(0, packed.dtype))


def _tap_backward(kept, cotangent):
    """Gathers the wanted entries of the dense gradient."""
    support, like = kept
    return None, gather(cotangent, support).astype(like.dtype), None


tap.defvjp(_tap_forward, _tap_backward)


class Selection(NamedTuple):
    """A support on its way out of a backward pass, as float32 cotangents.

    Of an array that is cut over a mesh, k stands for (S, c), tables of S shards, and
    the other arrays have S at their end too; of lanes, for (m, G, C).
    """

    high: jax.Array  # shape=(..., k): positions divided by 2**16
    low: jax.Array  # shape=(..., k): the remainder
    bad: jax.Array  # shape=(...): 1 where the gradient was not finite
    count: jax.Array  # shape=(...): chosen entries, which a table may have no room for


# Both halves of an int32 position are exact in float32.
_HALF = 1 << 16


def empty_selection(shape: tuple[int, ...]) -> Selection:
    """Returns what `selecting_tap` is differentiated by, for supports of a shape."""
    zeros = jnp.zeros(shape, jnp.float32)
    return Selection(zeros, zeros, zeros[..., 0], zeros[..., 0])


def support_of(
    selection: Selection, cut: Cut | None = None, unit: Granularity = ENTRY
) -> Support:
    """Returns the support that a selection carries."""
    positions = selection.high.astype(jnp.int32) * _HALF
    positions += selection.low.astype(jnp.int32)
    return unit.restored(positions, cut)


class Wanted(NamedTuple):
    """What to select in an array."""

    score: Score  # ranks the entries; the k best are selected
    k: int
    cut: Cut | None  # how the array, or each layer of the stack, is cut over a mesh
    unit: Granularity = ENTRY


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def selecting_tap(wanted: Wanted, param: jax.Array, selection: Selection) -> jax.Array:
    """Returns `param`; the "gradient" of `selection` is the support of its gradient.

    This selects in the backward pass itself, so that choosing the support of a large
    model needs no more memory than training it.

    Args:
      wanted: what to select.
      param: weight of any shape, of one layer.
      selection: `empty_selection((k,))`, or `empty_selection((S, c))` if cut.

    Example:
      >>> from sparse_jax.supports.scores import gradient
      >>> w = jnp.array([1.0, -3.0, 2.0])
      >>> wanted = Wanted(gradient, 2, None)
      >>> loss = lambda s: jnp.sum(selecting_tap(wanted, w, s) ** 2)
      >>> support_of(jax.grad(loss)(empty_selection((2,))))
      Array([1, 2], dtype=int32)
    """
    del wanted, selection
    return param


def _select_forward(wanted, param, selection):
    """Keeps what the score may want to see."""
    del wanted
    return param, (param, selection.high)


def _select_backward(wanted, kept, cotangent):
    """Selects from the dense gradient."""
    (score, k, cut, unit), (param, high) = wanted, kept
    # A score that looks at a gradient draws nothing.
    key = jax.random.key(0)
    support, count = unit.choose(
        score, cotangent, param, k, key, cut=cut, slots=high.shape[-1]
    )
    numbers = support.positions if isinstance(support, Tables) else support
    numbers = numbers.astype(jnp.int32)
    bad = jnp.broadcast_to(~jnp.isfinite(cotangent).all(), count.shape)
    parts = (numbers // _HALF, numbers % _HALF, bad, count)
    return None, Selection(*(part.astype(jnp.float32) for part in parts))


selecting_tap.defvjp(_select_forward, _select_backward)

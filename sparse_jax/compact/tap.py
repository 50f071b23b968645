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
import numpy as np

from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.layout import Layout
from sparse_jax.supports.scores import Score

__all__ = [
    "Selection",
    "Wanted",
    "empty_selection",
    "selecting_tap",
    "support_of",
    "tap",
]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def tap(
    param: jax.Array, packed: jax.Array, support: jax.Array, layout: Layout = ENTRY
) -> jax.Array:
    """Returns `param`, so that the gradient at `support` belongs to `packed`.

        forward:  w           backward:  d loss / d packed = (d loss / d w)[support]

    Nothing is propagated to `param` itself. The values of `packed` are not used: write
    them into `param` with `scatter` after each update. Reverse mode only.

    Args:
      param: weight of any shape, of one layer.
      packed: shape=(k,), float32 or the dtype of `param`; what to differentiate with
        respect to. The gradient has its dtype.
      support: positions, shape=(k,), int32; or of another layout, and `packed` in its
        shape.
      layout: what the numbers of the support are.

    Example:
      >>> w, support = jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 2])
      >>> loss = lambda packed: jnp.sum(tap(w, packed, support) ** 2)
      >>> jax.grad(loss)(jnp.zeros(2))
      Array([2., 6.], dtype=float32)
    """
    del packed, support, layout
    return param


def _tap_forward(param, packed, support, layout):
    """Keeps the support, and a dtype."""
    del layout
    return param, (support, jnp.empty(0, packed.dtype))


def _tap_backward(layout, kept, cotangent):
    """Gathers the wanted entries of the dense gradient."""
    support, like = kept
    return None, layout.gather(cotangent, support).astype(like.dtype), None


tap.defvjp(_tap_forward, _tap_backward)


class Selection(NamedTuple):
    """A support on its way out of a backward pass, as cotangents.

    Cotangents are floating-point, and may meet zeros that are added to them: numbers
    travel in parts that are exact, in as few bytes as hold them. The supports of all
    layers are together before any of them is used.
    """

    parts: tuple[jax.Array, ...]  # each of the shape of the support
    bad: jax.Array  # shape of `count`: 1 where the gradient was not finite
    count: jax.Array  # as `Layout.choose` returns it


# Bytes of a number -> the types of its parts, lowest bits first: 24 bits are exact in
# float32, 8 in bfloat16.
_LOW, _HIGH = jnp.float32, jnp.bfloat16
_PARTS = {1: (_HIGH,), 2: (_LOW,), 4: (_LOW, _HIGH)}
_BASE = 1 << 24


def empty_selection(shape: tuple[int, ...], layout: Layout = ENTRY) -> Selection:
    """Returns what `selecting_tap` is differentiated by, for supports of a shape."""
    types = _PARTS[np.dtype(layout.dtype).itemsize]
    count = jnp.zeros(shape[:-1], jnp.float32)
    return Selection(tuple(jnp.zeros(shape, one) for one in types), count, count)


def support_of(selection: Selection, layout: Layout = ENTRY) -> jax.Array:
    """Returns the support that a selection carries."""
    low, *high = (part.astype(jnp.int32) for part in selection.parts)
    return sum((part * _BASE for part in high), low).astype(layout.dtype)


class Draw(NamedTuple):
    """What a selection depends on beside the gradient, as arrays."""

    key: jax.Array  # for scores that draw
    avoid: jax.Array | None = None  # support of entries that are not chosen


class Wanted(NamedTuple):
    """What to select in an array."""

    score: Score  # ranks the entries; the k best are selected
    k: int
    layout: Layout = ENTRY


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def selecting_tap(
    wanted: Wanted, param: jax.Array, selection: Selection, draw: Draw
) -> jax.Array:
    """Returns `param`; the "gradient" of `selection` is the support of its gradient.

    This selects in the backward pass itself, so that choosing the support of a large
    model needs no more memory than training it.

    Args:
      wanted: what to select.
      param: weight of any shape, of one layer.
      selection: `empty_selection` in the shape of the support.
      draw: for scores that draw, and what is not to be chosen.

    Example:
      >>> from sparse_jax.supports.scores import SCORES
      >>> w, draw = jnp.array([1.0, -3.0, 2.0]), Draw(jax.random.key(0))
      >>> wanted = Wanted(SCORES["gradient"], 2)
      >>> loss = lambda s: jnp.sum(selecting_tap(wanted, w, s, draw) ** 2)
      >>> support_of(jax.grad(loss)(empty_selection((2,))))
      Array([1, 2], dtype=int32)
    """
    del wanted, selection, draw
    return param


def _select_forward(wanted, param, selection, draw):
    """Keeps what the score may want to see, and the shapes and types of a support."""
    del wanted
    like = jax.tree.map(lambda x: jnp.empty((0, *x.shape), x.dtype), selection)
    return param, (param, like, draw)


def _select_backward(wanted, kept, cotangent):
    """Selects from the dense gradient."""
    param, like, draw = kept
    options = {"avoid": draw.avoid, "capacity": like.parts[0].shape[-1]}
    support, count = wanted.layout.choose(
        wanted.score,
        wanted.score.added(cotangent),
        param,
        wanted.k,
        draw.key,
        **options,
    )
    numbers = support.astype(jnp.int32)
    bad = jnp.broadcast_to(~jnp.isfinite(cotangent).all(), count.shape)
    parts = (numbers % _BASE, numbers // _BASE)[: len(like.parts)]
    found = Selection(parts, bad, count)
    cast = lambda x, like: x.astype(like.dtype)
    return None, jax.tree.map(cast, found, like), None


selecting_tap.defvjp(_select_forward, _select_backward)

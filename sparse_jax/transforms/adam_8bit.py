"""Adam with moments of 8 bits: codes of both, and a scale for every block of them."""

import functools
import math
import re
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike

from sparse_jax.errors import InputError
from sparse_jax.params.names import Rule, map_named, patterns

__all__ = ["Adam8bitState", "decoded", "encoded", "scale_by_adam_8bit"]

Tree = TypeVar("Tree")
# The step of a leaf, then its codes and scales.
Leaves = tuple[jax.Array, ...]

_BLOCK = 256
_MIN_SIZE = 4096  # smaller arrays keep float32 moments, as in bitsandbytes
# An axis is cut into as many equal parts as divide it, at most these, before it is cut
# into blocks: then no block lies in two shards of a mesh axis of 2, 4, 8 or 16 devices.
_PARTS = 16
_COLUMNS, _TILE = 128, 8
# Magnitudes that a code can have.
_SIGNED, _UNSIGNED = 127, 255
# Odd numbers near 2**32 times an irrational: successive multiples spread evenly. The
# first two count updates, for mu and nu, the others places along the axes.
_TURNS = (0x9E3779B9, 0xC13FA9A9)
_PLACES = (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)


class Adam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`. Arrays that are too small are float32 moments."""

    count: jax.typing.ArrayLike  # shape=(), int32: updates seen
    mu: optax.Updates  # as params, int8
    nu: optax.Updates  # as params, uint8
    mu_scale: optax.Updates  # float32, blocks for values along one axis; shape=(0,) if
    nu_scale: optax.Updates  # there are no codes


def scale_by_adam_8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    stacked: Rule | None = None,
    min_size: int = _MIN_SIZE,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, with moments stored in 8 bits.

        mu = b1 mu + (1 - b1) g,    nu = b2 nu + (1 - b2) g**2
        update = mu / (1 - b1**t) / (sqrt(nu / (1 - b2**t)) + eps)

    in float32; what is kept of a moment is a code for each value and a float32 scale
    for each block of at most 256 values:

        mu = s (c / 127)**3,    s = max |mu|,         c in -127 ... 127
        nu = s (c / 255)**6,    s = max nu,           c in 0 ... 255

    Blocks run down the columns of a matrix; a vector is first laid out in rows of 128.
    The largest value of a block is exact. The others are rounded up or down so that
    they are right on average: with p the place of a value between two codes, the upper
    one is taken if p exceeds a number in [0, 1) that runs through multiples of an
    irrational from update to update. Rounding to the nearest would lose all changes
    below half a code, which those of nu, at most a thousandth of it, mostly are. A nu
    above zero never becomes zero.

    What holds for Adam, |mu| <= C sqrt(nu) with C**2 = (1 - b1)**2 / (1 - b2) / (1 -
    b1**2 / b2), is enforced, so that no rounding makes an update longer than Adam's
    longest.

    A large array costs 2 + 1/32 bytes per value instead of 8.

    Args:
      b1: decay rate of the first moment.
      b2: of the second.
      eps: term added to the denominator.
      stacked: expressions, searched for in the leaf names, of the leaves whose first
        axis counts layers, each of which is an array of its own. Vectors are updated
        one layer after the other, so that no float32 moments are larger than a layer.
      min_size: values from which on an array has codes; a smaller one keeps float32
        moments.

    Returns:
      A transformation whose updates have the dtypes of the parameters, or of the
      gradients if `update` gets none.

    Raises:
      InputError: if the decay rates are such that updates of Adam have no bound.

    Example:
      >>> tx = scale_by_adam_8bit()
      >>> params = {"w": jnp.ones(4096)}
      >>> state = tx.init(params)
      >>> update, state = tx.update({"w": jnp.linspace(-1, 1, 4096)}, state, params)
      >>> update["w"][:2].round(3), state.mu["w"].dtype, state.nu_scale["w"].shape
      (Array([-1., -1.], dtype=float32), dtype('int8'), (16,))

    References:
      Dettmers et al., 2022, 8-bit Optimizers via Block-wise Quantization:
      https://arxiv.org/abs/2110.02861
    """
    if not 0 <= b1 < 1 or not b1**2 < b2 < 1:
        raise InputError(
            f"`b2` must be in (b1**2, 1) for moments of 8 bits, got {b2} with b1 {b1}. "
            "Those of adamw are 0.9 0.999."
        )
    most = (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))
    is_stack = lambda name: any(re.search(rule, name) for rule in patterns(stacked))

    def is_vectors(name: str, leaf: jax.Array) -> bool:
        # Of matrices the compiler needs no temporaries.
        return is_stack(name) and leaf.ndim > 1 and not _cut(leaf.shape[1:]).is_matrix

    def init_fn(params: optax.Params) -> Adam8bitState:
        layers_of = lambda name, leaf: leaf.shape[: is_stack(name)]
        small = lambda layers, leaf: leaf.size < min_size * math.prod(layers)

        def code(name: str, leaf: jax.Array, dtype: DTypeLike) -> jax.Array:
            wide = jnp.promote_types(leaf.dtype, jnp.float32)
            is_small = small(layers_of(name, leaf), leaf)
            return jnp.zeros_like(leaf, wide if is_small else dtype)

        def scale(name: str, leaf: jax.Array) -> jax.Array:
            if small(layers := layers_of(name, leaf), leaf):
                return jnp.zeros((*layers, 0), jnp.float32)
            layers = leaf.shape[: is_vectors(name, leaf)]
            cut = _cut(leaf.shape[len(layers) :])
            return jnp.zeros((*layers, *cut.scale_shape), jnp.float32)

        codes = (
            map_named(functools.partial(code, dtype=dtype), params)
            for dtype in (jnp.int8, jnp.uint8)
        )
        scales = (map_named(scale, params) for _ in range(2))
        return Adam8bitState(jnp.zeros([], jnp.int32), *codes, *scales)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, Adam8bitState]:
        del extra_args
        count = optax.safe_increment(state.count)
        turn = jnp.asarray(count, jnp.uint32)

        def moved(
            grad: jax.Array, mu: jax.Array, nu: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            wide = jnp.promote_types(grad.dtype, jnp.float32)
            grad, t = grad.astype(wide), jnp.asarray(count, wide)
            mu, nu = b1 * mu + (1 - b1) * grad, b2 * nu + (1 - b2) * grad * grad
            room = most * jnp.sqrt(nu)
            mu = jnp.clip(mu, -room, room)
            return mu / (1 - b1**t) / (jnp.sqrt(nu / (1 - b2**t)) + eps), mu, nu

        def coded(turn: jax.Array, grad: jax.Array, *kept: jax.Array) -> Leaves:
            cut = _cut(grad.shape, kept[2].shape)
            scales = map(cut.rows, kept[2:])
            # Compilers of TPUs take minutes over arithmetic that is fused with cutting
            # a vector; matrices are cut where they lie.
            still = (lambda x: x) if cut.is_matrix else lax.optimization_barrier
            grad, *codes = still([*map(cut.blocks, (grad, *kept[:2]))])
            step, mu, nu = moved(grad, *_read(*codes, *scales))
            mu, nu, *scales = _written(mu, nu, turn)
            new = still([step, mu, nu])
            return *map(cut.whole, new), *map(cut.scales, scales)

        def one(
            name: str, grad: jax.Array, like: jax.Array, *kept: jax.Array
        ) -> Leaves:
            if kept[0].dtype != jnp.int8:
                step, mu, nu = moved(grad, *kept[:2])
                mu, nu = mu.astype(kept[0].dtype), nu.astype(kept[1].dtype)
                return step.astype(like.dtype), mu, nu, *kept[2:]
            if not is_vectors(name, grad):
                step, *new = coded(turn, grad, *kept)
                return step.astype(like.dtype), *new

            def layer(i: jax.Array, done: Leaves) -> Leaves:
                # What is overwritten is read before.
                row = lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False)
                own = turn + i.astype(jnp.uint32) * jnp.uint32(_PLACES[-1])
                new = coded(own, row(grad), *map(row, done[1:]))
                put = lambda x, row: lax.dynamic_update_index_in_dim(
                    x, row.astype(x.dtype), i, 0
                )
                return tuple(map(put, done, new))

            # One after the other, so that what is float32 is no larger than a layer.
            done = (jnp.zeros(grad.shape, like.dtype), *kept)
            return lax.fori_loop(0, grad.shape[0], layer, done)

        like = updates if params is None else params
        found = map_named(one, updates, like, *state[1:])
        step, *moments = _apart(found, updates, 5)
        return step, Adam8bitState(count, *moments)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def decoded(state: Tree) -> Tree:
    """Returns a state of Optax whose moments of 8 bits are float32, without scales."""

    def decode(node: Any) -> Any:
        if not isinstance(node, Adam8bitState):
            return node
        values = jax.tree.map(_values, *node[1:])
        mu, nu = _apart(values, node.mu, 2)
        none = jax.tree.map(lambda _: jnp.zeros(0, jnp.float32), mu)
        return Adam8bitState(node.count, mu, nu, none, none)

    return jax.tree.map(decode, state, is_leaf=_is_own)


def encoded(state: Tree, like: Tree) -> Tree:
    """Returns what `decoded` was given, with codes and scales as `like` has them."""

    def encode(node: Any, like: Any) -> Any:
        if not isinstance(node, Adam8bitState):
            return node
        one = lambda mu, nu, *kept: _kept(mu, nu, node.count, *kept)
        found = jax.tree.map(one, node.mu, node.nu, *like[1:])
        return Adam8bitState(node.count, *_apart(found, node.mu, 4))

    return jax.tree.map(encode, state, like, is_leaf=_is_own)


def _apart(found: Any, like: Any, number: int) -> list[Any]:
    """Returns a tree for each of the arrays that are together at the leaves of one."""
    # `jax.tree.transpose` refuses a tree without leaves, as of what is not trained.
    rows = (outer := jax.tree.structure(like)).flatten_up_to(found)
    return [outer.unflatten(row[i] for row in rows) for i in range(number)]


def _is_own(node: object) -> bool:
    """Returns whether a node of a state is one of this file."""
    return isinstance(node, Adam8bitState)


def _values(
    mu: jax.Array, nu: jax.Array, mu_scale: jax.Array, nu_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the moments of an array."""
    if mu.dtype != jnp.int8:
        return mu, nu
    cut = _cut(mu.shape, mu_scale.shape)
    blocks = (cut.blocks(mu), cut.blocks(nu), cut.rows(mu_scale), cut.rows(nu_scale))
    one, two = _read(*blocks)
    return cut.whole(one), cut.whole(two)


def _kept(
    mu: jax.Array, nu: jax.Array, count: jax.typing.ArrayLike, *kept: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns codes and scales of moments, in the dtypes and shapes of those given."""
    if kept[0].dtype != jnp.int8:
        # What is given may have shapes only.
        none = (jnp.zeros(scale.shape, scale.dtype) for scale in kept[2:])
        return mu.astype(kept[0].dtype), nu.astype(kept[1].dtype), *none
    cut = _cut(mu.shape, kept[2].shape)
    codes = _written(cut.blocks(mu), cut.blocks(nu), jnp.asarray(count, jnp.uint32))
    return *map(cut.whole, codes[:2]), *map(cut.scales, codes[2:])


def _read(mu: jax.Array, nu: jax.Array, *scales: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the moments of blocks [..., blocks, width, columns]."""
    part, root = mu.astype(jnp.float32) / _SIGNED, nu.astype(jnp.float32) / _UNSIGNED
    one, two = (jnp.expand_dims(scale, -2) for scale in scales)
    root = root * root * root
    return part * part * part * one, root * root * two


def _written(mu: jax.Array, nu: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
    """Returns codes and scales of blocks [..., blocks, width, columns]."""
    size = jnp.abs(mu)
    scales = [jnp.max(x, -2).astype(jnp.float32) for x in (size, nu)]
    one, two = (jnp.expand_dims(scale, -2) for scale in scales)
    place = _places(mu.shape)
    turn = [place + count * jnp.uint32(number) for number in _TURNS]
    sign = _code(size, one, _SIGNED, 3, turn[0]) * jnp.sign(mu)
    code = _code(nu, two, _UNSIGNED, 6, turn[1])
    code = jnp.where(nu > 0, jnp.maximum(code, 1), 0)
    return sign.astype(jnp.int8), code.astype(jnp.uint8), *scales


def _code(
    x: jax.Array, largest: jax.Array, codes: int, power: int, turn: jax.Array
) -> jax.Array:
    """Returns codes of numbers of 0 or more, right on average."""
    part = jnp.where(largest > 0, x / largest, 0)
    root = jnp.cbrt(part if power == 3 else jnp.sqrt(part))
    below = jnp.clip(jnp.floor(root * codes), 0, codes - 1)
    low, high = (below / codes) ** power, ((below + 1) / codes) ** power
    # Of 32 bits a float32 holds 24.
    drawn = (turn >> 8).astype(jnp.float32) / 2**24
    return below + (part - low > drawn * (high - low))


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Returns a number of 32 bits for every place of an array."""
    total = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        odd = jnp.uint32(_PLACES[axis % len(_PLACES)])
        total += lax.broadcasted_iota(jnp.uint32, shape, axis) * odd
    return total


class _Cut(NamedTuple):
    """How an array is cut into blocks, which run down the columns of a matrix.

    A vector becomes a matrix of 128 columns, the width of a register of a TPU.
    """

    shape: tuple[int, ...]
    is_matrix: bool  # else the last axis is a vector
    parts: int  # of the axis that is cut
    blocks_of_part: int
    width: int
    columns: int

    def blocks(self, x: jax.Array) -> jax.Array:
        """Returns an array as [..., blocks, width, columns], with zeros at the ends."""
        parts, before, after = self.parts, self._before, self._after
        each = self.shape[len(before)] // parts
        room = [(0, 0)] * (len(before) + 2 + len(after))
        room[len(before) + 1] = (0, self._room - each)
        x = jnp.pad(x.reshape(*before, parts, each, *after), room)
        return x.reshape(*self.rows_shape[:-1], self.width, self.columns)

    def whole(self, x: jax.Array) -> jax.Array:
        """Returns an array from its blocks."""
        parts, before, after = self.parts, self._before, self._after
        each = self.shape[len(before)] // parts
        x = x.reshape(*before, parts, self._room, *after)
        return lax.slice_in_dim(x, 0, each, axis=len(before) + 1).reshape(self.shape)

    def rows(self, scale: jax.Array) -> jax.Array:
        """Returns the scales of blocks as [..., blocks, columns]."""
        return scale.reshape(self.rows_shape)

    def scales(self, rows: jax.Array) -> jax.Array:
        """Returns the scales as they are kept."""
        return rows.reshape(self.scale_shape)

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The shape of scales beside blocks."""
        return *self._before, self.parts * self.blocks_of_part, self.columns

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of scales that are kept, with as many axes as the array."""
        *before, blocks, columns = self.rows_shape
        return self.rows_shape if self.is_matrix else (*before, blocks * columns)

    @property
    def _before(self) -> tuple[int, ...]:
        """The axes in front of the one that is cut."""
        return self.shape[: -1 - self.is_matrix]

    @property
    def _after(self) -> tuple[int, ...]:
        """The axes behind it."""
        return self.shape[-1:] if self.is_matrix else ()

    @property
    def _room(self) -> int:
        """The length of a part, filled up to whole blocks."""
        room = self.blocks_of_part * self.width
        return room if self.is_matrix else room * self.columns


def _cut(shape: tuple[int, ...], scales: tuple[int, ...] | None = None) -> _Cut:
    """Returns how an array of some shape, with scales of some shape, is cut."""
    is_matrix = len(shape) > 1 and shape[-2] >= _BLOCK
    found = _cut_as(shape, is_matrix)
    # A stack of so many vectors looks like a matrix.
    return found if scales in (None, found.scale_shape) else _cut_as(shape, False)


def _cut_as(shape: tuple[int, ...], is_matrix: bool) -> _Cut:
    """Returns how an array is cut as a matrix, or as vectors."""
    size = shape[-2] if is_matrix else shape[-1]
    parts = math.gcd(size, _PARTS)
    each = size // parts
    columns = shape[-1] if is_matrix else min(_COLUMNS, -(-each // _BLOCK))
    rows = each if is_matrix else -(-each // columns)
    blocks = -(-rows // _BLOCK)
    width = -(-rows // blocks)
    # Of several blocks none begins within a tile of a TPU.
    width = width if blocks == 1 else -(-width // _TILE) * _TILE
    return _Cut(shape, is_matrix, parts, blocks, width, columns)

"""A stack of equal layers: created at once, run by one scan."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.models.attachment import (
    Arrays,
    Attachment,
    LayerValues,
    Slots,
    Stack,
)
from sparse_jax.models.attend import recompute_scores
from sparse_jax.models.cached import Cached, KeysValues
from sparse_jax.models.slots import run_slots
from sparse_jax.params.axes import keep_batch_sharded, platform

_NOTHING = Attachment()
_METHOD = 0x6D  # any number; the layer splits its key and folds nothing in

__all__ = [
    "LayerOptions",
    "ModelOptions",
    "default_unroll",
    "of_kinds",
    "run_cached_layers",
    "run_reading_layers",
    "run_layers",
    "stack_layers",
]

Layer = TypeVar("Layer", bound=nnx.Module)
Kind = TypeVar("Kind")
T = TypeVar("T")


class LayerOptions(TypedDict, total=False):
    """How a model runs its layers: the options of `run_layers` beside the key."""

    attachment: Attachment
    unroll: int | None
    checkpoint: bool
    states: bool


class ModelOptions(LayerOptions, total=False):
    """How a model runs: its layers, and the NEFTune noise on its words."""

    noise: float


def stack_layers(
    create: Callable[[nnx.Rngs], Layer], num_layers: int, rngs: nnx.Rngs
) -> Layer:
    """Creates `num_layers` layers as one module whose arrays start with `[L]`."""
    keys = jax.random.split(rngs.params(), num_layers)
    return jax.vmap(lambda key: create(nnx.Rngs(key)))(keys)


def run_layers(
    layers: nnx.Module,
    x: jax.Array,
    *context: object,
    kinds: Sequence[int] | None = None,
    key: jax.Array | None = None,
    attachment: Attachment = _NOTHING,
    unroll: int | None = None,
    checkpoint: bool = False,
    states: bool = False,
) -> jax.Array:
    """Runs `x` through a stack of layers.

    A layer is called as `layer(x, *context, key, respond)` and returns the next `x`.

    Args:
      layers: module made by `stack_layers`.
      x: input of the first layer, `[B, T, D]`; its dtype is kept through the stack.
      *context: arrays that every layer sees, such as the attention mask.
      kinds: the entry of every array of `context` that each layer sees, where these
        are stacked by `of_kinds`; None is all of it.
      key: source of one key for each layer; None turns dropout off.
      attachment: what a method adds to the layers.
      unroll: layers run in one pass of the loop; None is all of a few layers on CPU,
        without `checkpoint` and unless the attachment asks for a loop, else one. A
        loop over single layers recomputes the attention scores of many keys, see
        `attend`.
      checkpoint: whether the backward pass computes each layer again instead of
        keeping its intermediate values.
      states: whether to return what enters every layer, too; not with slots.

    Returns:
      Output of the last layer, `[B, T, D]`; with `states` all, `[L + 1, B, T, D]`.
    """
    graphdef, state = nnx.split(layers)
    params = nnx.to_pure_dict(state)
    num_layers = jax.tree.leaves(params)[0].shape[0]
    keys = None if key is None else jax.random.split(key, num_layers)
    if unroll is None:
        unroll = 1 if attachment.is_loop else default_unroll(num_layers, checkpoint)
    is_loop = attachment.slots is not None or attachment.loop is not None
    # Of unrolled layers XLA:CPU keeps the scores anyway, and a layer that is
    # checkpointed recomputes them as it is.
    recomputes = (is_loop or unroll == 1) and not checkpoint

    def call(x: jax.Array, one: tuple, context: tuple) -> jax.Array:
        layer_params, trained, layer_key, _ = one
        layer: Any = nnx.merge(graphdef, attachment.weights(layer_params, trained))
        # Another key than those that the layer itself draws from.
        key = None if layer_key is None else jax.random.fold_in(layer_key, _METHOD)
        respond = lambda site, f, x: attachment.response(site, f, x, trained, key)
        with recompute_scores(recomputes):
            y = layer(x, *context, layer_key, respond).astype(x.dtype)
        return keep_batch_sharded(y)

    stacked = (params, attachment.trained, keys, _numbers(kinds))
    x = keep_batch_sharded(x)
    if attachment.slots is not None:
        return _run_with_slots(call, x, stacked, context, attachment.slots, checkpoint)
    run = lambda x, one, context: call(x, one, _own(context, one))
    # Another loop returns the last output alone.
    if attachment.loop is not None and not states:
        params, _, *rest = stacked
        return attachment.loop(Stack(run, x, params, rest, context, checkpoint))
    body = lambda x, one: (run(x, one, context), x if states else None)
    if checkpoint:
        # Inside a real loop the compiler cannot merge the two forward passes.
        body = jax.checkpoint(body, prevent_cse=unroll > 1)
    x, before = jax.lax.scan(body, x, stacked, unroll=unroll)
    return x if before is None else jnp.concatenate([before, x[None]])


def run_reading_layers(
    layers: nnx.Module,
    x: jax.Array,
    *context: object,
    kinds: Sequence[int] | None = None,
    attachment: Attachment,
) -> tuple[jax.Array, KeysValues]:
    """Runs `x` through a stack of layers, and keeps the keys and values.

    A layer is called as `layer.extend(x, *context, None, respond, None)`; the arguments
    are those of `run_layers`.

    Returns:
      Output of the last layer, and keys and values of all, `[L, B, T, G, K]`.
    """
    graphdef, state = nnx.split(layers)

    def body(x: jax.Array, one: tuple) -> tuple[jax.Array, KeysValues]:
        call = _extending(graphdef, attachment, one)
        y, kept = call(x, *_own(context, one), None)
        return keep_batch_sharded(y.astype(x.dtype)), kept

    stacked = (nnx.to_pure_dict(state), attachment.trained, _numbers(kinds))
    return jax.lax.scan(body, x, stacked)


def run_cached_layers(
    layers: nnx.Module,
    x: jax.Array,
    kept: Sequence[KeysValues],
    start: jax.Array,
    *context: object,
    kinds: Sequence[int] | None = None,
    attachment: Attachment,
    parts: Sequence[Arrays] | None = None,
) -> tuple[jax.Array, tuple[KeysValues, ...]]:
    """Runs `x` through a stack of layers that remember keys and values.

    A layer is called as `layer.extend(x, *context, None, respond, cached)`.

    Args:
      layers: module made by `stack_layers`.
      x: input of the first layer, `[B, T, D]`.
      kept: keys and values of all layers in one, `[L, B, G, S, K]`, or of each,
        `[B, G, S, K]`.
      start: columns in use, int32.
      *context: arrays that every layer sees.
      kinds: as of `run_layers`.
      attachment: what a method adds to the layers.
      parts: parameters of each layer, `[1, ...]`, where keys and values are those of
        each; there is no loop then.

    Returns:
      Output of the last layer, and the keys and values with the new ones.
    """
    graphdef, state = nnx.split(layers)

    # All layers are alike, and traced once.
    @jax.jit
    def call(carry: tuple, one: tuple, start: jax.Array, context: tuple) -> tuple:
        x, (k, v) = carry
        *_, number, _ = one
        here = Cached(k, v, number, start)
        y, kept = _extending(graphdef, attachment, one)(x, *_own(context, one), here)
        return keep_batch_sharded(y.astype(x.dtype)), kept

    rest = (attachment.trained, _numbers(kinds))
    if parts is None:
        params = nnx.to_pure_dict(state)
        numbers = jnp.arange(len(kept[0].k))
        stacked = (params, rest[0], numbers, rest[1])
        body = lambda carry, one: (call(carry, one, start, context), None)
        (x, after), _ = jax.lax.scan(body, (x, *kept), stacked)
        return x, (after,)
    each = []
    for number, (part, old) in enumerate(zip(parts, kept, strict=True)):
        params = jax.tree.map(lambda leaf: leaf[0], part)
        trained, kind = jax.tree.map(lambda leaf, at=number: leaf[at], rest)
        x, new = call((x, old), (params, trained, None, kind), start, context)
        each.append(new)
    return x, tuple(each)


def _extending(
    graphdef: nnx.GraphDef, attachment: Attachment, one: tuple
) -> Callable[..., tuple[jax.Array, KeysValues]]:
    """Returns a layer as a function of its input, its context and its cache."""
    layer_params, trained, *_ = one
    layer: Any = nnx.merge(graphdef, attachment.weights(layer_params, trained))
    respond = lambda site, f, x: attachment.response(site, f, x, trained, None)
    return lambda x, *context: layer.extend(
        x, *context[:-1], None, respond, context[-1]
    )


def _run_with_slots(
    call: Callable[[jax.Array, tuple, tuple], jax.Array],
    x: jax.Array,
    stacked: tuple,
    context: tuple,
    slots: Slots,
    checkpoint: bool,
) -> jax.Array:
    """Runs the layers with a gradient for the active ones only."""

    def layer(x: jax.Array, one: tuple, row: LayerValues, context: tuple) -> jax.Array:
        layer_params, trained, *rest = one
        return call(x, (layer_params, trained.with_row(row), *rest), context)

    return run_slots(
        layer,
        x,
        stacked,
        slots.rows,
        context,
        slots.active,
        rows_of=lambda one: slots.rows_of(one[0], one[1]),
        own=_own,
        recompute="all" if checkpoint else slots.recompute,
    )


def of_kinds(kinds: Sequence[Kind], context: Callable[[Kind], T]) -> T:
    """Returns what layers of the only kind see, or of all kinds, stacked `[N, ...]`.

    Example:
      >>> of_kinds(["full"], lambda kind: jnp.zeros(3)).shape
      (3,)
      >>> of_kinds(["full", "sliding"], lambda kind: jnp.zeros(3)).shape
      (2, 3)
    """
    first, *others = [context(kind) for kind in kinds]
    if not others:
        return first
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), first, *others)


def _numbers(kinds: Sequence[int] | None) -> jax.Array | None:
    """Returns the kind of every layer, int32 `[L]`, if there are several."""
    return None if kinds is None else jnp.array(kinds, jnp.int32)


def _own(context: tuple, one: tuple) -> tuple:
    """Returns what a layer sees: that of its kind, the last of its arrays, if any."""
    kind = one[-1]
    if kind is None:
        return context
    pick = lambda arrays: jax.lax.dynamic_index_in_dim(arrays, kind, keepdims=False)
    return jax.tree.map(pick, context)


# Deeper stacks run in a loop on CPU too. Of SmolLM2-135M, 30 layers, updates take as
# long (3.4 s on two cores), their program a third of the time to compile (5 of 13 CPU
# seconds) and 0.8 GiB less; of MiniLM, 6 layers, they take 5 to 9 % longer in a loop.
_MOST_UNROLLED = 8


def default_unroll(num_layers: int, checkpoint: bool = False) -> int:
    """Returns all layers of a shallow stack on CPU, and otherwise 1.

    Checkpointed layers always run in a loop: XLA:CPU merges the two forward passes of
    unrolled code and keeps everything after all (measured: 370 MiB either way for an
    encoder of 30 M parameters, 64 in the loop).
    """
    is_shallow = num_layers <= _MOST_UNROLLED
    unrolls = is_shallow and platform() == "cpu" and not checkpoint
    return num_layers if unrolls else 1

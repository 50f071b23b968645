"""Rules: which axes of the mesh shard which leaves of a model."""

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax

from sparse_jax.errors import InputError
from sparse_jax.params.axes import FSDP, TENSOR
from sparse_jax.params.names import map_named
from sparse_jax.supports.layout import Shards

__all__ = ["RULES", "Rules", "shards_of", "specs_of"]

# (expression of leaf names, mesh axis of every dimension); the first match counts.
Rules = Sequence[tuple[str, tuple[str | None, ...]]]

_INTO = "(query|key|value|up|gate)"
_OUT_OF = "(output|down)"
# All families name their leaves alike, so these are the rules of all of them. The first
# dimension of a stack, its layers, is never sharded: a loop runs over it.
RULES: Rules = (
    (f"^layers/.*{_INTO}/kernel$", (None, FSDP, TENSOR)),
    (f"^layers/.*{_OUT_OF}/kernel$", (None, TENSOR, FSDP)),
    (f"^layers/.*{_INTO}/bias$", (None, TENSOR)),
    ("^embeddings/.*/embedding$", (TENSOR, FSDP)),
    ("^lm_head/kernel$", (FSDP, TENSOR)),
    ("^lm_head/bias$", (TENSOR,)),
    # Norms, other biases and classifiers are small.
    (".*", ()),
)


def specs_of(
    params: optax.Params, sizes: Mapping[str, int], rules: Rules = RULES
) -> tuple[object, dict[str, int]]:
    """Returns the partition of every leaf, and what could not be sharded as wanted.

    An axis is left out where it does not divide a dimension: the leaf is then whole
    along it on every device.

    Args:
      params: parameters, or their shapes.
      sizes: devices along the axes "fsdp" and "tensor".
      rules: ordered rules over leaf names.

    Returns:
      A tree of `jax.P`, and the names of leaves that an axis does not divide, with
      the bytes that each device holds more than if it did.

    Raises:
      InputError: if an axis longer than 1 divides no leaf at all.

    Example:
      >>> kernel = jax.ShapeDtypeStruct((2, 6, 6), np.float32)
      >>> specs_of({"layers": {"up": {"kernel": kernel}}}, {"fsdp": 2, "tensor": 1})
      ({'layers': {'up': {'kernel': P(None, 'fsdp', None)}}}, {})
    """
    used: set[str] = set()
    whole: dict[str, int] = {}

    def spec(name: str, leaf: jax.Array) -> jax.P:
        axes = _axes_of(name, rules)[: len(leaf.shape)]
        wanted = {d: axis for d, axis in enumerate(axes) if axis and sizes[axis] > 1}
        fits = lambda d: leaf.shape[d] % sizes[wanted[d]] == 0
        kept = {d: axis for d, axis in wanted.items() if fits(d)}
        used.update(kept.values())
        lost = math.prod(sizes[wanted[d]] for d in wanted.keys() - kept)
        if lost > 1:
            held = _bytes(leaf) // math.prod(sizes[axis] for axis in kept.values())
            whole[name] = held - held // lost
        return jax.P(*(kept.get(d) for d in range(len(leaf.shape))))

    specs = map_named(spec, params)
    for axis in (FSDP, TENSOR):
        if sizes[axis] > 1 and axis not in used:
            held = sum(map(_bytes, jax.tree.leaves(params)))
            raise InputError(
                f"`mesh` must have axes that divide the model, got {axis}="
                f"{sizes[axis]}, which divides no leaf of it: every device would hold "
                f"all {held / 1e6:.3g} MB. Use data={sizes[axis]}, or a smaller {axis}."
            )
    return specs, whole


def shards_of(
    specs: object, sizes: Mapping[str, int], stack: str | None
) -> dict[str, Shards]:
    """Returns how the leaves that are sharded are sharded, by name.

    Args:
      specs: tree of partitions.
      sizes: devices along every axis.
      stack: subtree whose leaves start with the layer axis, which is whole.

    Example:
      >>> specs = {"layers": {"w": jax.P(None, "fsdp", None)}, "norm": jax.P(None)}
      >>> shards_of(specs, {"fsdp": 4}, "layers")
      {'layers/w': Shards(names=(('fsdp',), ()), counts=(4, 1))}
    """
    shards: dict[str, Shards] = {}

    def add(name: str, spec: jax.P) -> None:
        is_stacked = stack is not None and name.startswith(f"{stack}/")
        names = tuple((axis,) if axis else () for axis in spec[int(is_stacked) :])
        counts = tuple(sizes[axes[0]] if axes else 1 for axes in names)
        if any(names):
            shards[name] = Shards(names, counts)

    map_named(add, specs)
    return shards


def _bytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Returns the size of an array."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _axes_of(name: str, rules: Rules) -> tuple[str | None, ...]:
    """Returns the axes of the first rule that matches."""
    return next((axes for rule, axes in rules if re.search(rule, name)), ())

"""What a CPU needs to read a few tokens at a time as fast as its memory."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sparse_jax.models.attachment import Arrays
from sparse_jax.models.functional import Params
from sparse_jax.params.axes import is_one_cpu

__all__ = ["compiled", "layers_apart"]

# Products by Eigen, not by YNNPACK: a step of eight rows through maps of 576 x 1536
# reads weights at 5.4 instead of 2.9 GB/s, and 1,024 rows at 56 instead of 50 GFLOP/s.
_EIGEN = {"xla_cpu_experimental_ynn_fusion_type": ""}


def compiled(function: Callable[..., Any], static: Sequence[str]) -> Callable[..., Any]:
    """Compiles a function as `jax.jit` does, with the options for a CPU if it is one.

    Args:
      function: of arrays.
      static: names of its arguments that are none.

    Example:
      >>> compiled(lambda x, *, times: times * x, ["times"])(2.0, times=3)
      Array(6., dtype=float32, weak_type=True)
    """
    plain = jax.jit(function, static_argnames=static)
    quick = jax.jit(function, static_argnames=static, compiler_options=_EIGEN)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        chosen = quick if is_one_cpu() and _has_option() else plain
        return chosen(*args, **options)

    return call


@functools.cache
def _has_option() -> bool:
    """Returns whether this compiler has the option, which is an experimental one."""
    try:
        jax.jit(lambda: 0, compiler_options=_EIGEN).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def layers_apart(params: Params) -> tuple[Arrays, ...] | None:
    """Returns the parameters of each layer `[1, ...]` on one CPU, otherwise None.

    They share the memory of the stack `[L, ...]`. A loop over the stack has to copy
    every layer before a product can read it, which for a few tokens takes as long as
    the products.

    Example:
      >>> params = {"layers": {"norm": {"scale": jax.numpy.ones((2, 4))}}}
      >>> [one["norm"]["scale"].shape for one in layers_apart(params)]
      [(1, 4), (1, 4)]
    """
    leaves = jax.tree.leaves(params["layers"])
    is_whole = lambda leaf: isinstance(leaf, jax.Array) and len(leaf.devices()) == 1
    if not (is_one_cpu() and all(map(is_whole, leaves))):
        return None
    # A view by another name: an array keeps what `np.asarray` made of it.
    view = lambda leaf: np.asarray(leaf.addressable_data(0))
    stacked = jax.tree.map(view, params["layers"])
    take = lambda i: lambda leaf: jax.device_put(leaf[i : i + 1], may_alias=True)
    return tuple(jax.tree.map(take(i), stacked) for i in range(len(leaves[0])))

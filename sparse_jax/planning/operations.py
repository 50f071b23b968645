"""What a traced function has to do: products of matrices, and kernels."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from sparse_jax.models.slots import SAMPLED
from sparse_jax.planning.often import ALWAYS, Often
from sparse_jax.samplers.sampler import PROBE

__all__ = ["Kernel", "count_flops", "kernels_of"]


def count_flops(
    function: Callable[..., object], *args: object, often: Often = ALWAYS
) -> int:
    """Returns the multiplications and additions in the matrix products of a function.

    Loops count as often as they run, which compilers' own counts leave out. A loop
    without a fixed number of rounds counts once, and of branches the largest.

    Args:
      function: any function that JAX can trace.
      *args: arrays or their shapes.
      often: of loops over sampled layers, their branches, and probes.

    Example:
      >>> import jax.numpy as jnp
      >>> count_flops(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5)))
      60
    """
    return round(_in_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, often))


def _in_jaxpr(jaxpr: Jaxpr, often: Often, is_sampled: bool = False) -> float:
    """Returns the operations of a traced function that its results need."""
    # A frozen layer makes gradients that nothing reads, which the compiler drops.
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(_in_equation(one, often, is_sampled) for one in jaxpr.eqns)


def _in_equation(equation: JaxprEqn, often: Often, is_sampled: bool) -> float:
    """Returns the operations of one equation, and of the functions it calls.

    Args:
      equation: the equation.
      often: as of `count_flops`.
      is_sampled: whether it is in a loop over sampled layers, and in no branch.
    """
    kind = equation.primitive.name
    # Such as "transpose(jvp(sampled_layers))".
    scope = str(equation.source_info.name_stack).rstrip(")")
    if kind == "dot_general":
        return _in_product(equation)
    loops = kind == "while" and scope.endswith(SAMPLED)
    inside = loops or (is_sampled and kind != "cond")
    inner = [_in_jaxpr(one, often, inside) for one in _called(equation)]
    if kind == "cond":
        share = often.probes if scope.endswith(PROBE) else None
        share = often.trained if is_sampled else share
        if share is None:
            return max(inner)
        without, taken = inner
        return (1 - share) * without + share * taken
    times = equation.params["length"] if kind == "scan" else 1
    times = often.layers if loops else times
    if kind == "pallas_call":
        # Every block of a kernel counts, those that its mask leaves out too.
        times = math.prod(equation.params["grid_mapping"].grid)
    if kind == "shard_map":
        mesh = equation.params["mesh"]
        manual = equation.params.get("manual_axes", mesh.axis_names)
        times = math.prod(mesh.shape[axis] for axis in manual)
    return times * sum(inner)


def _called(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """Yields the functions that an equation calls."""
    for parameter in equation.params.values():
        for value in parameter if isinstance(parameter, tuple | list) else [parameter]:
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield inner


def _in_product(equation: Any) -> int:
    """Returns the operations of a matrix product."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)


class Kernel(NamedTuple):
    """What one call of a kernel does."""

    flops: float  # of its matrix products
    bytes: float  # of the blocks that it reads and writes


def kernels_of(
    function: Callable[..., object], *args: object
) -> dict[tuple[str, tuple[int, ...]], Kernel]:
    """Returns the kernels of a function, by name and shape of the last result.

    The arguments are those of `count_flops`.
    """
    found: dict[tuple[str, tuple[int, ...]], Kernel] = {}

    def visit(jaxpr: Jaxpr) -> None:
        for one in jaxpr.eqns:
            if one.primitive.name == "pallas_call":
                place = (_name(one), tuple(one.outvars[-1].aval.shape))  # pyright: ignore
                found[place] = _kernel(one)
            else:
                for inner in _called(one):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def _name(equation: JaxprEqn) -> str:
    """Returns the name of a kernel."""
    named: Any = equation.params.get("name_and_src_info", equation.params.get("name"))
    return getattr(named, "name", named)


def _kernel(equation: JaxprEqn) -> Kernel:
    """Returns what a kernel does."""
    mapping = equation.params["grid_mapping"]
    blocks = math.prod(mapping.grid)
    size = sum(
        math.prod(_sizes(one.block_shape)) * one.array_aval.dtype.itemsize
        for one in mapping.block_mappings
    )
    return Kernel(_in_equation(equation, ALWAYS, False), blocks * size)


def _sizes(shape: tuple[Any, ...]) -> Iterator[int]:
    """Yields the sizes of a block; one without a size is a single index."""
    for one in shape:
        size = getattr(one, "block_size", one)
        yield size if isinstance(size, int) else 1

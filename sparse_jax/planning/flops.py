"""Operations of a program, counted in what JAX traces."""

import math
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["count_flops"]


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the multiplications and additions in the matrix products of a function.

    Loops count as often as they run, which compilers' own counts leave out. A loop
    without a fixed number of rounds counts once, and of branches the largest.

    Args:
      function: any function that JAX can trace.
      *args: arrays or their shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> count_flops(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5)))
      60
    """
    return _in_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _in_jaxpr(jaxpr: Any) -> int:
    """Returns the operations of a traced function."""
    return sum(_in_equation(equation) for equation in jaxpr.eqns)


def _in_equation(equation: Any) -> int:
    """Returns the operations of one equation, and of the functions it calls."""
    if equation.primitive.name == "dot_general":
        return _in_product(equation)
    inner = [
        _in_jaxpr(getattr(value, "jaxpr", value))
        for parameter in equation.params.values()
        for value in (parameter if isinstance(parameter, tuple | list) else [parameter])
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    if equation.primitive.name == "cond":
        return max(inner)
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    if equation.primitive.name == "shard_map":
        mesh = equation.params["mesh"]
        manual = equation.params.get("manual_axes", mesh.axis_names)
        times = math.prod(mesh.shape[axis] for axis in manual)
    return times * sum(inner)


def _in_product(equation: Any) -> int:
    """Returns the operations of a matrix product."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)

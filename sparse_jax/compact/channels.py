"""Rows and columns of kernels, whose gradients are made without the dense one.

Such a tap stands behind a product. It sees the gradient of the output, and makes of it
and of the input the gradient of the chosen channels. The kernel of the product itself
gets none, so that the tap of the leaf sees what else the model does with the kernel, if
anything.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.methods.method import Method
from sparse_jax.models.attachment import Arrays, LayerValues, Module
from sparse_jax.models.modules import with_product
from sparse_jax.supports.blocks import Blocks
from sparse_jax.supports.channels import (
    are_channels,
    gradient_of_channels,
    kept_of_input,
)
from sparse_jax.supports.roles import SPARSE, Role, Roles, map_roles

__all__ = ["channel_tap", "respond_by_channels"]

# (site, module, x, layer, key) -> output of the site
Response = Callable[[str, Module, jax.Array, Any, jax.Array | None], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def channel_tap(
    layout: Blocks, y: jax.Array, x: jax.Array, packed: jax.Array, support: jax.Array
) -> jax.Array:
    """Returns `y`, so that the gradient of its kernel at `support` belongs to `packed`.

        forward:  y        backward:  d loss / d packed = (x^T d loss / d y)[support]

    Nothing is propagated to `x`, and that of `y` as it is. Reverse mode only.

    Args:
      layout: of rows or of columns.
      y: product of x and a kernel, [..., F].
      x: [..., D].
      packed: what to differentiate with respect to, in the shape of packed values.
      support: as of the layout.

    Example:
      >>> rows, support = Blocks(rows=1, columns=None), jnp.array([1])
      >>> x, w = jnp.array([[1.0, 2.0]]), jnp.ones((2, 3))
      >>> loss = lambda packed: jnp.sum(channel_tap(rows, x @ w, x, packed, support))
      >>> jax.grad(loss)(jnp.zeros((1, 3)))
      Array([[2., 2., 2.]], dtype=float32)
    """
    del layout, x, packed, support
    return y


def _tap_forward(layout, y, x, packed, support):
    """Keeps of the input what is needed of it, and a dtype."""
    kept = kept_of_input(layout, x, support)
    return y, (kept, support, jnp.empty(0, packed.dtype))


def _tap_backward(layout, kept, dy):
    """Makes the gradient of the chosen channels."""
    x, support, like = kept
    packed = gradient_of_channels(layout, x, dy, support)
    return dy, None, packed.astype(like.dtype), None


channel_tap.defvjp(_tap_forward, _tap_backward)


def respond_by_channels(
    method: Method, roles: Roles, leaves_of: Callable[[LayerValues], Arrays]
) -> Response:
    """Returns the `response` of an attachment, with taps behind products.

    Args:
      method: what is trained.
      roles: of the leaves of the layers.
      leaves_of: returns the packed values of the leaves of a layer.
    """
    sites: dict[str, Role] = {}

    def note(role: Role) -> None:
        path, _, kind = role.name.removeprefix(f"{method.stack}/").rpartition("/")
        if kind == "kernel" and are_channels(role.layout, role.shape):
            sites[path] = role

    map_roles(note, roles, only=(SPARSE,))
    if not sites:
        return method.respond

    def response(
        site: str,
        module: Module,
        x: jax.Array,
        layer: LayerValues,
        key: jax.Array | None,
    ) -> jax.Array:
        if site in sites:
            role = sites[site]
            found = _of_leaf(role, roles, leaves_of(layer), layer.support)
            tapped = functools.partial(_tapped_product, role, *found)
            module = with_product(module, tapped)
        return method.respond(site, module, x, layer, key)

    return response


def _of_leaf(role: Role, roles: Roles, *trees: Arrays) -> tuple[jax.Array, ...]:
    """Returns what trees like that of the roles have for a leaf."""
    found: list[tuple[jax.Array, ...]] = []

    def note(other: Role, *leaves: jax.Array) -> None:
        if other.name == role.name:
            found.append(leaves)

    map_roles(note, roles, *trees, only=(SPARSE,))
    return found[0]


def _tapped_product(
    role: Role,
    packed: jax.Array,
    support: jax.Array,
    product: Callable[..., jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    *args: Any,
    **options: Any,
) -> jax.Array:
    """Returns a product whose kernel has its gradient at a support alone."""
    # Under explicit axes channels may lie on several devices.
    is_explicit = any(any(jax.typeof(array).sharding.spec) for array in (x, kernel))
    if kernel.shape != role.shape or is_explicit:
        return product(x, kernel, *args, **options)
    assert isinstance(role.layout, Blocks)
    y = product(x, lax.stop_gradient(kernel), *args, **options)
    return channel_tap(role.layout, y, lax.stop_gradient(x), packed, support)

"""The sites that a method adds to, their leaves, and how the new arrays start."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from sparse_jax.errors import InputError
from sparse_jax.models.attachment import Added, Parts
from sparse_jax.params.names import Rule, first_match, map_named, require_match
from sparse_jax.supports.scores import leaf_key

__all__ = [
    "Added",
    "Parts",
    "channels",
    "kernels_at",
    "map_sites",
    "uniform",
]


def channels(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a vector [D] in the dtype and the rank of x, `[..., D]`.

    Example:
      >>> import jax.numpy as jnp
      >>> channels(jnp.ones(4), jnp.ones((2, 3, 4), jnp.bfloat16)).shape
      (1, 1, 4)
    """
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def uniform(key: jax.Array, name: str, shape: tuple[int, int, int]) -> jax.Array:
    """Draws kernels (L, in, out) uniform in +-1 / sqrt(in), as PyTorch's and PEFT's.

    The draw depends on the key and the name, and not on other arrays.

    Example:
      >>> bool(jnp.abs(uniform(jax.random.key(0), "mlp/up", (2, 4, 3))).max() <= 0.5)
      True
    """
    draw = jax.random.uniform(leaf_key(key, name), shape, jnp.float32, -1.0, 1.0)
    return draw / jnp.sqrt(jnp.float32(shape[1]))


_KERNEL = "/kernel"


def kernels_at(
    argument: str, where: Rule, params: optax.Params, stack: str | None
) -> dict[str, jax.Array]:
    """Returns the kernels of the linear maps whose site a rule matches.

    Args:
      argument: name of the rule in messages.
      where: expressions of sites, such as "attention/query".
      params: parameters, or their shapes.
      stack: name of the subtree of the layers.

    Returns:
      Site -> kernel, shape=(L, in, out).

    Raises:
      InputError: if there is no such subtree, or an expression matches no site.

    Example:
      >>> params = {"layers": {"mlp": {"up": {"kernel": jnp.zeros((2, 3, 4))}}}}
      >>> kernels_at("where", "mlp", params, "layers")["mlp/up"].shape
      (2, 3, 4)
    """
    kernels = _kernels(params, stack)
    require_match(argument, where, list(kernels), "site")
    matches = lambda site: first_match({"here": where}, site, "") == "here"
    return {site: kernel for site, kernel in kernels.items() if matches(site)}


def map_sites(
    function: Callable[[str, jax.Array, Parts], jax.Array],
    params: optax.Params,
    added: Added,
    stack: str | None,
) -> optax.Params:
    """Maps `function(kind, leaf, added[site])` over the leaves of the sites in `added`.

    The function gets a leaf in float32 with its kind, such as "kernel" or "bias"; what
    it returns is rounded to the dtype of the leaf. Other leaves stay as they are.

    Example:
      >>> params = {"layers": {"up": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}}
      >>> double = lambda kind, leaf, arrays: 2 * leaf if kind == "bias" else leaf
      >>> map_sites(double, params, {"up": {}}, "layers")["layers"]["up"]["bias"]
      Array([2., 2.], dtype=float32)
    """

    def change(name: str, leaf: jax.Array) -> jax.Array:
        path, _, kind = name.rpartition("/")
        root, _, site = path.partition("/")
        if root != stack or site not in added:
            return leaf
        new = function(kind, leaf.astype(jnp.float32), added[site])
        return new.astype(leaf.dtype)

    return map_named(change, params)


def _kernels(params: object, stack: str | None) -> dict[str, jax.Array]:
    """Returns the stacked kernels of the layers by the name of their site."""
    subtrees = params if isinstance(params, Mapping) else {}
    if stack is None or stack not in subtrees:
        names = ", ".join(sorted(map(str, subtrees)))
        raise InputError(
            f"`stack` must name a subtree of the parameters whose leaves are layers, "
            f"[L, ...], to add something to them, got {stack!r}. "
            f"{f'The subtrees are {names}.' if names else 'There are no subtrees.'} "
            "Without a stack take `Sparse` or `Dense`."
        )
    found: dict[str, jax.Array] = {}

    def visit(name: str, leaf: jax.Array) -> None:
        if name.endswith(_KERNEL) and leaf.ndim == 3:
            found[name.removesuffix(_KERNEL)] = leaf

    map_named(visit, subtrees[stack])
    if not found:
        raise InputError(
            f"`stack` must name layers with linear maps, got {stack!r} without any: "
            "leaves `<site>/kernel` of shape [L, in, out]. Use `Sparse` or `Dense`, "
            "which train leaves of any name and shape."
        )
    return found

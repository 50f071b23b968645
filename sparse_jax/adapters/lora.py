"""LoRA: add a product of two thin matrices to linear maps."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.adapters.method import Method
from sparse_jax.errors import InputError
from sparse_jax.names import Rule, map_named, require_match
from sparse_jax.scores import leaf_key
from sparse_jax.sites import Module

__all__ = ["LoRA"]


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Trains a rank-r update of the linear maps at the sites that `where` matches.

        y = x @ W + (alpha / rank) * (x @ A) @ B

    A, shape=(L, in, rank), starts uniform in +-1 / sqrt(in) as in PEFT; B,
    shape=(L, rank, out), starts at zero. Both are float32 and used in the dtype of x.

    Raises:
      InputError: if `rank` is not positive, or (on `added`) nothing matches `where`.

    Example:
      >>> LoRA(rank=8, where="query|value", dense="classifier").scale
      2.0

    References:
      Hu et al., 2021, https://arxiv.org/abs/2106.09685
    """

    rank: int
    where: Rule = "attention"
    alpha: float | None = None  # None is 2 * rank.

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(
                f"`rank` must be at least 1, got {self.rank}. Common values are "
                "4 to 64."
            )

    @property
    def scale(self) -> float:
        """Factor of the added product."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def added(self, params: Any, key: jax.Array) -> Any:
        """Returns {site: {"a": ..., "b": ...}} for every matching site."""
        kernels = self._kernels(params)
        require_match("where", self.where, list(kernels))
        patterns = (self.where,) if isinstance(self.where, str) else self.where
        sites = [s for s in kernels if any(re.search(p, s) for p in patterns)]

        def create(site: str) -> dict[str, jax.Array]:
            layers, width, height = kernels[site].shape
            draw = jax.random.uniform(
                leaf_key(key, site), (layers, width, self.rank), minval=-1.0, maxval=1.0
            )
            zeros = jnp.zeros((layers, self.rank, height), jnp.float32)
            return {"a": draw / jnp.sqrt(jnp.float32(width)), "b": zeros}

        return {site: create(site) for site in sites}

    def response(
        self,
        site: str,
        module: Module,
        x: jax.Array,
        added: Any,
        strength: jax.typing.ArrayLike = 1.0,
    ) -> jax.Array:
        """Returns the output of the linear map plus the low-rank product."""
        if site not in added:
            return module(x)
        low = x @ added[site]["a"].astype(x.dtype)
        scale = jnp.asarray(self.scale * strength, x.dtype)
        return module(x) + scale * (low @ added[site]["b"].astype(x.dtype))

    def merge(self, params: Any, added: Any) -> Any:
        """Returns parameters with the products added to the kernels."""
        products = {
            f"{self.stack}/{site}/kernel": self.scale * (pair["a"] @ pair["b"])
            for site, pair in added.items()
        }

        def add(name: str, leaf: jax.Array) -> jax.Array:
            if name not in products:
                return leaf
            return (leaf.astype(jnp.float32) + products[name]).astype(leaf.dtype)

        return map_named(add, params)

    def _kernels(self, params: Any) -> dict[str, jax.Array]:
        """Returns the stacked kernels of the layers by the name of their site."""
        if self.stack is None or self.stack not in params:
            raise InputError(
                f"`stack` must name a subtree of the parameters, got {self.stack!r}. "
                f"The subtrees are {', '.join(sorted(params))}."
            )
        found: dict[str, jax.Array] = {}

        def visit(name: str, leaf: jax.Array) -> None:
            if name.endswith("/kernel") and leaf.ndim == 3:
                found[name.removesuffix("/kernel")] = leaf

        map_named(visit, params[self.stack])
        return found

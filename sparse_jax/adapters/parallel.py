"""Parallel adapters: a bottleneck beside a linear map."""

from dataclasses import dataclass
from typing import Any

import jax

from sparse_jax.adapters.bottleneck import PFEIFFER, Bottleneck
from sparse_jax.names import Rule
from sparse_jax.sites import Module

__all__ = ["Parallel"]


@dataclass(frozen=True, kw_only=True)
class Parallel(Bottleneck):
    """Trains a bottleneck beside the linear maps at the sites that `where` matches.

        y' = x @ W + bias + scale * (activation(x @ D + d) @ U + u)

    The arrays and errors are those of `Bottleneck`; it cannot be merged.

    Differs from the paper: the adapter stands beside one linear map, as in
    LLM-Adapters, not beside the whole feed-forward part.

    Example:
      >>> Parallel(size=64, where="^mlp/(up|down)$", scale=4.0).scale
      4.0

    References:
      He et al., 2022, https://arxiv.org/abs/2110.04366
      Hu et al., 2023, LLM-Adapters, https://arxiv.org/abs/2304.01933
    """

    where: Rule = PFEIFFER

    def added(self, params: Any, key: jax.Array) -> Any:
        """Returns {site: {"down", "down_bias", "up", "up_bias"}} of matching sites."""
        return self._branches(params, key, width_axis=1)

    def response(
        self,
        site: str,
        module: Module,
        x: jax.Array,
        added: Any,
        strength: jax.typing.ArrayLike = 1.0,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the output of the linear map plus the bottleneck of its input."""
        del key
        y = module(x)
        return y + self._branch(added[site], x, strength) if site in added else y

"""Series adapters: a bottleneck behind a linear map."""

from dataclasses import dataclass
from typing import Any

import jax

from sparse_jax.adapters.bottleneck import Bottleneck
from sparse_jax.sites import Module

__all__ = ["Series"]


@dataclass(frozen=True, kw_only=True)
class Series(Bottleneck):
    """Trains a bottleneck behind the linear maps at the sites that `where` matches.

        y' = y + scale * (activation(y @ D + d) @ U + u),   y = x @ W + bias

    `where` is `HOULSBY` by default, both sublayers of a layer; `PFEIFFER` is one.
    The arrays and errors are those of `Bottleneck`; it cannot be merged.

    Differs from the paper: the adapter sees y before the dropout, not after it, and
    the norms are not trained unless `dense` matches them ("norm/").

    Example:
      >>> from sparse_jax.adapters.bottleneck import PFEIFFER
      >>> Series(size=64, where=PFEIFFER, dense="classifier").size
      64

    References:
      Houlsby et al., 2019, https://arxiv.org/abs/1902.00751
      Pfeiffer et al., 2021, https://arxiv.org/abs/2005.00247
    """

    def added(self, params: Any, key: jax.Array) -> Any:
        """Returns {site: {"down", "down_bias", "up", "up_bias"}} of matching sites."""
        return self._branches(params, key, width_axis=2)

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
        """Returns the output of the linear map plus the bottleneck of that output."""
        del key
        y = module(x)
        return y + self._branch(added[site], y, strength) if site in added else y

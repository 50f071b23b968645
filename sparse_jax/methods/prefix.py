"""Prefix tuning: train keys and values that every token attends to."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method, refuse_to_merge
from sparse_jax.methods.sites import Added, kernels_at
from sparse_jax.models.attachment import MEMORY, Memory, Module
from sparse_jax.params.arguments import require_whole
from sparse_jax.params.fields import option
from sparse_jax.supports.scores import leaf_key

__all__ = ["Prefix"]

# Of the first keys and values, as of the kernels of most models.
_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """Trains `length` keys and values in front of those of every attention.

        scores = [q @ Pk^T + log(strength),  q @ k^T],    values = [Pv, v]

    Pk and Pv, shape=(L, length, H * K), start normal with deviation 0.02; both are
    float32 and used in the dtype of the keys. At strength 0 nothing attends to them.

    The initial model is not the base model, because the prefix takes a share of the
    attention from the start. It cannot be merged.

    Differs from the paper: the prefix is trained itself and not as the output of a
    larger network, as in P-tuning v2.

    Raises:
      InputError: if `length` is not positive, or (on `added`) the layers have no
        "attention/key".

    Example:
      >>> Prefix(length=16, dense="classifier").length
      16

    References:
      Li and Liang, 2021, https://arxiv.org/abs/2101.00190
      Liu et al., 2022, https://arxiv.org/abs/2110.07602
    """

    starts_at_base = False
    length: int = field(metadata=option(name="prefix_length"))

    def __post_init__(self):
        super().__post_init__()
        require_whole("length", self.length)
        if self.length < 1:
            raise InputError(
                f"`length` must be at least 1, got {self.length}. Common values are "
                "8 to 128."
            )

    def added(self, params: optax.Params, key: jax.Array) -> Added:
        """Returns {"attention/memory": {"keys": ..., "values": ...}}."""
        widths = kernels_at("params", "^attention/key$", params, self.stack)
        layers, _, width = widths["attention/key"].shape

        def draw(part: str) -> jax.Array:
            shape = (layers, self.length, width)
            draw_key = leaf_key(key, part)
            return _DEVIATION * jax.random.normal(draw_key, shape, jnp.float32)

        return {MEMORY: {"keys": draw("keys"), "values": draw("values")}}

    def response(
        self,
        site: str,
        module: Module,
        x: jax.Array,
        added: Added,
        strength: jax.typing.ArrayLike = 1.0,
        *,
        key: jax.Array | None = None,
    ) -> Any:
        """Returns the prefix at the site of the memory, else what the module does."""
        del key
        if site not in added:
            return module(x)
        arrays = added[site]
        bias = jnp.log(jnp.asarray(strength, jnp.float32))
        return Memory(arrays["keys"], arrays["values"], bias)

    def merge(self, params: optax.Params, added: Added) -> optax.Params:
        """Raises if anything is added."""
        return refuse_to_merge(self, params, added)

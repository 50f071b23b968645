"""(IA)3: train one factor for every channel of keys, values and feed-forward."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.errors import InputError
from sparse_jax.methods.method import Join, Method, PeftForm, PeftPart
from sparse_jax.methods.sites import (
    Added,
    Parts,
    channels,
    kernels_at,
    map_sites,
)
from sparse_jax.models.attachment import Module
from sparse_jax.params.names import Rule

__all__ = ["IA3"]


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Trains factors of the outputs at some sites, and of the inputs at others.

        y = (x @ W + bias) * l    at `where`,         l: shape=(L, out)
        y = (x * l) @ W + bias    at `feedforward`,   l: shape=(L, in)

    All l are float32 and start at one, so that the start is the base model; at
    `strength` s a factor is 1 + s * (l - 1). Merging is exact: columns of W and the
    bias are scaled at `where`, rows of W at `feedforward`.

    Raises:
      InputError: (on `added`) if nothing matches a rule, or a site matches both.

    Example:
      >>> IA3(dense="classifier").where
      '^attention/(key|value)$'

    References:
      Liu et al., 2022, Sec. 3.3, https://arxiv.org/abs/2205.05638
    """

    where: Rule = "^attention/(key|value)$"
    feedforward: Rule = "^mlp/down$"

    def added(self, params: optax.Params, key: jax.Array) -> Added:
        """Returns {site: {"output": ...}} or {site: {"input": ...}}."""
        del key
        outputs = kernels_at("where", self.where, params, self.stack)
        inputs = kernels_at("feedforward", self.feedforward, params, self.stack)
        if twice := sorted({*outputs} & {*inputs}):
            raise InputError(
                "`feedforward` must match no site that `where` matches, got "
                f"{self.feedforward!r} for `{twice[0]}`. A site has its input or its "
                "output scaled."
            )
        ones = lambda kernel, axis: jnp.ones(
            (kernel.shape[0], kernel.shape[axis]), jnp.float32
        )
        return {
            **{site: {"output": ones(kernel, 2)} for site, kernel in outputs.items()},
            **{site: {"input": ones(kernel, 1)} for site, kernel in inputs.items()},
        }

    def response(
        self,
        site: str,
        module: Module,
        x: jax.Array,
        added: Added,
        strength: jax.typing.ArrayLike = 1.0,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the output of the linear map with scaled channels."""
        del key
        arrays = added.get(site, {})
        damped = lambda factor: 1 + strength * (factor - 1)
        if "input" in arrays:
            return module(x * channels(damped(arrays["input"]), x))
        y = module(x)
        return y * channels(damped(arrays["output"]), y) if "output" in arrays else y

    def to_peft(self, added: Mapping[str, Collection[str]]) -> PeftForm:
        """Returns PEFT's (IA)3, whose factors are rows or columns."""
        return PeftForm(
            {"peft_type": "IA3"},
            {
                "input": PeftPart("ia3_l", lambda factor: factor[None, :]),
                "output": PeftPart("ia3_l", lambda factor: factor[:, None], _with_ones),
            },
            {"feedforward_modules": [s for s in sorted(added) if "input" in added[s]]},
        )

    def merge(self, params: optax.Params, added: Added) -> optax.Params:
        """Returns parameters with scaled columns, biases and rows."""

        def change(kind: str, leaf: jax.Array, arrays: Parts) -> jax.Array:
            if "output" in arrays:
                factor = arrays["output"]
                return leaf * (factor[:, None, :] if kind == "kernel" else factor)
            return leaf * arrays["input"][..., None] if kind == "kernel" else leaf

        return map_sites(change, params, added, self.stack)


def _with_ones(
    arrays: Sequence[np.ndarray | None], widths: Sequence[int], join: Join
) -> np.ndarray:
    """Returns the factors of all parts of a module."""
    return join(
        [
            np.ones(width, np.float32) if one is None else one
            for one, width in zip(arrays, widths, strict=True)
        ]
    )

"""LoRA and DoRA: a product of two thin matrices beside a kernel."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.methods.method import Join, Method, PeftForm, PeftPart
from sparse_jax.methods.sites import (
    Added,
    Parts,
    channels,
    kernels_at,
    map_sites,
    uniform,
)
from sparse_jax.models.attachment import Module
from sparse_jax.models.modules import product
from sparse_jax.params.arguments import require_whole
from sparse_jax.params.names import Rule
from sparse_jax.params.positive import require_positive
from sparse_jax.supports.scores import leaf_key

__all__ = ["DoRA", "LoRA", "LowRank"]


@dataclass(frozen=True, kw_only=True)
class LowRank(Method, ABC):
    """The base of methods with a product of two thin matrices beside a kernel.

        scale * dropout(x) @ A @ B
        scale = alpha / rank,  or alpha / sqrt(rank) with `rslora`

    A, shape=(L, in, rank), starts uniform in +-1 / sqrt(in) as in PEFT; B,
    shape=(L, rank, out), starts at zero. Both are float32 and used in the dtype of x.

    Raises:
      InputError: if `rank` or `alpha` is not positive, `dropout` is outside [0, 1), or
        (on `added`) nothing matches `where` or `rank` is larger than a kernel there.
    """

    rank: int
    where: Rule = "attention"
    alpha: float | None = None  # None is twice the rank.
    rslora: bool = False
    dropout: float = 0.0  # Fraction of the entries of x that A does not see.

    def __post_init__(self):
        super().__post_init__()
        require_whole("rank", self.rank)
        if self.rank < 1:
            raise InputError(
                f"`rank` must be at least 1, got {self.rank}. Common values are "
                "4 to 64."
            )
        if self.alpha is not None:
            require_positive("alpha", self.alpha, "Leave it out for twice the rank.")
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"`dropout` must be in [0, 1), got {self.dropout}. It is the fraction "
                "of entries left out, commonly 0.05."
            )

    @property
    def scale(self) -> float:
        """Factor of the added product."""
        return self._alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def _alpha(self) -> float:
        """Alpha, or its default."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def added(self, params: optax.Params, key: jax.Array) -> Added:
        """Returns {site: {"a": ..., "b": ...}} for every matching site."""

        def create(site: str, kernel: jax.Array) -> dict[str, jax.Array]:
            layers, width, height = kernel.shape
            self._require_thin(site, min(width, height))
            zeros = jnp.zeros((layers, self.rank, height), jnp.float32)
            return {"a": uniform(key, site, (layers, width, self.rank)), "b": zeros}

        kernels = kernels_at("where", self.where, params, self.stack)
        return {site: create(site, kernel) for site, kernel in kernels.items()}

    @abstractmethod
    def merge(self, params: optax.Params, added: Added) -> optax.Params:
        """Returns parameters with new kernels at the sites."""

    def to_peft(self, added: Mapping[str, Collection[str]]) -> PeftForm:
        """Returns PEFT's LoRA."""
        del added
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self._alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": False,
            "bias": "none",
        }
        parts = {
            "a": PeftPart("lora_A.weight", np.transpose, _side_by_side),
            "b": PeftPart("lora_B.weight", np.transpose, _block_diagonal),
        }
        # With more ranks a larger alpha keeps the scale.
        patterns = lambda sites: {
            "rank_pattern": sites * self.rank,
            "alpha_pattern": self._alpha * (math.sqrt(sites) if self.rslora else sites),
        }
        return PeftForm(config, parts, patterns=patterns)

    def _require_thin(self, site: str, most: int) -> None:
        """Raises if the two matrices have more entries than they can use."""
        if self.rank > most:
            raise InputError(
                f"`rank` must be at most {most}, the smaller side of the kernel at "
                f"`{site}`, got {self.rank}. Choose a smaller rank, or other sites by "
                "`where`."
            )

    def _product(
        self, site: str, x: jax.Array, pair: Parts, key: jax.Array | None
    ) -> jax.Array:
        """Returns dropout(x) @ A @ B."""
        if key is not None and self.dropout > 0:
            kept = jax.random.bernoulli(leaf_key(key, site), 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        low = product(x, pair["a"].astype(x.dtype))
        return product(low, pair["b"].astype(x.dtype))

    def _with_product(self, kernel: jax.Array, pair: Parts) -> jax.Array:
        """Returns W + scale * A @ B."""
        return kernel + self.scale * (pair["a"] @ pair["b"])


@final
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """Trains a rank-r update of the linear maps at the sites that `where` matches.

        y = x @ W + scale * dropout(x) @ A @ B
        scale = alpha / rank,  or alpha / sqrt(rank) with `rslora`

    The arrays and errors are those of `LowRank`. Merging is exact: W + scale * A @ B.

    Example:
      >>> LoRA(rank=8, where="query|value", dense="classifier").scale
      2.0
      >>> LoRA(rank=16, alpha=8, rslora=True).scale
      2.0

    References:
      Hu et al., 2021, https://arxiv.org/abs/2106.09685
      Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732 (`rslora`)
    """

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
        """Returns the output of the linear map plus the low-rank product."""
        if site not in added:
            return module(x)
        product = self._product(site, x, added[site], key)
        return module(x) + jnp.asarray(self.scale * strength, x.dtype) * product

    def merge(self, params: optax.Params, added: Added) -> optax.Params:
        """Returns parameters with the products added to the kernels."""
        add = lambda kind, leaf, pair: (
            self._with_product(leaf, pair) if kind == "kernel" else leaf
        )
        return map_sites(add, params, added, self.stack)


@final
@dataclass(frozen=True, kw_only=True)
class DoRA(LowRank):
    """Trains magnitude and direction of the linear maps that `where` matches.

        y = m * (x @ W + scale * dropout(x) @ A @ B) / n + bias
        n = ||W + scale * A @ B||, of each column, a constant in the backward pass

    A and B are as in `LowRank`; m, shape=(L, out), starts at the norms of the columns
    of W, so that the start is the base model. Merging is exact up to rounding:
    m * (W + scale * A @ B) / n.

    `strength` multiplies `scale` in the sum and in the norm, and keeps m, as in the
    released code of IST: at strength 0 a site has the directions of the base and the
    lengths m, and is the base model only as long as m has not been trained.

    Differs from PEFT: `dropout` applies only to the input of A.

    Raises:
      InputError: as `LowRank`.

    Example:
      >>> DoRA(rank=8, where="query|value", dense="classifier").scale
      2.0

    References:
      Liu et al., 2024, Sec. 4, https://arxiv.org/abs/2402.09353
    """

    def added(self, params: optax.Params, key: jax.Array) -> Added:
        """Returns {site: {"a": ..., "b": ..., "m": ...}} for every matching site."""
        kernels = kernels_at("where", self.where, params, self.stack)
        pairs = super().added(params, key)
        return {
            site: {**pairs[site], "m": _root(_squares(kernel))}
            for site, kernel in kernels.items()
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
        """Returns the output of the linear map with new lengths and directions."""
        if site not in added:
            return module(x)
        linear: Any = module
        arrays, kernel = added[site], linear.kernel[...]
        scale = jnp.asarray(self.scale * strength, jnp.float32)
        norm = lax.stop_gradient(_norms(kernel, arrays["a"], arrays["b"], scale))
        y = product(x, kernel.astype(x.dtype))
        y = y + scale.astype(x.dtype) * self._product(site, x, arrays, key)
        y = y * channels(arrays["m"] / norm, x)
        if getattr(linear, "bias", None) is None:
            return y
        return y + channels(linear.bias[...], x)

    def merge(self, params: optax.Params, added: Added) -> optax.Params:
        """Returns parameters with the new kernels."""

        def change(kind: str, leaf: jax.Array, arrays: Parts) -> jax.Array:
            if kind != "kernel":
                return leaf
            direction = self._with_product(leaf, arrays)
            length = arrays["m"] / _root(_squares(direction))
            return length[..., None, :] * direction

        return map_sites(change, params, added, self.stack)

    def to_peft(self, added: Mapping[str, Collection[str]]) -> PeftForm:
        """Returns PEFT's LoRA with magnitudes."""
        form = super().to_peft(added)
        length = PeftPart("lora_magnitude_vector", lambda array: array, _joined)
        config = {**form.config, "use_dora": True}
        return form._replace(config=config, parts={**form.parts, "m": length})


def _side_by_side(
    arrays: Sequence[np.ndarray | None], widths: Sequence[int], join: Join
) -> np.ndarray:
    """Returns the ranks of all parts, (in, ranks)."""
    del widths, join
    return np.concatenate([one for one in arrays if one is not None], axis=-1)


def _block_diagonal(
    arrays: Sequence[np.ndarray | None], widths: Sequence[int], join: Join
) -> np.ndarray:
    """Returns a map whose ranks each reach the outputs of one part, (ranks, out)."""
    found = [one for one in arrays if one is not None]
    rows = iter(
        np.split(np.eye(sum(map(len, found)), dtype=found[0].dtype), len(found))
    )
    zeros = lambda width: np.zeros((sum(map(len, found)), width), found[0].dtype)
    return join(
        [
            zeros(width) if one is None else next(rows).T @ one
            for one, width in zip(arrays, widths, strict=True)
        ]
    )


def _joined(
    arrays: Sequence[np.ndarray | None], widths: Sequence[int], join: Join
) -> np.ndarray:
    """Returns the lengths of all columns.

    Raises:
      InputError: if those of a part are missing.
    """
    del widths
    if any(one is None for one in arrays):
        raise InputError(
            "`adapter` must have DoRA at all parts of a module that are one in PyTorch "
            "to be written for PEFT, got some without. Merge it with `merge_adapter` "
            "and write the model with `save_pretrained`."
        )
    return join([one for one in arrays if one is not None])


def _squares(kernel: jax.Array) -> jax.Array:
    """Returns the sum of the squares of every column, float32."""
    return jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2)


def _root(squares: jax.Array) -> jax.Array:
    """Returns the norms, of which none is zero: a column of zeros has a direction."""
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def _norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array):
    """Returns ||W + scale * A @ B|| of each column, shape=(out,).

    The square is multiplied out, so that no array of the size of W is made:
    |w|^2 + 2 scale b.(A^T w) + scale^2 |A b|^2 for each column w of W and b of B.
    """
    low = a.astype(kernel.dtype)
    cross = jnp.einsum("ir,io->ro", low, kernel, preferred_element_type=jnp.float32)
    mixed = jnp.sum(b * cross, axis=0)
    product = jnp.sum(b * ((a.T @ a) @ b), axis=0)
    return _root(_squares(kernel) + 2 * scale * mixed + scale**2 * product)

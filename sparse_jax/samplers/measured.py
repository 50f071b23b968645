"""Samplers that measure a model before the first update, and keep their choice."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.samplers.sampler import Sampler

__all__ = ["CKA", "Spectral"]

_SMALLEST = 1e-30  # float32 divides by no less


@dataclass(frozen=True, kw_only=True)
class CKA(Sampler[tuple[()]]):
    """Trains the layers that change the hidden states most.

    With X `[N, D]` the hidden states that enter layer l for the N tokens of the first
    batch, Y those that leave it, both with their means over tokens taken off,

        score_l = 1 - CKA(X, Y),   CKA = |X^T Y|^2 / (|X^T X| |Y^T Y|),

    with Frobenius norms: 0 for a layer that only turns and scales its input. It takes
    one forward pass of a batch, the (L + 1) N D numbers of its states, and
    3 L N D^2 multiplications.

    Example:
      >>> states = jnp.array([[[1., 0], [-1, 1], [0, -1]], [[2, 0], [-2, 2], [0, -2]],
      ...                     [[2, 2], [-2, 2], [0, -4]]])
      >>> rule = CKA(num_layers=2, num_active=1)
      >>> rule.measure({}, lambda: (states, jnp.ones(3))).round(3)
      Array([0. , 0.3], dtype=float32)

    References:
      Ando Ogawa et al., 2026, https://arxiv.org/abs/2602.05988, for LoRA. CKA is that
      of Kornblith et al., 2019, Sec. 3, https://arxiv.org/abs/1905.00414.
    """

    measures: ClassVar[bool] = True

    def measure(
        self,
        layers: object,
        states_fn: Callable[[], tuple[jax.Array, jax.Array]],
    ) -> jax.Array:
        """Returns 1 - CKA of what enters and what leaves every layer."""
        del layers
        states, is_token = states_fn()
        weights = is_token.reshape(1, -1, 1).astype(jnp.float32)
        states = states.astype(jnp.float32).reshape(len(states), weights.size, -1)
        total = jnp.maximum(weights.sum(), 1)
        means = jnp.sum(states * weights, axis=1, keepdims=True) / total
        # Where the states are large, their products are not finite.
        states = (states - means) * weights
        states /= jnp.maximum(jnp.abs(states).max(axis=(1, 2), keepdims=True), 1e-9)
        norm = lambda x, y: jnp.linalg.norm(jnp.matmul(x.T, y, precision="highest"))

        def change(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, y = pair
            both = jnp.maximum(norm(x, x) * norm(y, y), _SMALLEST)
            return 1 - norm(x, y) ** 2 / both

        return lax.map(change, (states[:-1], states[1:]))


@dataclass(frozen=True, kw_only=True)
class Spectral(Sampler[tuple[()]]):
    """Trains the layers whose weights are farthest from noise.

    With s the singular values of a matrix `[m, n]` of layer l,

        ratio = sum of s above the edge / sum of the others,
        edge = sigma (sqrt(m) + sqrt(n)),

    where random entries of deviation sigma end (Marchenko and Pastur); sigma is the one
    whose singular values would have the same median. The score of a layer is the mean
    ratio of its matrices. It takes one decomposition of each, m n min(m, n)
    multiplications, and no data.

    Differs from the paper: it ranks matrices of one kind among themselves, estimates
    sigma by the interquartile range of s, and divides the ratio by the largest s.

    Example:
      >>> noise = jax.random.normal(jax.random.key(0), (2, 40, 30))
      >>> kernel = noise.at[1].add(3.0)  # a direction in common
      >>> scores = Spectral(num_layers=2, num_active=1).measure({"kernel": kernel})
      >>> bool(scores[0] < 0.1 < scores[1])
      True

    References:
      Hartford et al., 2024, "Spectrum", https://arxiv.org/abs/2406.06623; for the
      median Gavish and Donoho, 2014, Sec. III-E, https://arxiv.org/abs/1305.5870.
    """

    measures: ClassVar[bool] = True

    def measure(self, layers: object, states_fn: object = None) -> jax.Array:
        """Returns the mean ratio of signal to noise of every layer's matrices."""
        del states_fn
        matrices = [leaf for leaf in jax.tree.leaves(layers) if leaf.ndim == 3]
        ratios = [lax.map(_signal_to_noise, leaf) for leaf in matrices]
        return sum(ratios, jnp.zeros(self.num_layers)) / max(len(ratios), 1)


def _signal_to_noise(matrix: jax.Array) -> jax.Array:
    """Returns the singular values above the edge of noise over those below."""
    values = jnp.linalg.svd(matrix.astype(jnp.float32), compute_uv=False)
    edge = jnp.median(values) * edge_over_median(matrix.shape)
    is_signal = values > edge
    noise = jnp.sum(jnp.where(is_signal, 0, values))
    return jnp.sum(jnp.where(is_signal, values, 0)) / jnp.maximum(noise, _SMALLEST)


def edge_over_median(shape: Sequence[int]) -> float:
    """Returns the largest singular value of noise over the median one.

    Example:
      >>> round(edge_over_median((100, 100)), 2)  # of a quarter of a circle
      2.48
    """
    beta = min(shape) / max(shape)
    low, high = 1 - math.sqrt(beta), 1 + math.sqrt(beta)
    # The density in the singular value, up to a factor, at the middles of 4096 parts.
    x = low + (np.arange(4096) + 0.5) * (high - low) / 4096
    mass = np.cumsum(np.sqrt((high**2 - x**2) * (x**2 - low**2)) / x)
    return high / float(np.interp(mass[-1] / 2, mass, x))

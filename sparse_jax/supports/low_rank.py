"""The magnitude that a matrix has left at a low rank: the score of LIFT."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.errors import InputError, brief

__all__ = ["LowRank", "low_rank_approximation"]

# Random directions for each that is kept, and how often they pass through W W^T.
# Spectra of trained weights are flat: measured on kernels of SmolLM2-135M at 5 %, 99.5
# to 100 % of the entries chosen are those of the exact decomposition, and with as many
# passes of a power iteration, which forgets the earlier blocks, 66 to 95 %.
_OVERSAMPLING, _DEPTH = 2, 6


@dataclass(frozen=True)
class LowRank:
    """Returns the entries of W_r, the best approximation of rank r of a matrix.

    Without a rank it is that of the LoRA which trains as many numbers as are chosen,

        r = max(1, round(k / (rows + columns))),

    which is how the paper counts the budget: 128 at 6.25 % of 4096 x 4096. It takes
    ranks of 32 to 128 for that budget. A vector is its own approximation; what has
    more axes is a matrix whose last axis are the columns.

    Attributes:
      rank: r, or None.

    Raises:
      InputError: if the rank is not positive.
    """

    rank: int | None = None

    def __post_init__(self):
        if self.rank is not None and not (isinstance(self.rank, int) and self.rank > 0):
            raise InputError(
                f"`rank` of the score must be positive, got {brief(self.rank)}."
            )

    def __call__(self, gradient: None, param: jax.Array, *, k: int) -> jax.Array:
        """Returns the scores, float32."""
        del gradient
        x = param.astype(jnp.float32)
        if x.ndim < 2:
            return x
        matrix = x.reshape(-1, x.shape[-1])
        rank = self.rank or max(1, round(k / sum(matrix.shape)))
        return low_rank_approximation(matrix, rank).reshape(x.shape)

    def require(self, name: str, shape: Sequence[int]) -> None:
        """Raises unless an array of some shape has the rank.

        Example:
          >>> LowRank(8).require("kernel", (16, 8))
        """
        rows, most = math.prod(shape[:-1]), 0
        if len(shape) > 1:
            most = min(rows, shape[-1])
        if self.rank is not None and 0 < most < self.rank:
            raise InputError(
                f"`rank` of the score must be at most {most} for `{name}` of shape "
                f"{list(shape)}, got {self.rank}. Lower it, or leave it out."
            )


def low_rank_approximation(matrix: jax.Array, rank: int) -> jax.Array:
    """Returns the best approximation of a rank, by a randomized block Krylov method.

        W_r = U U^T W,   U the best r directions in the span of
                         W S, (W W^T) W S, ..., (W W^T)^6 W S

    with 2 r random columns S, always the same, so that a matrix always has the same
    scores. It costs about 42 r rows columns multiplications, and is exact if 14 r is
    the shorter side or more.

    Args:
      matrix: shape=(rows, columns), float32.
      rank: of the result; one of the shorter side or more returns the matrix.

    Example:
      >>> low_rank_approximation(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 1).round(5)[0]
      Array([3., 0., 0.], dtype=float32)

    References:
      Musco and Musco, 2015, https://arxiv.org/abs/1504.05477, algorithm 2
    """
    if matrix.shape[0] > matrix.shape[1]:
        return low_rank_approximation(matrix.T, rank).T
    rows, columns = matrix.shape
    if rank >= rows:
        return matrix
    # Bits of bfloat16 on a TPU would mix directions of about the same size.
    with jax.default_matmul_precision("float32"):
        width, inside, basis = _OVERSAMPLING * rank, matrix, None
        if width * (_DEPTH + 1) < rows:
            # Behind a barrier, or the compiler draws the numbers itself.
            key = lax.optimization_barrier(jax.random.key_data(jax.random.key(0)))
            random = jax.random.wrap_key_data(key)
            start = jax.random.normal(random, (columns, width), jnp.float32)
            blocks = [_orthonormal(matrix @ start)]
            for _ in range(_DEPTH):
                blocks.append(_orthonormal(matrix @ (matrix.T @ blocks[-1])))
            basis = _orthonormal(jnp.concatenate(blocks, axis=1))
            inside = basis.T @ matrix
        _, vectors = jnp.linalg.eigh(inside @ inside.T)
        best = vectors[:, -rank:] if basis is None else basis @ vectors[:, -rank:]
        return best @ (best.T @ matrix)


def _orthonormal(x: jax.Array) -> jax.Array:
    """Returns an orthonormal basis of the columns."""
    return jnp.linalg.qr(x)[0]

"""Dense: train whole leaves (full fine-tuning, the head alone, the biases alone)."""

from dataclasses import dataclass

from sparse_jax.methods.method import Method

__all__ = ["Dense"]


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Trains every leaf that `dense` matches, and nothing else.

    Full fine-tuning is `Dense(dense=".*")`, BitFit (Ben Zaken et al., 2022,
    https://arxiv.org/abs/2106.10199) is `Dense(dense=("bias$", "^classifier/"))`.

    It adds no arrays, so `strength` has no effect here: to damp what was learned, as
    w0 + strength * (w - w0), would take a second copy of the trained leaves.

    Example:
      >>> Dense(dense="^classifier/").dense
      '^classifier/'
    """

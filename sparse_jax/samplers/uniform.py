"""Uniform: every layer is as likely as any other."""

from dataclasses import dataclass

from sparse_jax.samplers.sampler import Sampler

__all__ = ["Uniform"]


@dataclass(frozen=True, kw_only=True)
class Uniform(Sampler):
    """Draws layers uniformly, without replacement.

    With `hold=1` this is random sparse tuning, the control of IST (Yao et al., 2024);
    with two layers and `hold=20` it is LISA (Pan et al., 2024,
    https://arxiv.org/abs/2403.17919), which also trains embeddings and head.

    Example:
      >>> import jax
      >>> sampler = Uniform(num_layers=4, num_active=4)
      >>> sampler.draw((), jax.random.key(0), 0)
      Array([0, 1, 2, 3], dtype=int32)
    """

"""A reader: a model that reads tokens and scores the next one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.generation.prompts import Prompts
from sparse_jax.models.causal_lm import Cache
from sparse_jax.models.pure import PureModel
from sparse_jax.sites import Attachment

__all__ = ["Reader"]


class Reader(NamedTuple):
    """A decoder with its parameters and what is attached to it."""

    model: PureModel
    params: Any
    attachment: Attachment

    def start(self, prompts: Prompts, num_more: int) -> tuple[jax.Array, Cache]:
        """Reads prompts.

        Args:
          prompts: padded on the left.
          num_more: tokens that will be read after them.

        Returns:
          Float32 logits of the first new token `[B, V]`, and the cache.
        """
        rows, columns = jnp.shape(prompts.input_ids)
        cache = self.model.cache(self.params, rows, columns + num_more)
        return self._extend(prompts.input_ids, prompts.attention_mask, cache)

    def read(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads one token more in each row, int32 `[B]`; returns as `start` does."""
        tokens = tokens[:, None]
        return self._extend(tokens, jnp.ones_like(tokens), cache)

    def _extend(self, ids: Any, mask: Any, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads columns, and scores what follows the last."""
        batch = {"input_ids": ids, "attention_mask": mask}
        hidden, cache = self.model.extend(
            self.params, batch, cache, attachment=self.attachment
        )
        return self.model.logits(self.params, hidden[:, -1]), cache

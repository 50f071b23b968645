"""A model as a pure function of its parameters."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_jax.errors import InputError
from sparse_jax.models.causal_lm import Cache, CausalLM
from sparse_jax.models.heads import DecoderClassifier, MaskedLM, SequenceClassifier
from sparse_jax.models.modules import Inputs

__all__ = ["Head", "Params", "Model"]

Head = type[SequenceClassifier] | type[MaskedLM] | type[CausalLM]
Params = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model without its parameters: hashable, and a function under `jax.jit`.

    `params` is a nested dictionary of arrays, `model(params, batch)` its logits. The
    leaves under `layers/` have the layer as leading axis `[L]`.

    Example:
      >>> from sparse_jax.models.families.bert import BERT
      >>> from sparse_jax.models.config import EncoderConfig
      >>> config = EncoderConfig(
      ...     vocab_size=100, hidden_size=32, num_layers=2, num_heads=4,
      ...     intermediate_size=64, num_labels=3,
      ... )
      >>> model = Model(SequenceClassifier, BERT, config)
      >>> params = model.init(jax.random.key(0))
      >>> params["layers"]["attention"]["query"]["kernel"].shape
      (2, 32, 32)
      >>> ids = jnp.ones((4, 8), jnp.int32)
      >>> batch = {"input_ids": ids, "attention_mask": ids}
      >>> jax.jit(model)(params, batch).shape
      (4, 3)
    """

    head: Head
    family: Any  # Family, or DecoderFamily
    config: Any  # EncoderConfig, DecoderConfig or ClassicConfig

    def init(self, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
        """Returns new parameters: normal kernels and tables, zero biases."""
        return _init(self, key, jnp.dtype(dtype))

    def abstract(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
        """Returns the shapes and dtypes of the parameters, without allocating them."""
        init = functools.partial(self.init, dtype=dtype)
        return jax.eval_shape(init, jax.random.key(0))

    def bind(self, params: Params) -> Any:
        """Returns the NNX module that holds `params`."""
        return nnx.merge(_graphdef(self), params)

    def __call__(self, params: Params, batch: Inputs, **options: object) -> jax.Array:
        """Returns the float32 logits of a batch.

        Args:
          params: nested dictionary of arrays, as `init` and `from_pretrained` give.
          batch: int32 `[B, T]` arrays `input_ids`, `attention_mask` and, optionally,
            `token_type_ids`.
          **options: `key=`, `attachment=`, `unroll=` and `checkpoint=` of
            `run_layers`; `positions=` of `MaskedLM`.

        Returns:
          Logits, `[B, num_labels]` of a `SequenceClassifier`, `[B, T, V]` of a
          `MaskedLM` or a `CausalLM`.

        Raises:
          InputError: if the batch lacks an array that the model needs.
        """
        return self.bind(params)(_complete(batch), **options)

    def hidden(self, params: Params, batch: Inputs, **options: object) -> jax.Array:
        """Calls `CausalLM.hidden`."""
        return self.bind(params).hidden(_complete(batch), **options)

    def states(self, params: Params, batch: Inputs) -> jax.Array:
        """Returns what enters every layer and what leaves the last, [L + 1, B, T, D].

        Example:
          >>> from sparse_jax.models.families.llama import LLAMA
          >>> from sparse_jax.models.config import DecoderConfig
          >>> config = DecoderConfig(
          ...     vocab_size=9, hidden_size=8, num_layers=2, num_heads=2,
          ...     num_kv_heads=1, head_size=4, intermediate_size=16,
          ... )
          >>> model, ids = Model(CausalLM, LLAMA, config), jnp.ones((1, 3), jnp.int32)
          >>> batch = {"input_ids": ids, "attention_mask": ids}
          >>> model.states(model.init(jax.random.key(0)), batch).shape
          (3, 1, 3, 8)
        """
        return self.bind(params).encode(_complete(batch), states=True)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Calls `CausalLM.logits`."""
        return self.bind(params).logits(hidden)

    def cache(self, params: Params, batch_size: int, length: int) -> Cache:
        """Calls `CausalLM.cache`."""
        return self.bind(params).cache(batch_size, length)

    def read(
        self, params: Params, batch: Inputs, cache: Cache, **options: object
    ) -> tuple[jax.Array, Cache]:
        """Calls `CausalLM.read`."""
        return self.bind(params).read(_complete(batch), cache, **options)

    def extend(
        self, params: Params, batch: Inputs, cache: Cache, **options: object
    ) -> tuple[jax.Array, Cache]:
        """Calls `CausalLM.extend`."""
        return self.bind(params).extend(_complete(batch), cache, **options)


def _complete(batch: Inputs) -> Inputs:
    """Returns a batch, or raises if it lacks an array that every model needs."""
    names = sorted(map(str, batch)) if isinstance(batch, Mapping) else []
    missing = [name for name in ("input_ids", "attention_mask") if name not in names]
    if missing:
        raise InputError(
            f"`batch` must have `input_ids` and `attention_mask`, got no "
            f"`{missing[0]}` beside {names}. The mask is 1 at tokens and 0 at padding: "
            "without padding it is `jnp.ones_like(input_ids)`."
        )
    return batch


def _create(model: Model, key: jax.Array) -> nnx.Module:
    """Creates the module with new parameters."""
    head: Any = model.head
    if head is SequenceClassifier and model.family.is_decoder:
        head = DecoderClassifier
    return head(model.family, model.config, rngs=nnx.Rngs(key))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(model: Model, key: jax.Array, dtype: jax.typing.DTypeLike) -> Params:
    """Creates parameters in float32 and rounds them."""
    params = nnx.to_pure_dict(nnx.state(_create(model, key), nnx.Param))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@functools.cache
def _graphdef(model: Model) -> nnx.GraphDef:
    """Returns the structure of the module, which holds no arrays."""
    module = nnx.eval_shape(lambda: _create(model, jax.random.key(0)))
    return nnx.graphdef(module)

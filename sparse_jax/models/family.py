"""What one family of models does in its own way: its names, tensors and parts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from flax import nnx

from sparse_jax.models.config import (
    ClassicConfig,
    EncoderConfig,
    LayerKind,
)
from sparse_jax.models.decoder import DecoderLayer, Words
from sparse_jax.models.modules import Config, RmsNorm
from sparse_jax.models.position_embeddings import turn_of

__all__ = [
    "Body",
    "ClassicFamily",
    "Context",
    "Create",
    "DecoderFamily",
    "FUSED",
    "Family",
    "GATE_UP",
    "GATED",
    "Layout",
    "NAMES",
    "PLAIN",
    "Parts",
    "gpt_fields",
    "heads_of",
    "their_gpt_fields",
]

FUSED = tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))
GATE_UP = ("layers/mlp/gate", "layers/mlp/up")
# Outputs of the modules that may share a tensor.
_OUTPUTS = MappingProxyType(
    {
        "query": lambda config: config.num_heads * config.head_size,
        "key": lambda config: config.num_kv_heads * config.head_size,
        "value": lambda config: config.num_kv_heads * config.head_size,
        "gate": lambda config: config.intermediate_size,
        "up": lambda config: config.intermediate_size,
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """How the tensors of a family lie.

    `fused` modules have one tensor in common, which holds their outputs one after the
    other. With `by_head` the outputs of a head come first, `[H, 3, K]`, and otherwise
    those of a module, `[3, H, K]`, with fewer heads of keys and values if queries are
    grouped.
    """

    is_upright: bool = False  # whether kernels of layers are [in, out], as ours are
    fused: tuple[tuple[str, ...], ...] = ()  # of each tensor the modules, in order
    by_head: bool = False

    def turned(self, leaf: str, array: np.ndarray) -> np.ndarray:
        """Turns a kernel `[in, out]` as its tensor lies, or the tensor back.

        Example:
          >>> PLAIN.turned("lm_head/kernel", np.zeros((2, 3))).shape
          (3, 2)
        """
        return array.T if self._is_turned(leaf) else array

    def turned_index(self, leaf: str, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Returns where a part of a leaf lies in its tensor.

        Example:
          >>> PLAIN.turned_index("lm_head/kernel", (slice(0, 2), slice(4, 8)))
          (slice(4, 8, None), slice(0, 2, None))
        """
        return index[::-1] if self._is_turned(leaf) else index

    def _is_turned(self, leaf: str) -> bool:
        """Returns whether a leaf is a kernel whose tensor is [out, in]."""
        is_kept = self.is_upright and leaf.startswith("layers/")
        return leaf.endswith("/kernel") and not is_kept

    def modules_with(self, leaf: str) -> tuple[str, ...]:
        """Returns the modules that share the tensor of a leaf; none if it is alone."""
        module = leaf.rpartition("/")[0]
        return next((group for group in self.fused if module in group), ())

    def part_of(self, leaf: str) -> int | None:
        """Returns which part of a fused tensor a leaf is; None is no part."""
        group = self.modules_with(leaf)
        return group.index(leaf.rpartition("/")[0]) if group else None

    def widths(self, leaf: str, config: Config) -> list[int]:
        """Returns the outputs of all parts of the tensor that holds a leaf.

        Example:
          >>> from sparse_jax.models.config import DecoderConfig
          >>> config = DecoderConfig(
          ...     vocab_size=9, hidden_size=8, num_layers=1, num_heads=4,
          ...     num_kv_heads=2, head_size=2, intermediate_size=16,
          ... )
          >>> Layout(fused=(FUSED,)).widths(f"{FUSED[0]}/kernel", config)
          [8, 4, 4]
        """
        names = [module.rpartition("/")[2] for module in self.modules_with(leaf)]
        return [_OUTPUTS[name](config) for name in names]

    def tensor_shape(
        self, leaf: str, shape: tuple[int, ...], config: Config
    ) -> tuple[int, ...]:
        """Returns the shape of the tensor that holds a leaf of some shape."""
        width = sum(self.widths(leaf, config)) or shape[-1]
        whole = (*shape[:-1], width)
        return self.turned(leaf, np.broadcast_to(np.int8(0), whole)).shape

    def tensor_positions(
        self, leaf: str, shape: Sequence[int], positions: np.ndarray, config: Config
    ) -> np.ndarray:
        """Returns where entries of a leaf of some shape lie in its tensor, both flat.

        Example:
          >>> config = ClassicConfig(
          ...     vocab_size=9, hidden_size=2, num_layers=1, num_heads=1,
          ...     intermediate_size=8,
          ... )
          >>> PLAIN.tensor_positions("lm_head/kernel", (2, 3), np.array([0, 2]), config)
          array([0, 4])
          >>> Layout(fused=(FUSED,)).tensor_positions(
          ...     f"{FUSED[1]}/bias", (2,), np.array([1]), config
          ... )
          array([3])
        """
        positions = positions.astype(np.int64)
        rows, columns = np.divmod(positions, shape[-1])
        width = shape[-1]
        if (part := self.part_of(leaf)) is not None:
            sizes = self._blocks(leaf, config)
            blocks, rest = np.divmod(columns, sizes[part])
            columns = blocks * sum(sizes) + sum(sizes[:part]) + rest
            width = sum(self.widths(leaf, config))
        if self._is_turned(leaf):
            return columns * math.prod(shape[:-1]) + rows
        return rows * width + columns

    def split(self, leaf: str, tensor: np.ndarray, config: Config) -> np.ndarray:
        """Returns the leaf that a tensor holds, a part of it or all.

        Example:
          >>> config = ClassicConfig(
          ...     vocab_size=9, hidden_size=2, num_layers=1, num_heads=2,
          ...     intermediate_size=8,
          ... )
          >>> Layout(fused=(FUSED,)).split(f"{FUSED[1]}/bias", np.arange(6), config)
          array([2, 3])
          >>> Layout(fused=(FUSED,), by_head=True).split(
          ...     f"{FUSED[1]}/bias", np.arange(6), config
          ... )
          array([1, 4])
        """
        array, part = self.turned(leaf, tensor), self.part_of(leaf)
        if part is None:
            return array
        sizes = self._blocks(leaf, config)
        start = sum(sizes[:part])
        blocked = array.reshape(*array.shape[:-1], -1, sum(sizes))
        found = blocked[..., start : start + sizes[part]]
        return found.reshape(*array.shape[:-1], -1)

    def fuse(
        self, leaf: str, arrays: Sequence[np.ndarray], config: Config
    ) -> np.ndarray:
        """Returns the tensor of a leaf, or that of all its parts in their order.

        Example:
          >>> config = ClassicConfig(
          ...     vocab_size=9, hidden_size=2, num_layers=1, num_heads=2,
          ...     intermediate_size=8,
          ... )
          >>> parts = [np.array([0, 3]), np.array([1, 4]), np.array([2, 5])]
          >>> layout = Layout(fused=(FUSED,), by_head=True)
          >>> layout.fuse(f"{FUSED[0]}/bias", parts, config)
          array([0, 1, 2, 3, 4, 5])
        """
        if self.part_of(leaf) is None:
            return self.turned(leaf, arrays[0])
        sizes = self._blocks(leaf, config)
        blocked = [
            array.reshape(*array.shape[:-1], -1, size)
            for array, size in zip(arrays, sizes, strict=True)
        ]
        whole = np.concatenate(blocked, axis=-1).reshape(*arrays[0].shape[:-1], -1)
        return self.turned(leaf, whole)

    def _blocks(self, leaf: str, config: Config) -> list[int]:
        """Returns how many outputs of each part lie together."""
        blocks = config.num_heads if self.by_head else 1
        return [width // blocks for width in self.widths(leaf, config)]


PLAIN = Layout()


CreatePart = Callable[[Any, nnx.Rngs], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Functions that create the parts of a decoder from its configuration."""

    # Module called as (input_ids, positions, key), with the table `word`.
    embeddings: CreatePart
    layer: CreatePart  # module with the methods that `run_layers` and its sibling call
    norm: CreatePart  # of the last hidden states
    # What layers of a kind know of where tokens are, from the configuration, the kind
    # and the positions of queries `[B, T]` and of keys `[B, S]`.
    position_info: Callable[[Any, LayerKind, jax.Array, jax.Array], Any]
    has_head_bias: bool = False  # of a head that is not tied


Create = Callable[[EncoderConfig, nnx.Rngs], Any]
# Arrays, and the entry of each that a layer sees; None is all of it.
Context = tuple[tuple[Any, ...], tuple[int, ...] | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """Functions that create the parts of an encoder from its configuration."""

    # Module called as (input_ids, position_ids, token_type_ids, key, noise), with the
    # table `word`.
    embeddings: CreatePart
    layer: CreatePart  # module that `run_layers` calls
    norm: CreatePart | None  # of the last hidden states
    # What layers see, and which of it each, from the configuration, which tokens there
    # are, bool `[B, T]`, and their positions, int32 `[B, T]`.
    context: Callable[[Any, jax.Array, jax.Array], Context]


# Families are compared by identity, which also makes them hashable.
@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """The differences between two encoders of the same layers."""

    is_decoder: ClassVar[bool] = False
    has_layers_without_rope: ClassVar[bool] = False

    name: str  # `model_type` in a Hugging Face configuration
    prefix: str  # what a bare model's tensors lack in front
    position_offset: Callable[[int], int]  # unused rows of the table, from the pad id
    position_ids: Callable[[jax.Array, int], jax.Array]  # input ids, pad id -> [B, T]
    pooler: Create | None  # map of the first token, or of the mean of all
    classifier: Create  # called as `classifier(pooled, key=key)`
    lm_activation: str | None  # None is the activation of the layers
    lm_decoder: str  # Hugging Face path of the last linear map, tied to the words
    architectures: Mapping[str, str]  # our module -> Hugging Face class
    names: Mapping[str, str]  # our module path -> Hugging Face module path
    pooler_activation: str | None = "tanh"  # None if the pooler has its own
    # Names of settings that are others than BERT's: BERT's -> the family's.
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    # Fields of our configuration that no setting of the family gives.
    constants: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # More fields of our configuration, from a Hugging Face one, and the other way.
    fields: Callable[[Any], Mapping[str, Any]] = lambda theirs: {}
    their_fields: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    body: Body | None = None  # None is that of BERT
    absent: tuple[str, ...] = ()  # leaves without a tensor in the first layer, all ones
    windows: Literal["none", "some"] = "none"
    has_rope_by_type: bool = False
    layout: Layout = PLAIN
    bare: str = r"(embeddings|encoder|pooler)\."  # how names without a prefix begin


NAMES = MappingProxyType(
    {
        "embeddings/word": "model.embed_tokens",
        "layers/attention/norm": "model.layers.{}.input_layernorm",
        "layers/attention/query": "model.layers.{}.self_attn.q_proj",
        "layers/attention/key": "model.layers.{}.self_attn.k_proj",
        "layers/attention/value": "model.layers.{}.self_attn.v_proj",
        "layers/attention/output": "model.layers.{}.self_attn.o_proj",
        "layers/attention/query_norm": "model.layers.{}.self_attn.q_norm",
        "layers/attention/key_norm": "model.layers.{}.self_attn.k_norm",
        "layers/mlp/norm": "model.layers.{}.post_attention_layernorm",
        "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
        "layers/mlp/up": "model.layers.{}.mlp.up_proj",
        "layers/mlp/down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "lm_head": "lm_head",
        "classifier": "score",
    }
)


def heads_of(class_name: str, causal: str | None = None) -> Mapping[str, str]:
    """Returns the classes of Hugging Face for a decoder with our heads."""
    return MappingProxyType(
        {
            "CausalLM": causal or f"{class_name}ForCausalLM",
            "SequenceClassifier": f"{class_name}ForSequenceClassification",
        }
    )


GATED = Parts(
    embeddings=Words,
    layer=DecoderLayer,
    norm=lambda config, rngs: RmsNorm(
        config.hidden_size, config.norm_eps, config.norm_offset
    ),
    position_info=lambda config, kind, positions, seen: turn_of(
        kind, config.turned_size, positions
    ),
)


# Families are compared by identity, which also makes them hashable.
@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderFamily:
    """The differences between two decoders."""

    is_decoder: ClassVar[bool] = True

    name: str  # `model_type` in a Hugging Face configuration
    # Fields of our configuration that depend on the family, from a Hugging Face one.
    fields: Callable[[Any], Mapping[str, Any]]
    # Fields of a Hugging Face configuration that depend on the family, from ours.
    their_fields: Callable[[Any], Mapping[str, Any]]
    architectures: Mapping[str, str]  # our module -> Hugging Face class
    names: Mapping[str, str]  # our module path -> Hugging Face module path
    parts: Parts = GATED
    layout: Layout = PLAIN
    absent: ClassVar[tuple[str, ...]] = ()
    prefix: str = "model"  # what a bare model's tensors lack in front
    bare: str = r"(embed_tokens|layers|norm)\."  # how the names of such tensors begin
    # Which layers have a window if `sliding_window` is given; "some" by `layer_types`.
    windows: Literal["none", "all", "some"] = "none"
    has_rope_by_type: bool = False  # whether `rope_parameters` has those of each type
    activation: str = "hidden_act"  # as a Hugging Face configuration calls it
    has_layers_without_rope: bool = False  # those with a 0 in `no_rope_layers`


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassicFamily(DecoderFamily):
    """The differences between two decoders that share a `ClassicConfig`."""

    # Fields of a Hugging Face configuration that must have these values.
    required: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    prefix: str = "transformer"


_GPT = {
    "max_positions": "n_positions",
    "hidden_act": "activation_function",
    "embedding_dropout": "embd_pdrop",
    "hidden_dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
}


def gpt_fields(theirs: Any) -> dict[str, Any]:
    """Returns what GPT-2 and GPT-J say alike, in our names.

    The hidden size of the MLP is four times that of the model if it is not given.
    """
    return {
        "intermediate_size": 4 * theirs.n_embd
        if theirs.n_inner is None
        else theirs.n_inner,
        **{ours: getattr(theirs, name) for ours, name in _GPT.items()},
    }


def their_gpt_fields(config: ClassicConfig) -> dict[str, object]:
    """Returns what GPT-2 and GPT-J say alike, in their names."""
    same = {name: getattr(config, ours) for ours, name in _GPT.items()}
    return {"n_inner": config.intermediate_size, **same}

"""Configurations: of encoders, of decoders, and of decoders with layer norms."""

from dataclasses import dataclass

from sparse_jax.errors import InputError, brief
from sparse_jax.models.config_checks import check_fields

__all__ = [
    "ClassicConfig",
    "DecoderConfig",
    "EncoderConfig",
    "LayerKind",
    "RopeScaling",
]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies of a model are stretched to longer texts.

    With `low` and `high` unset all frequencies are divided by `factor`. Otherwise, as
    in Llama 3.1, only the slow ones: those that turn less than `low` times within
    `original_positions` are divided, those that turn more than `high` times are kept,
    and in between the two are mixed.
    """

    factor: float
    low: float | None = None
    high: float | None = None
    original_positions: int | None = None

    def __post_init__(self):
        check_fields(self)
        llama3 = (self.low, self.high, self.original_positions)
        if llama3 == (None, None, None):
            return
        if self.low is None or self.high is None or self.original_positions is None:
            raise InputError(
                "`low`, `high` and `original_positions` must be given together, got "
                f"{self.low}, {self.high} and {self.original_positions}."
            )
        if self.low >= self.high:
            raise InputError(
                f"`low` must be less than `high`={self.high}, got {self.low}."
            )


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What the attention of a layer sees, and how it turns queries and keys."""

    sliding_window: int | None = None  # tokens that a token sees, itself included
    rope_theta: float | None = None  # base of the rotary positions; None turns nothing
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The sizes and rates of an encoder and of its classification head.

    Dimension letters: B batch, T tokens, D `hidden_size`, H `num_heads`, K head size,
    F `intermediate_size`, V `vocab_size`, L `num_layers`.

    Raises:
      InputError: if a field has another type or range than its name says, or
        `num_heads` does not divide `hidden_size`.

    Example:
      >>> config = EncoderConfig(
      ...     vocab_size=100, hidden_size=32, num_layers=2, num_heads=4,
      ...     intermediate_size=64,
      ... )
      >>> config.num_labels
      2
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512  # tokens a sequence may have
    position_offset: int = 0  # rows of the position table that no token uses
    type_vocab_size: int = 2  # 0 is a model without token types
    pad_id: int = 0
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1  # fraction dropped
    attention_dropout: float = 0.1  # fraction dropped
    classifier_dropout: float = 0.1  # fraction dropped
    output_dropout: float | None = None  # of attention's output; None: `hidden_dropout`
    initializer_range: float = 0.02  # standard deviation of new kernels
    # Of ModernBERT. Windows of encoders are on either side of a token.
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    layer_kinds: tuple[int, ...] | None = None  # of several kinds, that of every layer
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    head_bias: bool = True  # of the linear map in the head
    head_act: str | None = None  # None is what the family has
    pooling: str = "cls"  # what a classifier sees: the first token, or their "mean"
    num_labels: int = 2  # 1 is regression
    label_names: tuple[str, ...] | None = None

    def __post_init__(self):
        check_fields(self)
        _require_whole_heads(self)
        _require_kinds(self)
        if not 0 <= self.pad_id < self.vocab_size:
            raise InputError(
                f"`pad_id` must be in [0, {self.vocab_size}), the words of the model, "
                f"got {self.pad_id}."
            )
        _require_names_of_labels(self)

    @property
    def head_size(self) -> int:
        """Size of a query."""
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values: as many as there are queries."""
        return self.num_heads


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder with rotary positions and gated layers.

    Dimension letters: B batch, T tokens, D `hidden_size`, H `num_heads`, G
    `num_kv_heads`, K `head_size`, F `intermediate_size`, V `vocab_size`, L
    `num_layers`.

    Raises:
      InputError: if a field has another type or range than its name says,
        `num_kv_heads` does not divide `num_heads`, `head_size` is odd, or
        `layer_kinds` does not give each layer one of several `kinds`.

    Example:
      >>> DecoderConfig(
      ...     vocab_size=100, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
      ...     head_size=8, intermediate_size=64,
      ... ).tied
      False
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    max_positions: int = 2048  # tokens a sequence may have
    norm_eps: float = 1e-6
    hidden_act: str = "silu"
    kinds: tuple[LayerKind, ...] = (LayerKind(rope_theta=10000.0),)
    layer_kinds: tuple[int, ...] | None = None  # of several kinds, that of every layer
    tied: bool = False  # whether the word table is also the last linear map
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    rotary_size: int | None = None  # leading entries of heads that turn; None is all
    norms_heads: bool = False  # whether queries and keys are normed (Qwen3)
    norm_offset: float = 0.0  # added to the scale of every norm (1 for Gemma)
    scales_words: bool = False  # whether word vectors are multiplied by sqrt(D)
    has_post_norms: bool = False  # whether attention and MLP are normed after, too
    query_pre_attn_scalar: float | None = None  # scores over its root; None is K
    attention_softcap: float | None = None  # bound of the scores; None has none
    logit_softcap: float | None = None  # bound of the logits; None has none
    attention_dropout: float = 0.0  # fraction dropped
    initializer_range: float = 0.02  # standard deviation of new kernels
    pad_id: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    num_labels: int = 2  # of a classifier; 1 is regression
    label_names: tuple[str, ...] | None = None

    def __post_init__(self):
        check_fields(self)
        _require_names_of_labels(self)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"`num_kv_heads` must divide `num_heads`={self.num_heads}, got "
                f"{self.num_kv_heads}."
            )
        if self.head_size % 2:
            raise InputError(
                f"`head_size` must be even, got {self.head_size}: rotary positions "
                "turn pairs of entries."
            )
        if self.rotary_size is not None:
            _require_pairs(self.rotary_size, self.head_size)
        _require_kinds(self)

    @property
    def turned_size(self) -> int:
        """Leading entries of a head that turn: all, some, or none."""
        return self.head_size if self.rotary_size is None else self.rotary_size

    @property
    def type_vocab_size(self) -> int:
        """Zero: there are no token types."""
        return 0


@dataclass(frozen=True, kw_only=True)
class ClassicConfig:
    """The sizes and rates of a decoder with layer norms and two linear maps an MLP.

    Dimension letters: B batch, T tokens, D `hidden_size`, H `num_heads`, K
    `head_size`, F `intermediate_size`, V `vocab_size`, L `num_layers`.

    Raises:
      InputError: if a field has another type or range than its name says, `num_heads`
        does not divide `hidden_size`, or `rotary_size` is odd or larger than a head.

    Example:
      >>> ClassicConfig(
      ...     vocab_size=100, hidden_size=32, num_layers=2, num_heads=4,
      ...     intermediate_size=128,
      ... ).head_size
      8
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 1024  # tokens a sequence may have
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu_new"
    tied: bool = True  # whether the word table is also the last linear map
    attention_bias: bool = True  # whether the linear maps of the attention have one
    rotary_size: int = 0  # leading entries of every head that are turned, even
    embedding_dropout: float = 0.0  # fraction dropped
    hidden_dropout: float = 0.0  # fraction dropped
    attention_dropout: float = 0.0  # fraction dropped
    initializer_range: float = 0.02  # standard deviation of new kernels
    pad_id: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    num_labels: int = 2  # of a classifier; 1 is regression
    label_names: tuple[str, ...] | None = None

    def __post_init__(self):
        check_fields(self)
        _require_whole_heads(self)
        _require_names_of_labels(self)
        _require_pairs(self.rotary_size, self.head_size)

    @property
    def head_size(self) -> int:
        """Size of a query."""
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values: as many as there are queries."""
        return self.num_heads

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """One kind: a token sees all tokens before it."""
        return (LayerKind(),)

    @property
    def layer_kinds(self) -> None:
        """None: all layers are of one kind."""
        return None

    @property
    def logit_softcap(self) -> None:
        """None: logits have no bound."""
        return None

    @property
    def type_vocab_size(self) -> int:
        """Zero: there are no token types."""
        return 0


def _require_names_of_labels(
    config: EncoderConfig | DecoderConfig | ClassicConfig,
) -> None:
    """Raises unless every label has a name, or none has."""
    names = config.label_names
    if names is not None and len(names) != config.num_labels:
        raise InputError(
            f"`label_names` must have one name for each of the {config.num_labels} "
            f"labels, got {len(names)}."
        )


def _require_pairs(rotary_size: int, head_size: int) -> None:
    """Raises unless rotary positions turn pairs of entries of a head."""
    if rotary_size % 2 or rotary_size > head_size:
        raise InputError(
            f"`rotary_size` must be even and at most {head_size}, the size of a head, "
            f"got {rotary_size}."
        )


def _require_whole_heads(config: EncoderConfig | ClassicConfig) -> None:
    """Raises unless the heads share out the hidden size."""
    if config.hidden_size % config.num_heads:
        raise InputError(
            f"`num_heads` must divide `hidden_size`, got {config.num_heads} heads "
            f"for a hidden size of {config.hidden_size}."
        )


def _require_kinds(config: EncoderConfig | DecoderConfig) -> None:
    """Raises unless every layer has a kind, and every kind a layer."""
    num_kinds, found = len(config.kinds), config.layer_kinds
    if found is None and num_kinds == 1:
        return
    if num_kinds < 2 or found is None or sorted({*found}) != [*range(num_kinds)]:
        raise InputError(
            f"`layer_kinds` must have each of 0 to {num_kinds - 1} for {num_kinds} "
            f"`kinds`, and be None for one, got {brief(found)}."
        )
    if len(found) != config.num_layers:
        raise InputError(
            f"`layer_kinds` must have one kind for each of the {config.num_layers} "
            f"layers, got {len(found)}."
        )

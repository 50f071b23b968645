"""The shape of a decoder, in our words."""

from dataclasses import dataclass

from sparse_jax.errors import InputError
from sparse_jax.models.ranges import check_fields

__all__ = ["DecoderConfig", "RopeScaling"]


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
class DecoderConfig:
    """The sizes of a decoder with rotary positions and gated layers.

    Dimension letters: B batch, T tokens, D `hidden_size`, H `num_heads`, G
    `num_kv_heads`, K `head_size`, F `intermediate_size`, V `vocab_size`, L
    `num_layers`.

    Raises:
      InputError: if a field has another type or range than its name says,
        `num_kv_heads` does not divide `num_heads`, or `head_size` is odd.

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
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens that a token sees, itself included
    tied: bool = False  # whether the word table is also the last linear map
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norms_heads: bool = False  # whether queries and keys are normed (Qwen3)
    norm_offset: float = 0.0  # added to the scale of every norm (1 for Gemma)
    scales_words: bool = False  # whether word vectors are multiplied by sqrt(D)
    attention_dropout: float = 0.0  # fraction dropped
    initializer_range: float = 0.02  # standard deviation of new kernels
    pad_id: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_fields(self)
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

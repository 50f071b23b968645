"""The shape of a decoder of the years before Llama, in our words."""

from dataclasses import dataclass

from sparse_jax.errors import InputError
from sparse_jax.models.ranges import check_fields

__all__ = ["ClassicConfig"]


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

    def __post_init__(self):
        check_fields(self)
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"`num_heads` must divide `hidden_size`, got {self.num_heads} heads "
                f"for a hidden size of {self.hidden_size}."
            )
        if self.rotary_size % 2 or self.rotary_size > self.head_size:
            raise InputError(
                f"`rotary_size` must be even and at most {self.head_size}, the size "
                f"of a head, got {self.rotary_size}."
            )

    @property
    def head_size(self) -> int:
        """Size of a query."""
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values: as many as there are queries."""
        return self.num_heads

    @property
    def sliding_window(self) -> None:
        """None: a token sees all tokens before it."""
        return None

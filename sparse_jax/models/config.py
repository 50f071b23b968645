"""The shape of an encoder, in our words."""

from dataclasses import dataclass

from sparse_jax.errors import InputError
from sparse_jax.models.ranges import check_fields

__all__ = ["EncoderConfig", "max_length_of"]


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
    type_vocab_size: int = 2
    pad_id: int = 0
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1  # fraction dropped
    attention_dropout: float = 0.1  # fraction dropped
    classifier_dropout: float = 0.1  # fraction dropped
    initializer_range: float = 0.02  # standard deviation of new kernels
    num_labels: int = 2  # 1 is regression
    label_names: tuple[str, ...] | None = None

    def __post_init__(self):
        check_fields(self)
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"`num_heads` must divide `hidden_size`, got {self.num_heads} heads "
                f"for a hidden size of {self.hidden_size}."
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise InputError(
                f"`pad_id` must be in [0, {self.vocab_size}), the words of the model, "
                f"got {self.pad_id}."
            )
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise InputError(
                f"`label_names` must have one name for each of the {self.num_labels} "
                f"labels, got {len(self.label_names)}."
            )


def max_length_of(config: EncoderConfig) -> int:
    """Returns the longest sequence a model takes, in tokens.

    RoBERTa's table of 514 positions is one for 512 tokens.

    Example:
      >>> max_length_of(EncoderConfig(
      ...     vocab_size=9, hidden_size=4, num_layers=1, num_heads=2,
      ...     intermediate_size=8, max_positions=512, position_offset=2,
      ... ))
      512
    """
    return config.max_positions

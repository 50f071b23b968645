"""The feed of a causal language model."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparse_jax.data.batches import Batches, eval_batches, train_batches
from sparse_jax.data.causal_tokens import Loss, TokenSequences, tokenize
from sparse_jax.data.conversations import Conversation
from sparse_jax.models.functional import Model
from sparse_jax.training.feed import Usage, digest_of, embedded_pad, require_embedded

__all__ = ["CausalFeed", "make_causal_feed"]

_MAX_LENGTH = 512  # tokens, as Alpaca was trained with


@dataclass(frozen=True, eq=False)
class CausalFeed:
    """Token sequences, split into batches. The members are those of `Feed`."""

    sequences: dict[str, TokenSequences]  # by split; without "train" to evaluate only
    batch_size: int
    accumulate: int
    seed: int
    max_length: int
    group_by_length: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Sequences of every split."""
        return {name: len(part) for name, part in self.sequences.items()}

    @property
    def usage(self) -> dict[str, Usage]:
        """What became of the examples of every split."""
        return {
            name: Usage(len(part), part.num_cut, part.num_dropped)
            for name, part in self.sequences.items()
        }

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the responses."""
        parts = (part.end_ids for part in self.sequences.values())
        return tuple(sorted({*itertools.chain.from_iterable(parts)}))

    @property
    def digest(self) -> str:
        """SHA-256 of all sequences as the model gets them."""
        parts = self.sequences.values()
        return digest_of(
            itertools.chain.from_iterable(
                itertools.chain(part.input_ids, part.is_target) for part in parts
            )
        )

    @property
    def batches_per_epoch(self) -> int:
        """Updates in one pass over the training sequences."""
        return len(self.train(0))

    @property
    def evaluation(self) -> dict[str, Batches]:
        """The batches of the splits that a model is evaluated on."""
        return {
            name: eval_batches(part, self.batch_size)
            for name, part in self.sequences.items()
            if name != "train"
        }

    def train(self, epoch: int, start: int = 0) -> Batches:
        """Returns the training batches of an epoch, after the first `start`."""
        return train_batches(
            self.sequences["train"],
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            accumulate=self.accumulate,
            start=start,
            group_by_length=self.group_by_length,
        )


def make_causal_feed(
    splits: Mapping[str, Sequence[Conversation]],
    tokenizer: Any,
    model: Model,
    *,
    max_length: int | None,
    batch_size: int,
    loss: Loss = "response",
    is_packed: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    group_by_length: bool = False,
) -> CausalFeed:
    """Tokenizes all conversations.

    Args:
      splits: conversations.
      tokenizer: of the model.
      model: bounds the tokens by its embeddings, and the length by its positions.
      max_length: most tokens of a sequence; None is 512, or the model's positions.
      batch_size: rows of an update.
      loss: on the responses or on all tokens.
      is_packed: whether a row holds as many sequences as fit.
      accumulate: parts that a training batch is computed in.
      seed: of the order.
      group_by_length: whether sequences of similar length share a training batch.

    Raises:
      InputError: if `max_length` is more than the model's positions or leaves nothing
        to train on, or a token has no embedding.
    """
    positions = model.config.max_positions
    length = min(_MAX_LENGTH, positions) if max_length is None else max_length
    sequences = {
        name: tokenize(
            part, tokenizer, max_length=length, positions=positions, loss=loss
        )
        for name, part in splits.items()
    }
    for name, part in sequences.items():
        require_embedded(part.input_ids, model)
        pad_id = embedded_pad(part.pad_id, model)
        sequences[name] = replace(part, pad_id=pad_id, is_packed=is_packed)
    return CausalFeed(sequences, batch_size, accumulate, seed, length, group_by_length)

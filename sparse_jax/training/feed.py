"""The feed: every batch of a run, in its order."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from sparse_jax.data.batches import Batch, Batches, eval_batches, train_batches
from sparse_jax.data.examples import Splits
from sparse_jax.data.tokenizer import Encoded, encode
from sparse_jax.errors import InputError
from sparse_jax.models.functional import Model

__all__ = [
    "Feed",
    "LabeledFeed",
    "Usage",
    "digest_of",
    "embedded_pad",
    "make_feed",
    "require_embedded",
    "usage_text",
]

_MAX_LENGTH = 128  # tokens, as the paper's runs on GLUE


class Usage(NamedTuple):
    """What became of the examples of a split."""

    used: int
    cut: int = 0  # lost tokens, being longer than `max_length`
    dropped: int = 0  # left out, because no token to train on was left


def usage_text(split: str, usage: Usage, max_length: int) -> str:
    """Returns what became of the examples of a split, in words.

    Example:
      >>> usage_text("train", Usage(711, cut=866, dropped=238), 128)
      'train: 711 examples used, 866 cut to 128 tokens, 238 dropped without a target'
      >>> usage_text("validation", Usage(1), 128)
      'validation: 1 example used'
    """
    text = f"{split}: {usage.used:,} example{'s'[: usage.used != 1]} used"
    if usage.cut:
        text += f", {usage.cut:,} cut to {max_length:,} tokens"
    if usage.dropped:
        text += f", {usage.dropped:,} dropped without a target"
    return text


class Feed(Protocol):
    """The batches of a run. A batch has at least `input_ids` and `attention_mask`."""

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of every split."""
        ...

    @property
    def usage(self) -> dict[str, Usage]:
        """What became of the examples of every split."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of all examples as the model gets them."""
        ...

    @property
    def max_length(self) -> int:
        """Most tokens of an example."""
        ...

    @property
    def batches_per_epoch(self) -> int:
        """Updates in one pass over the training examples."""
        ...

    @property
    def evaluation(self) -> Mapping[str, Iterable[Batch]]:
        """The batches of the splits that a model is evaluated on."""
        ...

    def train(self, epoch: int, start: int = 0) -> Iterable[Batch]:
        """Returns the training batches of an epoch, after the first `start`."""
        ...


@dataclass(frozen=True, eq=False)
class LabeledFeed:
    """The encoded examples of a task, split into batches."""

    encoded: dict[str, Encoded]  # by split, "train" first
    batch_size: int
    accumulate: int
    seed: int
    group_by_length: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of every split."""
        return {name: len(part) for name, part in self.encoded.items()}

    @property
    def usage(self) -> dict[str, Usage]:
        """What became of the examples of every split."""
        return {
            name: Usage(len(part), part.num_cut) for name, part in self.encoded.items()
        }

    @property
    def digest(self) -> str:
        """SHA-256 of all examples as the model gets them."""
        parts = self.encoded.values()
        ids = (array for part in parts for array in part.input_ids)
        return digest_of(itertools.chain(ids, (part.labels for part in parts)))

    @property
    def max_length(self) -> int:
        """Most tokens of an example."""
        return self.encoded["train"].max_length

    @property
    def batches_per_epoch(self) -> int:
        """Updates in one pass over the training examples."""
        return -(-len(self.encoded["train"]) // self.batch_size)

    @property
    def evaluation(self) -> dict[str, Batches]:
        """The batches of the splits that predictions are evaluated on."""
        splits = {name: self.encoded[name] for name in self.encoded if name != "train"}
        return {name: eval_batches(e, self.batch_size) for name, e in splits.items()}

    def train(self, epoch: int, start: int = 0) -> Batches:
        """Returns the training batches of an epoch, after the first `start`."""
        return train_batches(
            self.encoded["train"],
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            accumulate=self.accumulate,
            start=start,
            group_by_length=self.group_by_length,
        )


def make_feed(
    splits: Splits,
    tokenizer: Any,
    model: Model,
    *,
    max_length: int | None,
    batch_size: int,
    accumulate: int = 1,
    seed: int = 0,
    group_by_length: bool = False,
) -> LabeledFeed:
    """Encodes all examples.

    Args:
      splits: texts and labels.
      tokenizer: of the model.
      model: bounds the tokens by its embeddings, and the length by its positions.
      max_length: most tokens of an example; None is 128, or the model's positions.
      batch_size: examples of an update.
      accumulate: parts that a training batch is computed in.
      seed: of the order.
      group_by_length: whether examples of similar length share a training batch.

    Raises:
      InputError: if `max_length` is more than the model's positions, or a token or
        its type has no embedding.
    """
    positions = model.config.max_positions
    length = min(_MAX_LENGTH, positions) if max_length is None else max_length
    encoded = {
        name: encode(examples, tokenizer, max_length=length, positions=positions)
        for name, examples in splits.items()
    }
    for name, part in encoded.items():
        require_embedded(part.input_ids, model)
        require_embedded(part.token_type_ids or (), model, kind="token type")
        encoded[name] = replace(part, pad_id=embedded_pad(part.pad_id, model))
    return LabeledFeed(encoded, batch_size, accumulate, seed, group_by_length)


def require_embedded(
    rows: Iterable[np.ndarray], model: Model, kind: str = "token"
) -> None:
    """Raises if a model has no embedding of a number: JAX would go on with NaN.

    Args:
      rows: numbers of tokens, or of their types.
      model: whose tables they are looked up in.
      kind: "token" or "token type".

    Raises:
      InputError: with the largest number.
    """
    most = max((int(row.max()) for row in rows if row.size), default=None)
    if most is None:
        return
    config = model.config
    size = config.vocab_size if kind == "token" else config.type_vocab_size
    if most >= size:
        raise InputError(
            f"`model` must have an embedding of every {kind} of its tokenizer, got "
            f"{size} and the {kind} {most} in the data. Use the tokenizer that belongs "
            "to the model, or resize the embeddings."
        )


def embedded_pad(pad_id: int, model: Model) -> int:
    """Returns a token to pad with: another one if the model has no embedding of it.

    No token attends to padding, but NaN times nothing is NaN.
    """
    return pad_id if pad_id < model.config.vocab_size else 0


def digest_of(arrays: Iterable[np.ndarray]) -> str:
    """Returns the SHA-256 of arrays and of their lengths."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(len(array).to_bytes(8, "little"))
        found.update(array.tobytes())
    return found.hexdigest()

"""The feed: every batch of a run, in its order."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparse_jax.data.batches import (
    Batch,
    Batches,
    Encoded,
    TokenSequences,
    eval_batches,
    train_batches,
)
from sparse_jax.data.causal_tokens import tokenize
from sparse_jax.data.conversations import Conversation
from sparse_jax.data.examples import Splits
from sparse_jax.data.read_rows import Rows
from sparse_jax.data.stream import Place, Stream
from sparse_jax.data.tokenizer import encode
from sparse_jax.errors import InputError
from sparse_jax.models.functional import Model
from sparse_jax.params.fields import Json
from sparse_jax.training.settings import Settings
from sparse_jax.training.token_cache import encoded_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MAX_LENGTH",
    "Ahead",
    "Feed",
    "Usage",
    "causal_feed",
    "causal_length",
    "labeled_feed",
    "sequence_feed",
    "streamed_feed",
    "tokenize_splits",
    "usage_text",
]

# Tokens, as the paper's runs on GLUE, and as Alpaca was trained with.
MAX_LENGTH, _CAUSAL_MAX_LENGTH = 128, 512


class Usage(NamedTuple):
    """What became of the examples of a split."""

    used: int
    truncated: int = 0  # of these, longer than `max_length`
    dropped: int = 0  # left out, because no token to train on was left


def usage_text(split: str, usage: Usage, max_length: int) -> str:
    """Returns what became of the examples of a split, in words.

    Example:
      >>> usage_text("train", Usage(711, truncated=628), 128)
      'train: 711 examples used (628 truncated to 128 tokens)'
      >>> usage_text("train", Usage(711, dropped=238), 128)
      'train: 711 examples used, 238 dropped (no tokens to train on)'
      >>> usage_text("validation", Usage(1), 128)
      'validation: 1 example used'
    """
    text = f"{split}: {usage.used:,} example{'s'[: usage.used != 1]} used"
    if usage.truncated:
        text += f" ({usage.truncated:,} truncated to {max_length:,} tokens)"
    if usage.dropped:
        text += f", {usage.dropped:,} dropped (no tokens to train on)"
    return text


class Ahead:
    """Batches, the next of which is read while a device computes.

    Example:
      >>> batches = Ahead([{"input_ids": np.zeros(1)}])
      >>> batches.read()
      >>> batches.take(), batches.take()
      ({'input_ids': array([0.])}, None)
    """

    def __init__(self, batches: Iterable[Batch]):
        self._batches = iter(batches)
        self._read: tuple[Batch | None, InputError | None] | None = None

    def read(self) -> None:
        """Reads the next batch; what is wrong with it is raised when it is taken."""
        if self._read is None:
            try:
                self._read = next(self._batches, None), None
            except InputError as error:
                self._read = None, error

    def take(self) -> Batch | None:
        """Returns the next batch, and None after the last."""
        self.read()
        assert self._read is not None
        (batch, error), self._read = self._read, None
        if error is not None:
            raise error
        return batch


@dataclass(frozen=True, eq=False)
class Feed:
    """The batches of a run. A batch has at least `input_ids` and `attention_mask`."""

    examples: Mapping[str, Encoded | TokenSequences]  # by split
    settings: Settings  # of the run
    max_length: int  # most tokens of an example
    usage: Mapping[str, Usage]  # what became of the examples of every split
    digest: str  # SHA-256 of all examples as the model gets them
    end_ids: tuple[int, ...] = ()  # tokens that end the responses
    stream: Stream | None = None  # in place of the training examples

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of every split."""
        return {name: usage.used for name, usage in self.usage.items()}

    @cached_property
    def batches_per_epoch(self) -> int:
        """Updates in one pass over the training examples; of a stream, in the run."""
        if self.stream is not None:
            return self.settings.max_steps or 1
        return len(self._epoch(0))

    @cached_property
    def evaluation(self) -> dict[str, Batches]:
        """The batches of the splits that a model is evaluated on."""
        parts = {name: part for name, part in self.examples.items() if name != "train"}
        size = self.settings.batch_size
        return {name: eval_batches(part, size) for name, part in parts.items()}

    def usage_after(self, batches: int) -> dict[str, Usage]:
        """Returns what became of the examples, with those of a stream so far."""
        if self.stream is None:
            return {**self.usage}
        return {"train": Usage(*self.stream.counts(batches)), **self.usage}

    def train(self, epoch: int, start: int = 0) -> Iterable[Batch]:
        """Returns the training batches of an epoch, after the first `start`."""
        if self.stream is not None:
            return self.stream.batches(epoch * self.batches_per_epoch + start)
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int = 0) -> Batches:
        """Returns the batches of an epoch of examples that are in memory."""
        return train_batches(
            self.examples["train"],
            self.settings.batch_size,
            seed=self.settings.seed,
            epoch=epoch,
            accumulate=self.settings.accumulate,
            start=start,
            group_by_length=self.settings.group_by_length,
        )


def labeled_feed(
    splits: Splits,
    tokenizer: "PreTrainedTokenizerBase",
    model: Model,
    settings: Settings,
    key: list[Json] | None = None,
) -> Feed:
    """Encodes all examples, or takes what an earlier run has kept.

    Args:
      splits: texts and labels.
      tokenizer: of the model.
      model: bounds the tokens by its embeddings, and the length by its positions.
      settings: of the run; without `max_length` an example has at most 128 tokens, or
        the model's positions.
      key: what says which tokenizer it is; None keeps nothing.

    Raises:
      InputError: if `max_length` is more than the model's positions, or a token or
        its type has no embedding.
    """
    positions = model.config.max_positions
    length = settings.max_length or min(MAX_LENGTH, positions)
    bounds, texts = {"max_length": length, "positions": positions}, {**splits}
    for name, examples in splits.items():
        if (few := _few(name, len(examples), settings)) is not None:
            texts[name] = examples.take(few)
    encoded = encoded_of(
        texts,
        key and [*key, length, positions],
        lambda: {name: encode(one, tokenizer, **bounds) for name, one in texts.items()},
    )
    for name, part in encoded.items():
        _require_embedded(part.input_ids, model)
        if not model.config.type_vocab_size:
            part = replace(part, token_type_ids=None)
        _require_embedded(part.token_type_ids or (), model, kind="token type")
        encoded[name] = replace(part, pad_id=_embedded_pad(part.pad_id, model))
    parts = [*encoded.values()]
    ids = chain.from_iterable(part.input_ids for part in parts)
    return Feed(
        encoded,
        settings,
        length,
        usage={
            name: Usage(len(part), part.num_truncated) for name, part in encoded.items()
        },
        digest=_digest_of(
            chain(ids, (x.labels for x in parts), *map(_weights_of, parts))
        ),
    )


def causal_feed(
    splits: Mapping[str, Sequence[Conversation]],
    tokenizer: "PreTrainedTokenizerBase",
    model: Model,
    settings: Settings,
) -> Feed:
    """Tokenizes all conversations, as `tokenize_splits`, and makes their feed."""
    sequences = tokenize_splits(splits, tokenizer, model, settings)
    return sequence_feed(sequences, model, settings)


def tokenize_splits(
    splits: Mapping[str, Sequence[Conversation]],
    tokenizer: "PreTrainedTokenizerBase",
    model: Model,
    settings: Settings,
) -> dict[str, TokenSequences]:
    """Returns the tokens of all conversations.

    Args:
      splits: conversations; without "train" to evaluate only.
      tokenizer: of the model.
      model: bounds the tokens by its embeddings, and the length by its positions.
      settings: of the run; without `max_length` a sequence has at most 512 tokens, or
        the model's positions.

    Raises:
      InputError: if `max_length` is more than the model's positions or leaves nothing
        to train on.
    """
    length = causal_length(model, settings)
    bounds = {"max_length": length, "positions": model.config.max_positions}
    sequences = {}
    for name, texts in splits.items():
        if (few := _few(name, len(texts), settings)) is not None:
            texts = [texts[i] for i in few]
        part = tokenize(texts, tokenizer, **bounds, loss=settings.resolved_loss_on)
        if name != "train":
            part = replace(part, weights=None)
        # A long text is many sequences.
        if (few := _few(name, len(part), settings)) is not None:
            ids, marks = ([x[i] for i in few] for x in (part.input_ids, part.is_target))
            weights = None if part.weights is None else part.weights[[*few]]
            part = replace(part, input_ids=ids, is_target=marks, weights=weights)
        sequences[name] = part
    return sequences


def causal_length(model: Model, settings: Settings) -> int:
    """Returns the most tokens of a sequence."""
    return settings.max_length or min(_CAUSAL_MAX_LENGTH, model.config.max_positions)


def sequence_feed(
    sequences: Mapping[str, TokenSequences], model: Model, settings: Settings
) -> Feed:
    """Returns the feed of tokens.

    Raises:
      InputError: if a token has no embedding.
    """
    sequences = {
        name: _embedded(part, model, settings) for name, part in sequences.items()
    }
    parts = sequences.values()
    return Feed(
        sequences,
        settings,
        causal_length(model, settings),
        usage={
            name: Usage(len(part), part.num_truncated, part.num_dropped)
            for name, part in sequences.items()
        },
        digest=_digest_of(
            chain.from_iterable(
                chain(part.input_ids, part.is_target, _weights_of(part))
                for part in parts
            )
        ),
        end_ids=tuple(sorted({*chain.from_iterable(part.end_ids for part in parts)})),
    )


def streamed_feed(
    path: Path,
    read: Callable[[Rows], list[Conversation]],
    start: Place,
    sequences: Mapping[str, TokenSequences],
    tokenizer: "PreTrainedTokenizerBase",
    model: Model,
    settings: Settings,
) -> Feed:
    """Returns the feed of a file that is read while the run goes on.

    Args:
      path: of JSON lines.
      read: records -> their conversations.
      start: of the records to train on.
      sequences: to evaluate on.
      tokenizer: of the model.
      model: bounds the tokens by its embeddings, and the length by its positions.
      settings: of the run.

    Raises:
      InputError: if a record of the first window is wrong.
    """
    how: dict[str, Any] = {
        "max_length": causal_length(model, settings),
        "positions": model.config.max_positions,
        "loss": settings.resolved_loss_on,
    }

    def sequences_of(rows: Rows) -> TokenSequences:
        part = tokenize(read(rows), tokenizer, **how, may_be_empty=True)
        return _embedded(part, model, settings)

    stream = Stream(
        path, sequences_of, settings.batch_size, settings.accumulate, settings.seed,
        settings.buffer_size, start,
    )  # fmt: skip
    # The digest is of the first window: what follows may be mended.
    feed = sequence_feed({"train": stream.first, **sequences}, model, settings)
    usage = {name: one for name, one in feed.usage.items() if name != "train"}
    return replace(feed, stream=stream, usage=usage)


def _embedded(part: TokenSequences, model: Model, settings: Settings) -> TokenSequences:
    """Returns sequences as a model takes them, packed if settings say so."""
    _require_embedded(part.input_ids, model)
    pad_id = _embedded_pad(part.pad_id, model)
    return replace(part, pad_id=pad_id, is_packed=settings.packing)


def _few(split: str, count: int, settings: Settings) -> Sequence[int] | None:
    """Returns the examples of a split that are used, None if these are all.

    They are spread evenly: files are often sorted by their labels.
    """
    is_train = split == "train"
    most = settings.max_train_samples if is_train else settings.max_eval_samples
    if most is None or most >= count:
        return None
    return [i * count // most for i in range(most)]


def _require_embedded(
    rows: Iterable[np.ndarray], model: Model, kind: str = "token"
) -> None:
    """Raises if a model has no embedding of a number: JAX would go on with NaN."""
    config = model.config
    size = config.vocab_size if kind == "token" else config.type_vocab_size
    most = max((int(row.max()) for row in rows if row.size), default=-1)
    if most >= size:
        raise InputError(
            f"`model` must have an embedding of every {kind} of its tokenizer, got "
            f"{size} and the {kind} {most} in the data. Use the tokenizer that belongs "
            "to the model, or resize the embeddings."
        )


def _embedded_pad(pad_id: int, model: Model) -> int:
    """Returns a token to pad with: another one if the model has no embedding of it."""
    # No token attends to padding, but NaN times nothing is NaN.
    return pad_id if pad_id < model.config.vocab_size else 0


def _weights_of(part: Encoded | TokenSequences) -> list[np.ndarray]:
    """Returns the weights of examples that have any."""
    return [] if part.weights is None else [part.weights]


def _digest_of(arrays: Iterable[np.ndarray]) -> str:
    """Returns the SHA-256 of arrays and of their lengths."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(len(array).to_bytes(8, "little"))
        found.update(array.tobytes())
    return found.hexdigest()

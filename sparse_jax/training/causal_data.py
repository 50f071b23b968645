"""The data of causal language models: read and tokenized, kept, or streamed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.data.chat_template import template_digest, warn_of_template
from sparse_jax.data.conversations import PROMPTS, Conversation
from sparse_jax.data.files import require_new_split
from sparse_jax.data.instructions import (
    data_parts,
    load_conversations,
    load_whole,
    read_conversations,
    streamed_files,
)
from sparse_jax.data.read_rows import Rows
from sparse_jax.data.sources import Part, file_hash
from sparse_jax.data.stream import Place, is_streamed, read_head, sampled_hash
from sparse_jax.data.tokenizer import tokenizer_digest
from sparse_jax.errors import listed
from sparse_jax.generation.ends import require_ends
from sparse_jax.models.functional import Model
from sparse_jax.params.fields import Json
from sparse_jax.training.feed import (
    Feed,
    causal_length,
    sequence_feed,
    streamed_feed,
    tokenize_splits,
)
from sparse_jax.training.settings import Settings
from sparse_jax.training.token_cache import Tokens, tokenizer_files, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["causal_data"]

_log = logging.getLogger(__name__)

# Which part of a file is evaluated on.
_WHOLE = "all of them"
_HELD_OUT = "those held out of the training"
_TRAINED = "all of them, which the adapter was trained on"
_FIRST = "the first, held out of the training"
_RUN = ""  # none: a run trains


class _Read(NamedTuple):
    """Data of a run or of an evaluation."""

    feed: Feed
    hashes: list[str | None]  # of the training data, and of those for validation
    has_chats: bool
    place: str  # of the split `validation`, for a message


def causal_data(
    settings: Settings,
    folder: Path,
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    adapter: Adapter | None,
) -> tuple[Feed, dict[str, Json]]:
    """Returns texts as tokens, and what an adapter has to say of them.

    Args:
      settings: of a run, or of the run that an adapter comes from.
      folder: of the model.
      model: bounds the tokens and the length.
      tokenizer: of the model.
      adapter: that is evaluated; None trains.

    Raises:
      InputError: for anything wrong with the files, or the length.
    """
    reader = _Reader(settings, model, tokenizer)
    if settings.streaming:
        found = _streamed(reader)
    else:
        found = _in_memory(reader, folder, adapter)
    feed = found.feed
    kept: dict[str, Json] = {
        "max_length": feed.max_length,
        "loss_on": settings.resolved_loss_on,
        "packing": settings.packing,
        "template": settings.resolved_template,
        "columns": settings.columns,
        "held_out": reader.held_out,
        "data_hash": found.hashes[0],
        "validation_hash": found.hashes[1],
        "tokenizer_hash": tokenizer_digest(tokenizer),
        "eos_token_id": list(feed.end_ids),
    }
    if found.has_chats:
        kept["chat_template_hash"] = template_digest(tokenizer)
    if adapter is not None:
        if found.has_chats:
            warn_of_template(adapter.settings.get("chat_template_hash"), tokenizer)
        _warn_of_ends(adapter, feed.end_ids)
        places = {"validation": found.place} | {
            name: f"`{file}`: {_WHOLE}" for name, file in settings.eval_files.items()
        }
        for name, place in places.items():
            if name in feed.examples:
                count = feed.sizes[name]
                _log.warning("evaluating on %d examples of %s", count, place)
    return feed, kept


@dataclass(frozen=True)
class _Reader:
    """Reads texts as settings say."""

    settings: Settings
    model: Model
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def how(self) -> dict[str, Any]:
        """Arguments of the functions that read."""
        template = PROMPTS[self.settings.resolved_template]
        return {"template": template, "columns": self.settings.columns}

    @property
    def held_out(self) -> float | None:
        """The part of a single file that is not trained on, None if all is."""
        if self.settings.eval_data and self.settings.held_out is None:
            return None
        return self.settings.resolved_held_out

    def read(self, rows: Rows) -> list[Conversation]:
        """Returns the texts of records."""
        return read_conversations(rows, self.tokenizer, **self.how)

    def head(self, path: Path) -> dict[str, list[Conversation]]:
        """Returns the records that are held out of a stream."""
        rows, _ = read_head(path, int(self.held_out or 0))
        return {"validation": self.read(rows)}

    def whole(self, data: str | Path | Part) -> dict[str, list[Conversation]]:
        """Returns all records of some data."""
        return load_whole(data, self.tokenizer, **self.how)

    def tokens(self, splits: dict[str, list[Conversation]]) -> Tokens:
        """Returns the tokens of splits and of the other files to evaluate on."""
        for name, file in self.settings.eval_files.items():
            require_new_split(name, file, splits)
            (splits[name],) = self.whole(file).values()
        has_chats = any(one.is_rendered for part in splits.values() for one in part)
        sequences = tokenize_splits(splits, self.tokenizer, self.model, self.settings)
        return Tokens(sequences, has_chats)


def _streamed(reader: _Reader) -> _Read:
    """Returns data of which the training examples are read while the run goes on."""
    path, validation = streamed_files(reader.settings.data)
    start, splits, has_chats = Place(), {}, False
    if validation is not None:
        splits = reader.whole(validation)
    elif reader.held_out is not None:
        _, start = read_head(path, int(reader.held_out))
        splits = reader.head(path)
    tokens = reader.tokens(splits)

    def read(rows: Rows) -> list[Conversation]:
        nonlocal has_chats
        found = reader.read(rows)
        has_chats = has_chats or any(one.is_rendered for one in found)
        return found

    args = (tokens.splits, reader.tokenizer, reader.model, reader.settings)
    feed = streamed_feed(path, read, start, *args)
    hashes = [sampled_hash(path), validation and validation.digest]
    return _Read(feed, hashes, has_chats or tokens.has_chats, "")


def _in_memory(reader: _Reader, folder: Path, adapter: Adapter | None) -> _Read:
    """Returns data that are read as a whole, or kept from an earlier run."""
    settings, model = reader.settings, reader.model
    parts = data_parts(settings.data, seed=settings.seed)
    hashes = [None if one is None else one.digest for one in parts]
    used, part = _part_to_use(settings.data, parts, adapter)

    def make() -> Tokens:
        if part == _FIRST:
            return reader.tokens(reader.head(Path(str(used.path))))
        if part in (_RUN, _HELD_OUT):
            share = {"held_out": reader.held_out or 0.0, "seed": settings.seed}
            how = {**reader.how, **share}
            splits = load_conversations(settings.data, reader.tokenizer, **how)
            return reader.tokens(splits)
        if part == _TRAINED and settings.eval_files:
            return reader.tokens({})
        return reader.tokens(reader.whole(used))

    key: list[Json] | None = None
    if parts[0].digest is not None and not settings.no_cache:
        files = [[name, file_hash(Path(f))] for name, f in settings.eval_files.items()]
        data = settings.data
        places = data if isinstance(data, Mapping) else [x and x.path for x in parts]
        # The same bytes are other texts in a file of another kind.
        kinds = [Path(str(x)).suffix for x in (*places, *settings.eval_files.values())]
        key = [
            hashes, kinds, files, part, reader.held_out, settings.seed,
            asdict(reader.how["template"]), settings.columns,
            causal_length(model, settings), model.config.max_positions,
            settings.resolved_loss_on, settings.max_eval_samples,
            settings.max_train_samples,
            tokenizer_files(folder),
        ]  # fmt: skip
    tokens, has_chats = tokens_of(key, make)
    feed = sequence_feed(tokens, model, settings)
    return _Read(feed, hashes, has_chats, f"{used.name}: {part}")


def _warn_of_ends(adapter: Adapter, end_ids: Sequence[int]) -> None:
    """Warns if texts end in a token that an adapter was not trained to end with."""
    trained = adapter.settings.get("eos_token_id")
    trained = require_ends(trained, "`eos_token_id` of the adapter")
    # Earlier versions did not record them.
    if trained and (other := sorted({*end_ids} - {*trained})):
        _log.warning(
            "the texts end in the token %s, and those that the adapter was trained on "
            "in %s: check the tokenizer's `eos_token` and chat template",
            listed(map(str, other)), listed(map(str, trained)),
        )  # fmt: skip


def _part_to_use(
    data: object, parts: tuple[Part, Part | None], adapter: Adapter | None
) -> tuple[Part, str]:
    """Returns the rows that an adapter is evaluated on, and which part of them.

    That is all of them, unless the adapter was trained on another part.
    """
    train, used = parts[0], parts[1] or parts[0]
    if adapter is None:
        return train, _RUN
    trained = adapter.settings.get("data_hash")
    validation = adapter.settings.get("validation_hash")
    # Of a folder, earlier versions did not say what was in it.
    is_old = "data_hash" in adapter.settings and trained is None
    if is_old and parts[1] is None and Path(str(data)).is_dir():
        return used, _HELD_OUT
    digest, held_out = used.digest, _HELD_OUT
    if is_streamed(trained) and used.path is not None:
        digest, held_out = sampled_hash(used.path), _FIRST
    if digest is None or digest != trained or digest == validation:
        return used, _WHOLE
    # A run with other files to evaluate on held nothing out.
    is_held_out = validation is None and adapter.settings.get("held_out", 0) is not None
    return used, held_out if is_held_out else _TRAINED

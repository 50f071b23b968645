"""What is trained or evaluated, and on what: a task, a model and its batches."""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.use import require_base
from sparse_jax.data.batches import Encoded
from sparse_jax.data.chat_template import template_digest, warn_of_template
from sparse_jax.data.conversations import PROMPTS
from sparse_jax.data.examples import Splits
from sparse_jax.data.files import load, require_new_split
from sparse_jax.data.glue import CAUSAL, Task, find_task
from sparse_jax.data.instructions import data_parts, load_conversations, load_whole
from sparse_jax.data.sources import Part, file_hash, one_part
from sparse_jax.data.tokenizer import (
    load_tokenizer,
    tokenizer_digest,
    warn_of_tokenizer,
)
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.generation.ends import require_ends
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.labels import label_leaves
from sparse_jax.models.hf.model_files import local_folder, read_object
from sparse_jax.models.hf.pretrained import base_hash, leaf_digests, new_leaves
from sparse_jax.models.hf.read_config import FAMILIES, read_config
from sparse_jax.params.fields import Json
from sparse_jax.params.names import map_named
from sparse_jax.sharding.mesh import mesh_of
from sparse_jax.sharding.placement import Placement, load_placed
from sparse_jax.sharding.processes import is_first_process
from sparse_jax.training.feed import (
    Feed,
    causal_length,
    labeled_feed,
    sequence_feed,
    tokenize_splits,
    usage_text,
)
from sparse_jax.training.objective import (
    Objective,
    classification,
    head_bias,
    language_modeling,
)
from sparse_jax.training.recipe_options import BALANCED
from sparse_jax.training.settings import Settings
from sparse_jax.training.token_cache import Tokens, tokenizer_files, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Base", "ModelAndData", "load_model_and_data"]

_log = logging.getLogger(__name__)

_CONFIG = "config.json"  # of a model
# Which part of a file is evaluated on.
_WHOLE = "all of them"
_HELD_OUT = "those held out of the training"
_TRAINED = "all of them, which the adapter was trained on"
_RUN = ""  # none: a run trains


@dataclass(frozen=True, eq=False)
class Base:
    """A pre-trained model with a head for a task."""

    folder: Path
    hash: str  # SHA-256 of the weights
    model: Model
    params: Params
    new: tuple[str, ...]  # leaves that the checkpoint does not have, or not for this
    placement: Placement  # of the parameters

    @functools.cached_property
    def leaves(self) -> dict[str, str]:
        """What the files say of every leaf, so that another base can be told by it."""
        return leaf_digests(self.folder)


class ModelAndData(NamedTuple):
    """What is trained or evaluated, and on what."""

    objective: Objective
    base: Base
    feed: Feed


def load_model_and_data(
    settings: Settings, *, adapter: Adapter | None = None, splits: Splits | None = None
) -> ModelAndData:
    """Loads the data and the model that settings name.

    Args:
      settings: of a run, or of the run that an adapter comes from.
      adapter: that is evaluated; None trains. Of the file that it was trained on, the
        part held out is used, of any other all; a line says which.
      splits: labeled examples, in place of those that the settings name.

    Raises:
      InputError: for anything wrong with the task, its files, the model's folder, or
        the length; or if the model is not the base of the adapter.
    """
    # The folder first: data from the Hub takes minutes to arrive, or to fail.
    local_folder(settings.model)
    mesh = mesh_of(settings.mesh)
    if settings.is_causal:
        loaded = _causal(settings, adapter, mesh)
    else:
        loaded = _labeled(settings, adapter, mesh, splits)
    loaded.base.placement.require_batch(settings.batch_size, settings.accumulate)
    feed = loaded.feed
    for split, usage in feed.usage.items() if adapter is not None else ():
        if split != "train" and (usage.cut or usage.dropped):
            _log.warning("%s", usage_text(split, usage, feed.max_length))
    return loaded


def _load_base(settings: Settings, mesh: Mesh, labels: Sequence[str] | None) -> Base:
    """Loads a decoder, or an encoder for labels; what it lacks comes from the seed."""
    head = CausalLM if labels is None else SequenceClassifier
    folder = local_folder(settings.model)
    family, _ = read_config(folder)
    if head.__name__ not in family.architectures:
        kind = "a decoder for the task causal"
        if labels is not None:
            kind = "an encoder for a task with labels"
        able = [word for word in FAMILIES
                if head.__name__ in FAMILIES[word].architectures]  # fmt: skip
        raise InputError(
            f"`model` must be {kind}, one of {', '.join(able)}, got model type "
            f"{family.name!r} in `{folder}`."
        )
    model, params, placement = load_placed(
        mesh,
        folder,
        head=head,
        labels=labels,
        dtype=jnp.dtype(settings.dtype),
        key=jax.random.key(settings.seed),
    )
    new = new_leaves(model, folder, labels)
    return Base(folder, base_hash(folder), model, params, new, placement)


def _labeled(
    settings: Settings, adapter: Adapter | None, mesh: Mesh, splits: Splits | None
) -> ModelAndData:
    """Returns classes, or numbers, and a model that predicts them."""
    _, config = read_config(local_folder(settings.model))
    # In the order of its outputs; none if it is no encoder, or has no names.
    base_labels = getattr(config, "label_names", None) or ()
    part = None if splits else one_part(settings.data, seed=settings.seed)
    splits = splits or load(
        find_task(settings.task),
        settings.data,
        order=base_labels if adapter is None else adapter.labels,
        drop_unlabeled=settings.drop_unlabeled,
        more=settings.eval_files,
        columns=settings.columns,
        held_out=settings.resolved_held_out,
        seed=settings.seed,
    )
    if is_first_process():
        for note in splits.notes:
            _log.info("%s", note)
        for warning in splits.warnings:
            _log.warning("%s", warning)
    base = _load_base(settings, mesh, splits.task.labels or ())
    _warn_of_problem_type(base, splits.task)
    tokenizer = _tokenizer(base, adapter)
    feed = labeled_feed(splits, tokenizer, base.model, settings)
    if adapter is None and settings.head_bias == "labels":
        train = cast(Encoded, feed.examples["train"])
        base = _with_head_bias(base, train.labels)
    kept = {
        "max_length": feed.max_length,
        "tokenizer_hash": tokenizer_digest(tokenizer),
        "drop_unlabeled": settings.drop_unlabeled,
        "columns": settings.columns,
        "held_out": settings.resolved_held_out,
        "data_hash": part and part.digest,
        "base_labels": list(base_labels),
    }
    weights = None
    if adapter is None:
        train = cast(Encoded, feed.examples["train"])
        weights = _class_weights(settings, splits.task, train.labels)
    return ModelAndData(classification(splits.task, kept, weights), base, feed)


def _class_weights(
    settings: Settings, task: Task, labels: np.ndarray
) -> list[float] | None:
    """Returns the weights of the classes that settings ask for, None for all alike."""
    asked = settings.class_weights
    for name, value in (
        ("class_weights", asked),
        ("label_smoothing", settings.label_smoothing or None),
    ):
        if value is not None and (task.is_multilabel or not task.labels):
            raise InputError(
                f"`{name}` must be left out with task {settings.task!r}, got "
                f"{brief(value)}. It belongs to tasks of one class for each example."
            )
    names = [*(task.labels or ())]
    if asked is None:
        return None
    if asked == BALANCED:
        counts = np.bincount(labels, minlength=len(names))
        # A class without examples weighs nothing either way.
        return (len(labels) / (len(names) * np.maximum(counts, 1))).tolist()
    found = dict.fromkeys(names, 1.0)
    for pair in asked.split(","):
        name, _, weight = pair.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if name not in found or not (value >= 0 and math.isfinite(value)):
            raise InputError(
                f"`class_weights` must be {BALANCED}, or pairs of a label and a "
                f"weight such as {names[0]}=2,{names[1]}=1, got {brief(asked)}."
            )
        found[name] = value
    return [*found.values()]


def _warn_of_problem_type(base: Base, task: Task) -> None:
    """Warns if the head of a base is used for labels of another kind than its own."""
    said = read_object(base.folder / _CONFIG).get("problem_type")
    is_used = not {*label_leaves(base.model)} & {*base.new}
    if is_used and said not in (None, task.problem_type) and is_first_process():
        _log.warning(
            "the head of `%s` is for %s as its `problem_type` says, and it is used "
            "for %s", base.folder, brief(said), task.problem_type
        )  # fmt: skip


def _with_head_bias(base: Base, labels: np.ndarray) -> Base:
    """Returns the base with the bias of a new head at what the labels say.

    Otherwise the first gradients are about the offset of all examples alike, and that
    of a weight below the head is of little else.
    """
    own = {*base.new} & {*label_leaves(base.model)}

    def start(name: str, leaf: jax.Array) -> jax.Array:
        if name not in own or leaf.ndim != 1:
            return leaf
        bias = head_bias(labels, len(leaf)).astype(leaf.dtype)
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: bias[index]
        )

    return replace(base, params=map_named(start, base.params))


def _causal(settings: Settings, adapter: Adapter | None, mesh: Mesh) -> ModelAndData:
    """Returns texts, and a model that continues them."""
    if settings.data is None:
        raise InputError(
            f"`data` must be given for the task {CAUSAL}, got nothing. Pass a file of "
            "instructions, chats or text, `.json`, `.jsonl` or `.txt`."
        )
    base = _load_base(settings, mesh, None)
    tokenizer = _tokenizer(base, adapter)
    template = PROMPTS[settings.resolved_template]
    parts = data_parts(settings.data, seed=settings.seed)
    hashes = [None if one is None else one.digest for one in parts]
    used, part = _part_to_use(settings.data, parts, adapter)
    held_out = _held_out(settings)

    def make() -> Tokens:
        how = {"template": template, "columns": settings.columns}
        if part in (_RUN, _HELD_OUT):
            share = {"held_out": held_out or 0.0, "seed": settings.seed}
            splits = load_conversations(settings.data, tokenizer, **how, **share)
        elif part == _TRAINED and settings.eval_files:
            splits = {}
        else:
            splits = load_whole(used, tokenizer, **how)
        for name, file in settings.eval_files.items():
            require_new_split(name, file, splits)
            (splits[name],) = load_whole(file, tokenizer, **how).values()
        has_chats = any(one.is_rendered for part in splits.values() for one in part)
        tokens = tokenize_splits(splits, tokenizer, base.model, settings)
        return Tokens(tokens, has_chats)

    key: list[Json] | None = None
    if parts[0].digest is not None and not settings.no_cache:
        files = [[name, file_hash(Path(f))] for name, f in settings.eval_files.items()]
        key = [
            hashes, files, part, held_out, settings.seed, asdict(template),
            settings.columns, causal_length(base.model, settings),
            base.model.config.max_positions, settings.resolved_loss_on,
            settings.max_eval_samples, tokenizer_files(base.folder),
        ]  # fmt: skip
    splits, has_chats = tokens_of(key, make)
    feed = sequence_feed(splits, base.model, settings)
    kept: dict[str, Json] = {
        "max_length": feed.max_length,
        "loss_on": settings.resolved_loss_on,
        "packing": settings.packing,
        "template": settings.resolved_template,
        "columns": settings.columns,
        "held_out": held_out,
        "data_hash": hashes[0],
        "validation_hash": hashes[1],
        "tokenizer_hash": tokenizer_digest(tokenizer),
        "eos_token_id": list(feed.end_ids),
    }
    if has_chats:
        kept["chat_template_hash"] = template_digest(tokenizer)
    if adapter is not None:
        if has_chats:
            warn_of_template(adapter.settings.get("chat_template_hash"), tokenizer)
        _warn_of_ends(adapter, feed.end_ids)
        places = {"validation": f"{used.name}: {part}"} | {
            name: f"`{file}`: {_WHOLE}" for name, file in settings.eval_files.items()
        }
        for name, place in places.items():
            if name in splits:
                count = feed.sizes[name]
                _log.warning("evaluating on %d examples of %s", count, place)
    return ModelAndData(language_modeling(kept), base, feed)


def _held_out(settings: Settings) -> float | None:
    """Returns the fraction of a single file that is not trained on, None if all is."""
    if settings.eval_data and settings.held_out is None:
        return None
    return settings.resolved_held_out


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


def _tokenizer(base: Base, adapter: Adapter | None) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of a base, that of the adapter if there is one."""
    # Files of a model are read one after the other: first whether it is the right one.
    if adapter is not None:
        require_base(adapter, base.hash, base.model, base.folder)
    tokenizer = load_tokenizer(base.folder)
    if adapter is not None:
        warn_of_tokenizer(adapter.settings.get("tokenizer_hash"), tokenizer)
    return tokenizer


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
    if used.digest is None or used.digest != trained or used.digest == validation:
        return used, _WHOLE
    # A run with other files to evaluate on held nothing out.
    is_held_out = validation is None and adapter.settings.get("held_out", 0) is not None
    return used, _HELD_OUT if is_held_out else _TRAINED

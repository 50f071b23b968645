"""What is trained or evaluated, and on what: a task, a model and its batches."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.use import require_base
from sparse_jax.data.batches import Encoded
from sparse_jax.data.examples import Splits
from sparse_jax.data.files import load
from sparse_jax.data.glue import CAUSAL, Task, find_task
from sparse_jax.data.metrics import Metric, require_metrics
from sparse_jax.data.sources import one_part
from sparse_jax.data.tokenizer import (
    load_tokenizer,
    tokenizer_digest,
    warn_of_tokenizer,
)
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.labels import label_leaves
from sparse_jax.models.hf.model_files import local_folder, read_object
from sparse_jax.models.hf.pretrained import base_hash, leaf_digests, new_leaves
from sparse_jax.models.hf.read_config import FAMILIES, read_config
from sparse_jax.params.names import map_named
from sparse_jax.sharding.mesh import mesh_of
from sparse_jax.sharding.placement import Placement, load_placed
from sparse_jax.sharding.processes import is_first_process
from sparse_jax.training.causal_data import causal_data
from sparse_jax.training.feed import Feed, labeled_feed, usage_text
from sparse_jax.training.objective import (
    Objective,
    classification,
    head_bias,
    language_modeling,
)
from sparse_jax.training.recipe_options import BALANCED
from sparse_jax.training.settings import Settings
from sparse_jax.training.token_cache import tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Base", "ModelAndData", "load_model_and_data"]

_log = logging.getLogger(__name__)

_CONFIG = "config.json"  # of a model


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
    settings: Settings,
    *,
    adapter: Adapter | None = None,
    splits: Splits | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> ModelAndData:
    """Loads the data and the model that settings name.

    Args:
      settings: of a run, or of the run that an adapter comes from.
      adapter: that is evaluated; None trains. Of the file that it was trained on, the
        part held out is used, of any other all; a line says which.
      splits: labeled examples, in place of those that the settings name.
      metrics: functions of labels and predictions by name, beside those of the task.

    Raises:
      InputError: for anything wrong with the task, its files, the model's folder, or
        the length; or if the model is not the base of the adapter.
    """
    metrics = metrics or {}
    if settings.is_causal:
        require_metrics(metrics, settings.task, ())
    # The folder first: data from the Hub takes minutes to arrive, or to fail.
    local_folder(settings.model)
    mesh = mesh_of(settings.mesh)
    if settings.is_causal:
        loaded = _causal(settings, adapter, mesh)
    else:
        loaded = _labeled(settings, adapter, mesh, splits, metrics)
    feed, shared = loaded.feed, (settings.batch_size, settings.accumulate)
    loaded.base.placement.require_batch(*shared, feed.max_length)
    for split, usage in feed.usage.items() if adapter is not None else ():
        if split != "train" and (usage.truncated or usage.dropped):
            _log.warning("%s", usage_text(split, usage, feed.max_length))
    return loaded


def _load_base(settings: Settings, mesh: Mesh, labels: Sequence[str] | None) -> Base:
    """Loads a decoder, or any model for labels; what it lacks comes from the seed."""
    head = CausalLM if labels is None else SequenceClassifier
    folder = local_folder(settings.model)
    family, _ = read_config(folder)
    if head.__name__ not in family.architectures:
        able = [word for word in FAMILIES if FAMILIES[word].is_decoder]
        raise InputError(
            f"`model` must be a decoder for the task {CAUSAL}, one of "
            f"{', '.join(able)}, got model type {family.name!r} in `{folder}`."
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
    settings: Settings,
    adapter: Adapter | None,
    mesh: Mesh,
    splits: Splits | None,
    metrics: Mapping[str, Metric],
) -> ModelAndData:
    """Returns classes, or numbers, and a model that predicts them."""
    _, config = read_config(local_folder(settings.model))
    # In the order of its outputs; none if they have no names.
    base_labels = config.label_names or ()
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
    require_metrics(metrics, settings.task, (*splits.task.metrics, "loss"))
    if is_first_process():
        for note in splits.notes:
            _log.info("%s", note)
        for warning in splits.warnings:
            _log.warning("%s", warning)
    base = _load_base(settings, mesh, splits.task.labels or ())
    _warn_of_problem_type(base, splits.task)
    tokenizer = _tokenizer(base, adapter)
    key = None if settings.no_cache else tokenizer_files(base.folder)
    feed = labeled_feed(splits, tokenizer, base.model, settings, key)
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
    objective = classification(splits.task, kept, weights, metrics)
    return ModelAndData(objective, base, feed)


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
    found: dict[str, float] = {}
    for pair in asked.split(","):
        name, _, weight = pair.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        is_known = name in names and name not in found
        if not is_known or not (value >= 0 and math.isfinite(value)):
            raise InputError(
                f"`class_weights` must be {BALANCED}, or pairs of a label and a "
                f"weight such as {names[0]}=2,{names[1]}=1, each label once, got "
                f"{brief(pair)} in {brief(asked)}. The labels are {listed(names)}."
            )
        found[name] = value
    weights = [found.get(name, 1.0) for name in names]
    if not any(weights):
        raise InputError(
            f"`class_weights` must have one above 0, got {brief(asked)}: there would "
            "be no loss."
        )
    return weights


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
    feed, kept = causal_data(settings, base.folder, base.model, tokenizer, adapter)
    return ModelAndData(language_modeling(kept), base, feed)


def _tokenizer(base: Base, adapter: Adapter | None) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of a base, that of the adapter if there is one."""
    # Files of a model are read one after the other: first whether it is the right one.
    if adapter is not None:
        require_base(adapter, base.hash, base.model, base.folder)
    tokenizer = load_tokenizer(base.folder)
    if adapter is not None:
        warn_of_tokenizer(adapter.settings.get("tokenizer_hash"), tokenizer)
    return tokenizer

"""What a run needs before it starts: a task, a model, a method and batches."""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.use import require_base
from sparse_jax.data.chat_template import template_digest, warn_of_template
from sparse_jax.data.conversations import PROMPTS
from sparse_jax.data.files import load
from sparse_jax.data.glue import CAUSAL, find_task
from sparse_jax.data.instructions import (
    data_files,
    load_conversations,
    load_whole,
)
from sparse_jax.data.tokenizer import (
    load_tokenizer,
    tokenizer_digest,
    warn_of_tokenizer,
)
from sparse_jax.errors import InputError, listed
from sparse_jax.generation.ends import require_ends
from sparse_jax.methods.method import Method
from sparse_jax.models.hf.model_files import local_folder
from sparse_jax.models.hf.tensor_names import modules_called
from sparse_jax.params.names import leaf_names
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.sharding.mesh import mesh_of
from sparse_jax.sharding.processes import is_first_process
from sparse_jax.training.base_model import (
    Base,
    label_names,
    load_classifier,
    load_decoder,
)
from sparse_jax.training.build import head_rules, method_of, sampler_of
from sparse_jax.training.causal_feed import make_causal_feed
from sparse_jax.training.classification import Classification
from sparse_jax.training.feed import Feed, make_feed, usage_text
from sparse_jax.training.language_modeling import LanguageModeling
from sparse_jax.training.objective import Objective
from sparse_jax.training.settings import Settings

__all__ = ["Job", "ModelAndData", "load_model_and_data", "make_job"]

_log = logging.getLogger(__name__)

# Which part of a file is evaluated on.
_WHOLE = "all of them"
_HELD_OUT = "those held out of the training"
_TRAINED = "all of them, which the adapter was trained on"
_RUN = ""  # none: a run trains


@dataclass(frozen=True, eq=False)
class Job:
    """A run that can start."""

    settings: Settings
    objective: Objective
    base: Base
    method: Method
    sampler: Sampler | None  # of the layers; None trains all
    head: tuple[str, ...]  # rules of the leaves that counts leave out
    feed: Feed


def make_job(settings: Settings) -> Job:
    """Loads the data and the model of a run.

    Raises:
      InputError: for anything wrong with the task, its files, the model's folder, the
        rules, or the length.
    """
    objective, base, feed = load_model_and_data(settings)
    head = head_rules(objective.head, base.new)
    method = method_of(settings, head)
    # Rules are compared with the names of the leaves and of the sites.
    try:
        method.roles(base.params)
        jax.eval_shape(method.added, base.params, jax.random.key(0))
    except InputError as error:
        raise InputError(f"{error}{_translation(settings, base)}") from error
    # What the adapter file cannot hold is found before the training.
    method.to_settings()
    sampler = sampler_of(settings, base.model.config.num_layers)
    return Job(settings, objective, base, method, sampler, head, feed)


def _translation(settings: Settings, base: Base) -> str:
    """Returns our names of the modules that rules call as Hugging Face does."""
    ours = jax.tree.leaves(leaf_names(base.params))
    sentences = []
    for pattern in (*(settings.where or ()), *(settings.dense or ())):
        called = modules_called(base.model.family, pattern)
        modules = [module for module in called if any(module in name for name in ours)]
        if modules and not any(re.search(pattern, name) for name in ours):
            names = " and ".join(f"`{module}`" for module in modules)
            sentences.append(f" What Hugging Face calls {pattern!r} is {names} here.")
    return "".join(sentences)


class ModelAndData(NamedTuple):
    """What is trained or evaluated, and on what."""

    objective: Objective
    base: Base
    feed: Feed


def load_model_and_data(
    settings: Settings, *, adapter: Adapter | None = None
) -> ModelAndData:
    """Loads the data and the model that settings name.

    Args:
      settings: of a run, or of the run that an adapter comes from.
      adapter: that is evaluated; None trains. Of the file that it was trained on, the
        part held out is used, of any other all; a line says which.

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
        loaded = _labeled(settings, adapter, mesh)
    placement = loaded.base.placement
    placement.require_batch(settings.batch_size, settings.accumulate)
    if adapter is not None:
        _warn_of_lost(loaded.feed)
    return loaded


def _warn_of_lost(feed: Feed) -> None:
    """Warns of examples that are evaluated on in part, or not at all."""
    for split, usage in feed.usage.items():
        if split != "train" and (usage.cut or usage.dropped):
            _log.warning("%s", usage_text(split, usage, feed.max_length))


def _labeled(settings: Settings, adapter: Adapter | None, mesh: Mesh) -> ModelAndData:
    """Returns classes, or numbers, and a model that predicts them."""
    splits = load(
        find_task(settings.task),
        settings.data,
        order=label_names(settings.model) if adapter is None else adapter.labels,
        drop_unlabeled=settings.drop_unlabeled,
    )
    if is_first_process():
        for note in splits.notes:
            _log.info("%s", note)
        for warning in splits.warnings:
            _log.warning("%s", warning)
    base = load_classifier(
        settings.model,
        labels=splits.task.labels or (),
        dtype=settings.dtype,
        seed=settings.seed,
        mesh=mesh,
    )
    tokenizer = _tokenizer(base, adapter)
    feed = make_feed(
        splits,
        tokenizer,
        base.model,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        seed=settings.seed,
        group_by_length=settings.group_by_length,
    )
    if adapter is not None:
        sizes = {name: size for name, size in feed.sizes.items() if name != "train"}
        parts = [f"{size} examples in {name}" for name, size in sizes.items()]
        place = "GLUE of the Hub" if settings.data is None else f"`{settings.data}`"
        _log.warning("evaluating on %s of %s", " and ".join(parts), place)
    kept = {
        "max_length": feed.max_length,
        "tokenizer_hash": tokenizer_digest(tokenizer),
        "drop_unlabeled": settings.drop_unlabeled,
        "base_labels": list(label_names(settings.model)),
    }
    return ModelAndData(Classification(splits.task, kept), base, feed)


def _causal(settings: Settings, adapter: Adapter | None, mesh: Mesh) -> ModelAndData:
    """Returns texts, and a model that continues them."""
    if settings.data is None:
        raise InputError(
            f"`data` must be given for the task {CAUSAL}, got nothing. Pass a file of "
            "instructions, chats or text, `.json`, `.jsonl` or `.txt`."
        )
    base = load_decoder(
        settings.model, dtype=settings.dtype, seed=settings.seed, mesh=mesh
    )
    tokenizer = _tokenizer(base, adapter)
    options: dict[str, Any] = {"template": PROMPTS[settings.resolved_template]}
    share = {"held_out": settings.resolved_held_out, "seed": settings.seed}
    files = data_files(settings.data)
    hashes = [None if file is None else _file_hash(file) for file in files]
    path, part = _part_to_use(settings.data, files, hashes, adapter)
    if part in (_RUN, _HELD_OUT):
        splits = load_conversations(path, tokenizer, **share, **options)
    else:
        splits = load_whole(path, tokenizer, **options)
    feed = make_causal_feed(
        splits,
        tokenizer,
        base.model,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        loss=settings.resolved_loss_on,
        is_packed=settings.packing,
        accumulate=settings.accumulate,
        seed=settings.seed,
        group_by_length=settings.group_by_length,
    )
    kept = {
        "max_length": feed.max_length,
        "loss_on": settings.resolved_loss_on,
        "packing": settings.packing,
        "template": settings.resolved_template,
        "held_out": settings.resolved_held_out,
        "data_hash": hashes[0],
        "validation_hash": hashes[1],
        "tokenizer_hash": tokenizer_digest(tokenizer),
        "eos_token_id": list(feed.end_ids),
    }
    has_chats = any(one.is_rendered for part in splits.values() for one in part)
    if has_chats:
        kept["chat_template_hash"] = template_digest(tokenizer)
    if adapter is not None:
        if has_chats:
            warn_of_template(adapter.settings.get("chat_template_hash"), tokenizer)
        _warn_of_ends(adapter, feed.end_ids)
        count = feed.sizes["validation"]
        _log.warning("evaluating on %d examples of `%s`: %s", count, path, part)
    return ModelAndData(LanguageModeling(kept), base, feed)


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


def _tokenizer(base: Base, adapter: Adapter | None) -> Any:
    """Returns the tokenizer of a base, that of the adapter if there is one."""
    # Files of a model are read one after the other: first whether it is the right one.
    if adapter is not None:
        require_base(adapter, base.hash, base.model)
    tokenizer = load_tokenizer(base.folder)
    if adapter is not None:
        warn_of_tokenizer(adapter.settings.get("tokenizer_hash"), tokenizer)
    return tokenizer


def _part_to_use(
    data: str,
    files: tuple[Path, Path | None],
    hashes: Sequence[str | None],
    adapter: Adapter | None,
) -> tuple[str | Path, str]:
    """Returns the file that an adapter is evaluated on, and which part of it.

    That is all of it, unless the adapter was trained on another part.
    """
    if adapter is None:
        return data, _RUN
    path, found = files[1] or files[0], hashes[1] or hashes[0]
    trained = adapter.settings.get("data_hash")
    validation = adapter.settings.get("validation_hash")
    # Of a folder, earlier versions did not say what was in it.
    is_old = "data_hash" in adapter.settings and trained is None
    if is_old and files[1] is None and Path(data).is_dir():
        return path, _HELD_OUT
    if found != trained or found == validation:
        return path, _WHOLE
    return path, _HELD_OUT if validation is None else _TRAINED


def _file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

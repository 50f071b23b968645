"""The material of a run: an objective, a model, and batches."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from sparse_jax.errors import InputError
from sparse_jax.models.hub import local_folder
from sparse_jax.sharding.mesh import make_mesh, parse_mesh
from sparse_jax.tasks.files import load
from sparse_jax.tasks.glue import CAUSAL, find_task
from sparse_jax.tasks.instructions import load_conversations, load_whole
from sparse_jax.tasks.prompts import PROMPTS
from sparse_jax.tasks.tokens import load_tokenizer
from sparse_jax.training.base import Base, load_classifier, load_decoder
from sparse_jax.training.causal_feed import make_causal_feed
from sparse_jax.training.classification import Classification
from sparse_jax.training.feed import Feed, make_feed
from sparse_jax.training.language_modelling import LanguageModelling
from sparse_jax.training.objective import Objective
from sparse_jax.training.settings import Settings

__all__ = ["Material", "load_material"]


class Material(NamedTuple):
    """What a run works on."""

    objective: Objective
    base: Base
    feed: Feed


def load_material(settings: Settings, *, trained_on: str | None = None) -> Material:
    """Loads the data and the model that settings name.

    Args:
      settings: of a run, or of the run that an adapter comes from.
      trained_on: SHA-256 of the file that an adapter comes from. Another file is then
        judged on as a whole; of this one only the part held out is.

    Raises:
      InputError: for anything wrong with the task, its files, the model's folder, or
        the length.
    """
    # The folder first: data from the Hub takes minutes to arrive, or to fail.
    local_folder(settings.model)
    mesh = None if settings.mesh is None else make_mesh(parse_mesh(settings.mesh))
    if settings.is_causal:
        material = _causal(settings, trained_on, mesh)
    else:
        material = _labelled(settings, mesh)
    devices = material.base.devices
    devices.require_batch(settings.batch_size, settings.accumulate)
    return material


def _labelled(settings: Settings, mesh: Mesh | None) -> Material:
    """Returns classes, or numbers, and a model that predicts them."""
    splits = load(find_task(settings.task), settings.data)
    base = load_classifier(
        settings.model,
        num_labels=splits.task.num_outputs,
        dtype=settings.dtype,
        seed=settings.seed,
        mesh=mesh,
    )
    feed = make_feed(
        splits,
        load_tokenizer(base.folder),
        base.model,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        seed=settings.seed,
        group_by_length=settings.group_by_length,
    )
    kept = {"max_length": feed.max_length}
    return Material(Classification(splits.task, kept), base, feed)


def _causal(settings: Settings, trained_on: str | None, mesh: Mesh | None) -> Material:
    """Returns texts, and a model that continues them."""
    if settings.data is None:
        raise InputError(
            f"`data` must be given for the task {CAUSAL}, got nothing. Pass a file of "
            "instructions, chats or text, `.json`, `.jsonl` or `.txt`."
        )
    base = load_decoder(
        settings.model, dtype=settings.dtype, seed=settings.seed, mesh=mesh
    )
    tokenizer = load_tokenizer(base.folder)
    options = {"template": PROMPTS[settings.resolved_template]}
    found = _file_hash(Path(settings.data))
    if trained_on is not None and found is not None and found != trained_on:
        splits = load_whole(settings.data, tokenizer, **options)
    else:
        splits = load_conversations(
            settings.data,
            tokenizer,
            held_out=settings.resolved_held_out,
            seed=settings.seed,
            **options,
        )
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
        "data_hash": found,
    }
    return Material(LanguageModelling(kept), base, feed)


def _file_hash(path: Path) -> str | None:
    """Returns the SHA-256 of a file, None of a folder."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The pre-trained model that a run starts from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparse_jax.errors import InputError
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Head, Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.model_files import local_folder
from sparse_jax.models.hf.pretrained import base_hash, new_leaves
from sparse_jax.models.hf.read_config import FAMILIES, read_config
from sparse_jax.sharding.placement import Placement, load_placed

__all__ = ["Base", "label_names", "load_classifier", "load_decoder"]


@dataclass(frozen=True, eq=False)
class Base:
    """A pre-trained model with a head for a task."""

    folder: Path
    hash: str  # SHA-256 of the weights
    model: Model
    params: Any
    new: tuple[str, ...]  # leaves that the checkpoint does not have, or not for this
    placement: Placement  # of the parameters


def label_names(model: str) -> tuple[str, ...]:
    """Returns the names of a classifier's labels in the order of its outputs.

    There are none if it is no encoder, or has no names.

    Raises:
      InputError: if its configuration cannot be read.
    """
    _, config = read_config(local_folder(model))
    return getattr(config, "label_names", None) or ()


def load_classifier(
    model: str,
    *,
    labels: tuple[str, ...],
    dtype: str,
    seed: int,
    mesh: Mesh,
) -> Base:
    """Loads an encoder for the labels of a task, none for a regression.

    Parts of the head that it lacks, or that are for other labels, are drawn from the
    seed.

    Raises:
      InputError: if the model cannot be loaded, or is a decoder.
    """
    folder = _folder(model, SequenceClassifier, "a task with labels", "encoder")
    return _load(folder, dtype, seed, mesh, labels=labels)


def load_decoder(model: str, *, dtype: str, seed: int, mesh: Mesh) -> Base:
    """Loads a decoder; a head that it lacks is drawn from the seed.

    Raises:
      InputError: if the model cannot be loaded, or is an encoder.
    """
    folder = _folder(model, CausalLM, "the task causal", "decoder")
    return _load(folder, dtype, seed, mesh, head=CausalLM)


def _load(folder: Path, dtype: str, seed: int, mesh: Mesh, **options: Any) -> Base:
    """Loads a model onto a mesh."""
    options |= {"dtype": jnp.dtype(dtype), "key": jax.random.key(seed)}
    model, params, placement = load_placed(mesh, folder, **options)
    new = new_leaves(model, folder, options.get("labels"))
    return Base(folder, base_hash(folder), model, params, new, placement)


def _folder(model: str, head: Head, task: str, kind: str) -> Path:
    """Returns the folder of a model after checking that it can have a head."""
    folder = local_folder(model)
    family, _ = read_config(folder)
    if head.__name__ in family.architectures:
        return folder
    able = [name for name in FAMILIES if head.__name__ in FAMILIES[name].architectures]
    raise InputError(
        f"`model` must be {'an' if kind == 'encoder' else 'a'} {kind} for {task}, one "
        f"of {', '.join(able)}, got model type {family.name!r} in `{folder}`."
    )

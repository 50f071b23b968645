"""Open an adapter by its path, whoever wrote it."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.file import load_adapter
from sparse_jax.data.glue import CAUSAL, TASKS, find_task
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.interchange.peft_folder import PeftFolder, find_peft, open_peft
from sparse_jax.interchange.peft_load import read_adapter
from sparse_jax.interchange.peft_source import Base
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.labels import are_numbers, label_leaves, use_of_head
from sparse_jax.models.hf.model_files import cached_folder, local_folder
from sparse_jax.models.hf.pretrained import base_hash
from sparse_jax.models.hf.read_config import read_config
from sparse_jax.models.hf.tensor_names import tensor_name, with_full_names
from sparse_jax.models.hf.weights import Weights, open_weights
from sparse_jax.params.names import map_named

__all__ = ["open_adapter", "open_one_of"]

_log = logging.getLogger(__name__)

_HEADS = {"SEQ_CLS": SequenceClassifier, "CAUSAL_LM": CausalLM}
_HEADLESS = (None, "", "FEATURE_EXTRACTION")


def open_adapter(
    path: str | Path,
    model: str | Path | None = None,
    task: str | None = None,
    labels: Sequence[str] = (),
) -> Adapter:
    """Reads an adapter of sparse_jax or of PEFT.

    What a PEFT folder does not record is taken from its base, and logged: the dtype is
    that of the weights, and the labels are those of its `config.json`, or of the task,
    in order.

    Args:
      path: adapter file, run directory, or folder of PEFT.
      model: folder or id of the base, needed for PEFT if the one that it names is not
        here. Nothing is fetched that a file names.
      task: whose labels a classifier of PEFT predicts.
      labels: of a classifier that has only numbers for them, in the order of its
        outputs; none are those that it or its base names.

    Raises:
      InputError: as `load_adapter` or `load_peft`; or if the base has no such head, or
        its labels are others than those of the task, or `labels` do not fit.
    """
    place = find_peft(path)
    if place is None:
        found = load_adapter(path)
        return replace(found, labels=_named(found.labels, labels)) if labels else found
    found = open_peft(place)
    named = str(found.config.get("base_model_name_or_path") or "")
    folder = local_folder(model) if model is not None else cached_folder(named)
    if model is not None and named and not found.about.get("base_hash"):
        _warn_of_base(found, named, str(model))
    weights = _weights(found, folder)
    built = weights.model
    base = _base(found, weights)
    adapter = read_adapter(found, built, base)
    digest = adapter.base_hash or base_hash(folder)
    adapter = replace(
        adapter,
        base_model=named if model is None else str(model),
        base_hash=digest,
        settings={**adapter.settings, "dtype": base.dtype.name},
    )
    if built.head is CausalLM:
        _named((), labels)
        return replace(adapter, task=CAUSAL)
    if labels:
        known = adapter.labels or tuple(map(str, range(built.config.num_labels)))
        adapter = replace(adapter, labels=_named(known, labels))
    word = task or adapter.task
    if word and word != CAUSAL and (labels or not (adapter.labels and adapter.task)):
        adapter = _for_task(replace(adapter, task=find_task(word).name), built)
    return adapter


def open_one_of(
    argument: str,
    path: str | Path,
    model: str | Path | None = None,
    task: str | None = None,
) -> Adapter:
    """Opens one of several adapters, as `open_adapter` does.

    Raises:
      InputError: as `open_adapter`, naming the argument that it came by, and its path.
    """
    try:
        return open_adapter(path, model, task)
    except InputError as error:
        reason = str(error).replace("`adapter` must", f"`{argument}` must", 1)
        # Quoted as messages quote it: a short path occurs in many a word.
        if not re.search(f"[`']{re.escape(str(path))}[`'/]", reason):
            reason = f"{reason} This is about `{path}` of `{argument}`."
        raise InputError(reason) from error


def _weights(found: PeftFolder, folder: Path) -> Weights:
    """Returns the weights of a base with the head that was trained."""
    family, config = read_config(folder)
    task_type = found.config.get("task_type")
    if task_type not in _HEADS and task_type not in _HEADLESS:
        raise found.refused("task_type", f"one of {', '.join(_HEADS)} or null")
    able = [head for head in _HEADS.values() if head.__name__ in family.architectures]
    # Without a word about it a decoder writes texts.
    head = able[-1] if task_type in _HEADLESS else _HEADS[str(task_type)]
    if head not in able:
        raise InputError(
            f"`model` must have the head of `task_type` {task_type!r}, got model type "
            f"{family.name!r} in `{folder}`. Pass the base that was adapted."
        )
    model = Model(head, family, config)
    if head is SequenceClassifier:
        # As many labels as the head in the file has.
        tensors = with_full_names(family, found.tensors)
        for leaf in label_leaves(model):
            tensor = found.tensors.get(tensors.get(tensor_name(family, leaf), ""))
            if tensor is not None and tensor.ndim:
                _, config = read_config(folder, num_labels=len(tensor))
    return open_weights(folder, Model(head, family, config))


def _base(found: PeftFolder, weights: Weights) -> Base:
    """Returns the parameters in a folder, each read when it is asked for."""
    shapes: dict[str, tuple[int, ...]] = {}
    map_named(
        lambda leaf, like: shapes.setdefault(leaf, like.shape), weights.model.abstract()
    )
    name = found.about.get("dtype")
    if not name:
        first, file = next(iter(weights.files.items()))
        is_half = file.get_slice(first).get_dtype() == "BF16"
        name = "bfloat16" if is_half else "float32"
        _log.warning(
            "`%s` does not say in which dtype it was trained: taken as %s, that of "
            "the base",
            found.path, name,
        )  # fmt: skip
    dtype = jnp.dtype(str(name))

    def read(leaf: str) -> np.ndarray:
        if leaf in weights.missing_head:
            raise InputError(
                f"`model` must have `{leaf}`, which the adapter was trained on, and "
                f"`{weights.folder}` has none. Pass the base that was adapted."
            )
        whole = tuple(slice(0, size) for size in shapes[leaf])
        return weights.read(leaf, shapes[leaf], whole, dtype)

    return Base(read, dtype)


def _warn_of_base(found: PeftFolder, named: str, model: str) -> None:
    """Warns if a folder of PEFT names another base: it has no hash to compare."""
    if named != model and Path(named).resolve() != Path(model).resolve():
        _log.warning(
            "`%s` was trained on %s and is applied to %s, and PEFT records no hash of "
            "the weights: make sure that they are the same",
            found.path, brief(named), brief(model),
        )  # fmt: skip


def _named(known: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Returns names for labels of which an adapter knows only the numbers."""
    rule = (
        ""
        if not labels or len({*labels}) == len(labels) == len(known)
        else (f"{len(known)} different names, one for each output")
    )
    if labels and not (known and are_numbers(known)):
        rule = f"left out for an adapter whose labels are {listed(known) or 'none'}"
    if rule:
        raise InputError(f"`labels` must be {rule}, got {listed(labels)}.")
    return tuple(labels)


def _for_task(adapter: Adapter, model: Model) -> Adapter:
    """Returns an adapter whose outputs are those of a task's labels, in their order."""
    config, task = model.config, TASKS[adapter.task]
    if known := adapter.labels:
        config = replace(config, num_labels=len(known), label_names=known)
    labels = task.labels
    if labels is None:
        names = config.label_names or tuple(map(str, range(config.num_labels)))
        labels = () if task.is_regression else names
    use = use_of_head(config, labels)
    if use.order is None:
        raise InputError(
            f"`task` must have the labels of the adapter's base, "
            f"{listed(config.label_names or ()) or config.num_labels}, got "
            f"{listed(labels) or 'numbers'} of {task.name}. Pass the task that it was "
            "trained on, or name its labels in the `id2label` of the base's "
            "`config.json`."
        )
    if not use.is_certain:
        _log.warning("the adapter does not name its labels: %s", use.remark)
    support, values, dense = {**adapter.support}, {**adapter.values}, {**adapter.dense}
    for leaf in label_leaves(model):
        if leaf in dense:
            dense[leaf] = np.ascontiguousarray(dense[leaf][..., list(use.order)])
        if leaf in support:
            moved = _moved(support[leaf], use.order)
            by_place = np.argsort(moved)
            support[leaf], values[leaf] = moved[by_place], values[leaf][by_place]
    return replace(
        adapter, support=support, values=values, dense=dense, labels=tuple(labels)
    )


def _moved(support: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Returns positions in a leaf of the head whose outputs are in another order.

    Example:
      >>> _moved(np.array([0, 4, 5]), (2, 0, 1))  # rows of three outputs
      array([1, 5, 3], dtype=int32)
    """
    rows, outputs = np.divmod(support, len(order))
    return (rows * len(order) + np.argsort(order)[outputs]).astype(np.int32)

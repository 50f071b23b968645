"""Pre-trained weights: load from, and save to, the Hugging Face layout."""

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Head, Model, Params
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.labels import HeadUse, label_leaves, use_of_head
from sparse_jax.models.hf.model_files import local_folder
from sparse_jax.models.hf.read_config import read_config, write_config
from sparse_jax.models.hf.tensor_names import has_tensor, is_stacked, tensor_name
from sparse_jax.models.hf.tensors import LazyTensor, base_hash, bytes_of, write_tensors
from sparse_jax.models.hf.weights import Index, Weights, open_weights, rounded
from sparse_jax.params.names import leaves_by_name, map_named

__all__ = [
    "base_config",
    "base_hash",
    "changed_field",
    "from_pretrained",
    "leaf_digests",
    "new_leaves",
    "read_model",
    "save_pretrained",
]

_log = logging.getLogger(__name__)

# Of a configuration, names of the labels and of tokens.
_NAMES = ("num_labels", "label_names", "pad_id", "bos_id", "eos_ids")
# Rates of dropout, and the deviation of new kernels: training alone sees them.
_OF_TRAINING = re.compile("dropout$|^initializer_range$")


def from_pretrained(
    model: str | Path,
    *,
    head: Head = SequenceClassifier,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    key: jax.Array | None = None,
    place: Callable[[Params], Params] | None = None,
) -> tuple[Model, Params]:
    """Loads a pre-trained model from safetensors.

    Parts of the head that the checkpoint does not have are created from `key`: normal
    kernels of deviation `initializer_range`, zero biases. Tensors that the model has
    no use for, such as heads for other tasks, are logged. A head that differs from the
    word table is not tied to it, whatever `config.json` says.

    Args:
      model: local folder, or the id of a model on the Hugging Face Hub.
      head: `SequenceClassifier`, or `MaskedLM` of an encoder, `CausalLM` of a decoder.
      num_labels: labels of a classifier, 1 for regression; None takes those of the
        checkpoint.
      labels: names of the labels of a classifier in the order of its outputs, none for
        a regression; None takes those of the checkpoint. A head for labels of the same
        names is put in this order, one for others is replaced by a new one.
      dtype: dtype of every parameter.
      key: key for the missing parts of the head; needed only if there are any.
      place: shapes of the parameters -> shardings; None puts all on one device. Of
        what is sharded, a process reads its own parts only.

    Returns:
      The model, and its parameters as a nested dictionary of arrays: logits are
      `model(params, batch)`.

    Raises:
      InputError: if the model cannot be fetched, has no `config.json` or no
        safetensors, is of a type that is not supported or quantized, misses a tensor,
        has one of another shape or one with values that are not finite, or if its head
        is missing and `key` is None.
    """
    folder = local_folder(model)
    weights, order = _open(folder, head, num_labels, labels)
    built, missing = weights.model, weights.missing_head
    abstract = built.abstract(dtype)
    weights.check(abstract)
    if missing and key is None:
        raise InputError(
            f"`key` must be given, because `{folder}` has no tensor for "
            f"{', '.join(f'`{leaf}`' for leaf in missing)}: pass "
            "`key=jax.random.key(0)` to start the head at random."
        )

    created = {}
    if missing and key is not None:
        created = _new_leaves(built, missing, jnp.dtype(dtype), key)

    def read(leaf: str, like: jax.ShapeDtypeStruct, index: Index) -> np.ndarray:
        if leaf not in order:
            return weights.read(leaf, like.shape, index, like.dtype)
        whole = tuple(slice(0, size) for size in like.shape)
        return weights.read(leaf, like.shape, whole, like.dtype)[..., order[leaf]][
            index
        ]

    def load(leaf: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf in created:
            return created[leaf]
        whole = tuple(slice(0, size) for size in like.shape)
        return jnp.asarray(read(leaf, like, whole))

    def load_parts(
        leaf: str, like: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
    ) -> jax.Array:
        if leaf in created:
            return jax.device_put(created[leaf], sharding)
        part = lambda index: read(leaf, like, index)
        return jax.make_array_from_callback(like.shape, sharding, part)

    if place is None:
        return built, map_named(load, abstract)
    return built, map_named(load_parts, abstract, place(abstract))


def read_model(
    folder: Path,
    *,
    head: Head,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
) -> Model:
    """Returns the model that `from_pretrained` loads, without reading its weights.

    The arguments and errors are those of `from_pretrained`.
    """
    return _open(folder, head, num_labels, labels)[0].model


def _open(
    folder: Path, head: Head, num_labels: int | None, labels: Sequence[str] | None
) -> tuple[Weights, dict[str, list[int]]]:
    """Returns the weights of a folder, and the order of a classifier's outputs."""
    family, config = read_config(folder, num_labels=num_labels)
    if head.__name__ not in family.architectures:
        raise InputError(
            f"`head` must be one of {', '.join(family.architectures)} for the model "
            f"type {family.name!r} of `{folder}`, got {head.__name__}."
        )
    weights, order = open_weights(folder, Model(head, family, config)), {}
    if labels is not None and head is SequenceClassifier:
        weights, order, use = _for_labels(weights, labels)
        if use is not None and jax.process_index() == 0:
            level = logging.INFO if use.is_certain else logging.WARNING
            _log.log(level, "`%s`: %s", folder, use.remark)
    return weights, order


def save_pretrained(
    model: Model,
    params: Params,
    folder: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    shard_size: int | str | None = None,
) -> None:
    """Writes `config.json` and the weights in the Hugging Face format.

    Args:
      model: model as `from_pretrained` returns it.
      params: its parameters.
      folder: folder to write to, made if absent.
      dtype: of every tensor in the files; None keeps those of the parameters, the
        first of which is named in `config.json`.
      shard_size: most bytes of a file, such as "5GB"; None is one file.

    Raises:
      InputError: if `shard_size` is no size, or a value is too large for `dtype`.
    """
    folder = Path(folder)
    most = None if shard_size is None else bytes_of(shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(_tensors(model, params, dtype), folder, most)
    write_config(model, folder, dtype or jax.tree.leaves(params)[0].dtype)


def new_leaves(
    model: Model, folder: str | Path, labels: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Returns the names of the leaves that `from_pretrained` creates from its key.

    Args:
      model: model as `from_pretrained` returns it.
      folder: folder it was loaded from.
      labels: those that it was loaded for.
    """
    weights = open_weights(Path(folder), model)
    if labels is not None and model.head is SequenceClassifier:
        model = replace(model, config=read_config(folder)[1])
        weights, _, _ = _for_labels(replace(weights, model=model), labels)
    return weights.missing_head


def leaf_digests(folder: Path) -> dict[str, str]:
    """Returns the dtype, shape and CRC-32 of every leaf of a base that has tensors.

    `base_hash` says whether two bases are one, these in what they differ.
    """
    family, config = read_config(folder)
    weights = open_weights(folder, Model(SequenceClassifier, family, config))
    if family.is_decoder and weights.missing_head:
        weights = open_weights(folder, Model(CausalLM, family, config))
    return weights.digests()


def _for_labels(
    weights: Weights, labels: Sequence[str]
) -> tuple[Weights, dict[str, list[int]], HeadUse | None]:
    """Returns the weights of a classifier for labels, and the order of its outputs.

    The last value says what becomes of the checkpoint's head, None if it has none.
    """
    model, leaves = weights.model, label_leaves(weights.model)
    use = use_of_head(model.config, labels)
    if {*leaves} & {*weights.missing_head}:
        config = replace(
            model.config, num_labels=len(labels) or 1, label_names=tuple(labels) or None
        )
        return replace(weights, model=replace(model, config=config)), {}, None
    weights = replace(weights, model=replace(model, config=use.config))
    if use.order is None:
        return replace(weights, replaced=leaves), {}, use
    return weights, dict.fromkeys(leaves, list(use.order)), use


def base_config(model: Model, *, training: bool = False) -> dict[str, Any]:
    """Returns what a model computes with its weights, as values of JSON.

    Together with `base_hash` it identifies a base: the same weights under another
    `rope_theta` or activation are another model. What the file beside the weights
    says in another spelling, or says about labels and tokens, is left out.

    Args:
      model: model as `from_pretrained` returns it.
      training: whether to add what only training sees, such as dropout.

    Example:
      >>> from sparse_jax.models.families.bert import BERT
      >>> from sparse_jax.models.config import EncoderConfig
      >>> config = EncoderConfig(
      ...     vocab_size=9, hidden_size=4, num_layers=1, num_heads=2,
      ...     intermediate_size=8,
      ... )
      >>> found = base_config(Model(SequenceClassifier, BERT, config))
      >>> found["family"], found["hidden_act"], "hidden_dropout" in found
      ('bert', 'gelu', False)
    """
    fields = {
        name: value
        for name, value in asdict(model.config).items()
        if name not in _NAMES and (training or not _OF_TRAINING.search(name))
    }
    kinds, numbers = fields.pop("kinds", [{}]), fields.pop("layer_kinds", None)
    for name, value in kinds[0].items():
        # Of layers that differ, that of each.
        several = numbers and [kinds[number][name] for number in numbers]
        fields[name] = several or value
    return {"family": model.family.name, **fields}


def changed_field(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Returns a field that two results of `base_config` have different values of.

    A field that only one of them has came with another version, and is trusted.

    Example:
      >>> changed_field({"hidden_act": "gelu"}, {"hidden_act": "relu", "tied": True})
      'hidden_act'
    """
    both = (name for name in sorted(before) if name in now)
    return next((name for name in both if before[name] != now[name]), None)


class _Part(NamedTuple):
    """A leaf, or one layer of it, that is a tensor or a part of one."""

    place: int  # among the parts of the tensor
    leaf: str
    layer: int
    array: jax.Array


def _tensors(
    model: Model, params: Params, dtype: jax.typing.DTypeLike | None
) -> dict[str, LazyTensor]:
    """Returns the tensors of a checkpoint, those fused that are one there."""
    layout, parts = model.family.layout, {}

    def collect(leaf: str, array: jax.Array) -> None:
        for layer in range(len(array) if is_stacked(leaf) else 1):
            if not has_tensor(model.family, leaf, layer):
                continue
            name = tensor_name(model.family, leaf, layer)
            part = _Part(layout.part_of(leaf) or 0, leaf, layer, array)
            parts.setdefault(name, []).append(part)

    map_named(collect, params)

    def stored(found: list[_Part]) -> LazyTensor:
        found.sort(key=lambda part: part.place)
        leaf, array = found[0].leaf, found[0].array
        one = array.shape[1:] if is_stacked(leaf) else array.shape
        of_file = np.dtype(array.dtype if dtype is None else dtype)
        make = lambda: _tensor(model, found, of_file)
        return LazyTensor(layout.tensor_shape(leaf, one, model.config), of_file, make)

    return {name: stored(found) for name, found in parts.items()}


def _tensor(model: Model, parts: Sequence[_Part], dtype: np.dtype) -> np.ndarray:
    """Returns the tensor of some parts.

    Raises:
      InputError: naming the leaf, if a value is too large for the dtype.
    """
    leaf = parts[0].leaf
    whole = [np.asarray(part.array) for part in parts]
    if is_stacked(leaf):
        whole = [array[part.layer] for array, part in zip(whole, parts, strict=True)]
    tensor = model.family.layout.fuse(leaf, whole, model.config)
    return rounded(leaf, tensor, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _new_leaves(
    model: Model, leaves: tuple[str, ...], dtype: np.dtype, key: jax.Array
) -> dict[str, jax.Array]:
    """Creates some leaves as `model.init` does; the compiler drops the others."""
    created = leaves_by_name(model.init(key, dtype))
    return {leaf: created[leaf] for leaf in leaves}

"""Pre-trained weights: load from, and save to, the Hugging Face layout."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf_config import read_config, write_config
from sparse_jax.models.hf_names import (
    is_stacked,
    tensor_name,
    with_full_names,
)
from sparse_jax.models.hub import local_folder
from sparse_jax.models.pure import Head, Params, PureModel
from sparse_jax.models.tensors import base_hash, open_tensors, write_tensors
from sparse_jax.names import leaf_names, map_named

__all__ = ["base_hash", "from_pretrained", "new_leaves", "save_pretrained"]

# shapes of the parameters -> their shardings
Place = Callable[[Params], Any]

_HEADS = ("classifier/", "lm_head/", "pooler/")


def from_pretrained(
    model: str | Path,
    *,
    head: Head = SequenceClassifier,
    num_labels: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    key: jax.Array | None = None,
    place: Place | None = None,
) -> tuple[PureModel, Params]:
    """Loads a pre-trained model from safetensors.

    Parts of the head that the checkpoint does not have are created from `key`: normal
    kernels of deviation `initializer_range`, zero biases. Heads for other tasks in
    the checkpoint are ignored.

    Args:
      model: local folder, or the id of a model on the Hugging Face Hub.
      head: `SequenceClassifier` or `MaskedLM` of an encoder, `CausalLM` of a decoder.
      num_labels: labels of a classifier, 1 for regression; None takes those of the
        checkpoint.
      dtype: dtype of every parameter.
      key: key for the missing parts of the head; needed only if there are any.
      place: shapes of the parameters -> shardings; None puts all on one device. Of
        what is sharded, a process reads its own parts only.

    Returns:
      The model, and its parameters as a nested dictionary of arrays: logits are
      `model(params, batch)`.

    Raises:
      InputError: if the model cannot be fetched, has no `config.json` or no
        safetensors, is of a type that is not supported, misses a tensor or has one
        of another shape, or if its head is missing and `key` is None.
    """
    folder = local_folder(model)
    family, config = read_config(folder, num_labels=num_labels)
    if head.__name__ not in family.architectures:
        raise InputError(
            f"`head` must be one of {', '.join(family.architectures)} for the model "
            f"type {family.name!r} of `{folder}`, got {head.__name__}."
        )
    pure = PureModel(head, family, config)
    files = open_tensors(folder)
    names = with_full_names(family, files)
    abstract = pure.abstract(dtype)
    missing = _missing_head(pure, abstract, names)
    if missing and key is None:
        raise InputError(
            f"`key` must be given, because `{folder}` has no tensor for "
            f"{', '.join(f'`{leaf}`' for leaf in missing)}: pass "
            "`key=jax.random.key(0)` to start the head at random."
        )

    created = {}
    if missing and key is not None:
        created = _new_leaves(pure, missing, jnp.dtype(dtype), key)

    def load(leaf: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf in created:
            return created[leaf]
        whole = tuple(slice(0, size) for size in like.shape)
        found = _read(pure, leaf, like.shape, whole, names, files)
        return jnp.asarray(found, like.dtype)

    def load_parts(leaf: str, like: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if leaf in created:
            return jax.device_put(created[leaf], sharding)

        def part(index: Any) -> np.ndarray:
            found = _read(pure, leaf, like.shape, index, names, files)
            return found.astype(like.dtype)

        return jax.make_array_from_callback(like.shape, sharding, part)

    if place is None:
        return pure, map_named(load, abstract)
    return pure, map_named(load_parts, abstract, place(abstract))


def save_pretrained(model: PureModel, params: Params, folder: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` for PyTorch transformers.

    Args:
      model: model as `from_pretrained` returns it.
      params: its parameters; the first of them names the dtype in `config.json`.
      folder: folder to write to, made if absent.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(_tensors(model, params), folder)
    write_config(model, folder, jax.tree.leaves(params)[0].dtype)


def new_leaves(model: PureModel, folder: str | Path) -> tuple[str, ...]:
    """Returns the names of the leaves that `from_pretrained` creates from its key.

    Args:
      model: model as `from_pretrained` returns it.
      folder: folder it was loaded from.
    """
    names = with_full_names(model.family, open_tensors(folder))
    return _missing_head(model, model.abstract(), names)


def _tensors(model: PureModel, params: Params) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint, those fused that are one there."""
    layout, parts = model.family.layout, {}

    def collect(leaf: str, array: jax.Array) -> None:
        layers = np.asarray(array) if is_stacked(leaf) else np.asarray(array)[None]
        for layer, one in enumerate(layers):
            name = tensor_name(model.family, leaf, layer)
            parts.setdefault(name, []).append((layout.part_of(leaf) or 0, leaf, one))

    map_named(collect, params)
    heads = model.config.num_heads
    tensors = {}
    for name, found in parts.items():
        found.sort(key=lambda part: part[0])
        tensors[name] = layout.fuse(found[0][1], [one for *_, one in found], heads)
    return tensors


def _missing_head(
    model: PureModel, abstract: Params, names: Mapping[str, str]
) -> tuple[str, ...]:
    """Returns the leaves of the head that a checkpoint does not have."""
    leaves = jax.tree.leaves(leaf_names(abstract))
    return tuple(
        leaf
        for leaf in leaves
        if leaf.startswith(_HEADS) and tensor_name(model.family, leaf) not in names
    )


def _read(
    model: PureModel,
    leaf: str,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    names: Mapping[str, str],
    files: Mapping[str, Any],
) -> np.ndarray:
    """Reads a part of one leaf, stacked over the layers if it belongs to one."""
    layout = model.family.layout
    layers = range(1)
    if is_stacked(leaf):
        layers, shape, index = range(shape[0])[index[0]], shape[1:], index[1:]
    expected = layout.tensor_shape(leaf, shape)
    parts = []
    for layer in layers:
        name = tensor_name(model.family, leaf, layer)
        if name not in names:
            raise InputError(
                f"`model` must have the tensor `{name}` for `{leaf}`, but it has none. "
                f"Check that the weights belong to the `config.json` beside them."
            )
        file = files[names[name]]
        lazy = file.get_slice(names[name])
        found = tuple(lazy.get_shape())
        if found != expected:
            raise InputError(_wrong_shape(leaf, name, expected, found))
        if layout.part_of(leaf) is None:
            parts.append(layout.turned(leaf, lazy[layout.turned_index(leaf, index)]))
        else:
            tensor = file.get_tensor(names[name])
            parts.append(layout.split(leaf, tensor, model.config.num_heads)[index])
    return np.stack(parts) if is_stacked(leaf) else parts[0]


def _wrong_shape(leaf: str, name: str, expected: tuple, found: tuple) -> str:
    """Returns the message for a tensor of another shape."""
    remedy = "Check that the weights belong to the `config.json` beside them."
    if leaf.startswith("classifier/") and expected[1:] == found[1:]:
        remedy = f"Pass `num_labels={found[0]}`, or a checkpoint without this head."
    return (
        f"`{name}` must have shape {list(expected)} for `{leaf}`, "
        f"got {list(found)}. {remedy}"
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _new_leaves(
    model: PureModel, leaves: tuple[str, ...], dtype: Any, key: jax.Array
) -> dict[str, jax.Array]:
    """Creates some leaves as `model.init` does; the compiler drops the others."""
    params = model.init(key, dtype)
    names = jax.tree.leaves(leaf_names(params))
    created = dict(zip(names, jax.tree.leaves(params), strict=True))
    return {leaf: created[leaf] for leaf in leaves}

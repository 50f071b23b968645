"""Sparse weight patches: what a server replaces in the checkpoint that it serves."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.file import replacing
from sparse_jax.adapter.whole import require_whole
from sparse_jax.errors import InputError, brief, reason_of
from sparse_jax.models.functional import Model
from sparse_jax.models.hf.tensor_names import has_tensor, is_stacked, tensor_name
from sparse_jax.models.hf.tensors import save_tensors
from sparse_jax.params.names import leaves_by_name

__all__ = [
    "WeightPatch",
    "apply_patches",
    "load_patches",
    "patch_updates",
    "patches_of",
    "save_patches",
]

MANIFEST, INDICES = "patch.json", "indices.safetensors"
FORMAT = "sparse_jax patch 1"
_NEEDED = {"format": str, "indices": str, "shapes": dict, "updates": list}
_COPY = "Copy the folder again."


class WeightPatch(NamedTuple):
    """New values of some entries of one tensor of a Hugging Face checkpoint.

    The fields are those of vLLM's `CheckpointWeightPatch`.

    Example:
      >>> weight = {"w": np.zeros((2, 2), np.float32)}
      >>> values, indices = np.ones(1, np.float32), np.array([2], np.int32)
      >>> apply_patches(weight, [WeightPatch("w", (2, 2), values, indices)])
      >>> weight["w"].tolist()
      [[0.0, 0.0], [1.0, 0.0]]
    """

    name: str  # of the tensor in the checkpoint
    shape: tuple[int, ...]  # of the whole tensor
    values: np.ndarray  # shape=(k,), absolute, in the dtype of the tensor
    indices: np.ndarray  # shape=(k,), ascending, flat into `shape`; int32, int64 if big

    @property
    def dtype(self) -> str:
        """Name of the dtype, such as "bfloat16"."""
        return self.values.dtype.name


def patches_of(adapter: Adapter, model: Model) -> list[WeightPatch]:
    """Returns the patches that turn the checkpoint of a base into the adapted model.

    A leaf trained in full becomes a patch of all its entries, because a server takes
    dense and sparse patches in calls of their own. A tied word table has the name of
    the table, and the head follows it.

    Args:
      adapter: as `load_adapter` returns it.
      model: model that the adapter belongs to.

    Returns:
      One patch a tensor, sorted by name.

    Raises:
      InputError: if the method adds arrays, such as LoRA, or the adapter does not fit
        the model.
    """
    if adapter.added:
        raise InputError(
            f"`adapter` must train entries of the base to be a patch, got "
            f"{adapter.word!r}, which adds arrays. Export it with `--to merged` or "
            "`--to peft`."
        )
    shapes = model.abstract()
    require_whole(shapes, adapter)
    by_name = leaves_by_name(shapes)
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    full: dict[str, tuple[int, ...]] = {}
    layout, config = model.family.layout, model.config
    for leaf, positions, values in _entries(adapter):
        if leaf not in by_name:
            raise InputError(
                f"`adapter` must have leaves of the model, got `{leaf}`, which it "
                "lacks. Load the base with the head that was trained."
            )
        shape = by_name[leaf].shape[int(is_stacked(leaf)) :]
        for layer, (flat, new) in enumerate(zip(positions, values, strict=True)):
            if not has_tensor(model.family, leaf, layer):
                continue
            name = tensor_name(model.family, leaf, layer)
            there = layout.tensor_positions(leaf, shape, flat, config)
            found.setdefault(name, []).append((there, new))
            full[name] = layout.tensor_shape(leaf, shape, config)
    return [_patch(name, full[name], found[name]) for name in sorted(found)]


def save_patches(
    folder: str | Path, adapter: Adapter, model: Model, *, update: int = 0
) -> int:
    """Writes the patches of an adapter, or adds those of a later update to a folder.

    The indices are written once, because the support is fixed. Each later update takes
    only the bytes of its values, 2 per entry in bfloat16.

    Args:
      folder: made if absent; it holds `patch.json`, the indices, and the values of
        each update.
      adapter: what was trained, as `tuner.adapter(state)` returns it.
      model: model that the adapter belongs to.
      update: its number; one that is there already is replaced.

    Returns:
      Bytes written for the indices, if they are new, and the values.

    Raises:
      InputError: as `patches_of`, or if the folder holds patches at other indices.
    """
    folder = Path(folder)
    patches = patches_of(adapter, model)
    for patch in patches:
        _require_valid(patch, "`adapter`", "Load an earlier checkpoint.")
    indices = {patch.name: patch.indices for patch in patches}
    shapes = {patch.name: list(patch.shape) for patch in patches}
    about = {
        "format": FORMAT,
        "base_model": adapter.base_model,
        "base_hash": adapter.base_hash,
        "shapes": shapes,
        "indices": _digest(indices),
    }
    manifest = {**about, "updates": []}
    written = 0
    if (folder / MANIFEST).exists():
        manifest = _read_manifest(folder)
        if field := next((key for key in about if manifest.get(key) != about[key]), ""):
            raise InputError(
                f"`{folder}` must hold patches of the same run, got others by "
                f"`{field}`. Choose another folder."
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        written += _write(folder / INDICES, indices)
    values = {patch.name: patch.values for patch in patches}
    written += _write(folder / _values_file(update), values)
    manifest["updates"] = sorted({*manifest["updates"], update})
    with replacing(folder / MANIFEST) as temporary:
        text = json.dumps(manifest, indent=2, sort_keys=True)
        temporary.write_text(text + "\n", encoding="utf-8")
    return written


def patch_updates(folder: str | Path) -> list[int]:
    """Returns the numbers of the updates that a folder of patches has, ascending.

    Raises:
      InputError: if it is no such folder.
    """
    return _read_manifest(Path(folder))["updates"]


def load_patches(folder: str | Path, update: int | None = None) -> list[WeightPatch]:
    """Reads the patches of one update, and checks what vLLM would refuse.

        for patch in load_patches(folder):
            CheckpointWeightPatch(
                name=patch.name, shape=patch.shape,
                dtype=getattr(torch, patch.dtype), values=..., indices=...,
            )

    Args:
      folder: as `save_patches` writes it.
      update: its number; None is the last one.

    Raises:
      InputError: naming the file, if one is missing, damaged, or of another format; or
        the tensor, if its indices repeat or lie outside, or a value is NaN.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    updates = manifest["updates"]
    update = updates[-1] if update is None and updates else update
    if update is None or update not in updates:
        raise InputError(
            f"`update` must be one of the {len(updates)} in `{folder}`, got {update}. "
            "Take one of `patch_updates(folder)`."
        )
    indices = _read(folder / INDICES)
    values = _read(folder / _values_file(update))
    is_whole = {*indices} == {*values} == {*manifest["shapes"]}
    if not is_whole or _digest(indices) != manifest["indices"]:
        raise InputError(
            f"`{folder}` must hold the indices and values that `{MANIFEST}` names, and "
            f"does not. {_COPY}"
        )
    patches = []
    for name, shape in sorted(manifest["shapes"].items()):
        patch = WeightPatch(name, tuple(shape), values[name], indices[name])
        _require_valid(patch, f"`{folder}`", _COPY)
        patches.append(patch)
    return patches


def apply_patches(
    tensors: MutableMapping[str, np.ndarray], patches: Iterable[WeightPatch]
) -> None:
    """Replaces entries of the tensors of a checkpoint, in place.

        tensor.flat[indices] = values

    Nothing is changed unless all patches fit.

    Raises:
      InputError: naming the tensor that is missing, of another shape or dtype, or
        whose patch is not valid.
    """
    patches = list(patches)
    for patch in patches:
        _require_valid(patch, "`patches`", "Read them with `load_patches`.")
        tensor = tensors.get(patch.name)
        found = None if tensor is None else (tensor.shape, tensor.dtype.name)
        if found != (patch.shape, patch.dtype):
            raise InputError(
                f"`tensors` must have `{patch.name}` as {patch.dtype}"
                f"{list(patch.shape)}, got {found}. Read the checkpoint that the "
                "adapter was trained on, in its dtype."
            )
    for patch in patches:
        tensor = tensors[patch.name]
        # A view of an array that is not contiguous would be a copy.
        if not tensor.flags.c_contiguous or not tensor.flags.writeable:
            tensor = tensors[patch.name] = np.array(tensor, order="C")
        tensor.reshape(-1)[patch.indices] = patch.values


def _entries(adapter: Adapter) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields leaves with positions and values, both shape=(L, k) or (1, k)."""
    for leaf, positions in adapter.support.items():
        rows = positions.shape[0] if is_stacked(leaf) else 1
        yield leaf, positions.reshape(rows, -1), adapter.values[leaf].reshape(rows, -1)
    for leaf, array in adapter.dense.items():
        values = array.reshape(array.shape[0] if is_stacked(leaf) else 1, -1)
        positions = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        yield leaf, positions, values


def _patch(
    name: str, shape: tuple[int, ...], parts: list[tuple[np.ndarray, np.ndarray]]
) -> WeightPatch:
    """Returns the patch of a tensor, which several leaves may lie in."""
    indices = np.concatenate([where for where, _ in parts])
    values = np.concatenate([new for _, new in parts])
    order = np.argsort(indices, kind="stable")
    kind = np.int32 if math.prod(shape) <= np.iinfo(np.int32).max else np.int64
    return WeightPatch(name, shape, values[order], indices[order].astype(kind))


def _require_valid(patch: WeightPatch, place: str, remedy: str) -> None:
    """Raises unless vLLM takes a patch."""
    indices, values = patch.indices, patch.values
    rules = {
        "integers for indices": indices.dtype in (np.int32, np.int64),
        "as many values as indices": indices.ndim == 1
        and indices.shape == values.shape,
        "ascending, distinct indices": bool((np.diff(indices) > 0).all()),
        f"indices in [0, {math.prod(patch.shape)})": not indices.size
        or (indices[0] >= 0 and indices[-1] < math.prod(patch.shape)),
        # NaN says "unchanged" to vLLM.
        "finite values": bool(np.isfinite(values.astype(np.float32)).all()),
    }
    for rule, keeps in rules.items():
        if not keeps:
            raise InputError(
                f"`{patch.name}` in {place} must have {rule}, got others. {remedy}"
            )


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of arrays and their names."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.size};".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()


def _values_file(update: int) -> str:
    """Returns the name of the file with the values of an update."""
    return f"values-{update:08}.safetensors"


def _write(path: Path, tensors: dict[str, np.ndarray]) -> int:
    """Writes tensors, whole or not at all; returns the bytes of the file."""
    with replacing(path) as temporary:
        save_tensors(tensors, temporary, {"format": "pt"})
    return path.stat().st_size


def _read(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(
            f"`{path}` must be a complete safetensors file: {reason_of(error)}. {_COPY}"
        ) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads `patch.json`."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"`{folder}` must be a folder of patches with a `{MANIFEST}`: "
            f"{reason_of(error)}. Write it with `sparse-jax export --to patch`."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise InputError(
            f"`{path}` must be of format {FORMAT!r}, got {brief(found)}. Read it with "
            "the version that wrote it."
        )
    is_whole = all(isinstance(manifest.get(k), kind) for k, kind in _NEEDED.items())
    is_size = lambda value, least: type(value) is int and value >= least
    if not (
        is_whole
        and all(is_size(update, 0) for update in manifest["updates"])
        and all(
            isinstance(shape, list) and all(is_size(size, 1) for size in shape)
            for shape in manifest["shapes"].values()
        )
    ):
        raise InputError(
            f"`{path}` must name shapes, indices and updates, and does not. {_COPY}"
        )
    return manifest

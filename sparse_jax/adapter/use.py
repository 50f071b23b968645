"""Put an adapter on its base model, and take it off again."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.adapter.adapter import Adapter, require_pair
from sparse_jax.adapter.whole import require_inside, require_whole
from sparse_jax.errors import InputError, brief, listed, printable
from sparse_jax.models.attachment import Attachment, LayerValues
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.hf.model_files import cached_folder, local_folder
from sparse_jax.models.hf.pretrained import (
    base_config,
    changed_field,
    leaf_digests,
)
from sparse_jax.params.names import leaves_by_name, map_named
from sparse_jax.supports.positions import fetch, read_entries, write_entries

__all__ = [
    "apply_adapter",
    "base_folder",
    "merge_adapter",
    "require_base",
    "require_fit",
    "swap",
    "warn_of_dtype",
    "without_leaves",
]

_log = logging.getLogger(__name__)

_LONGEST = 200  # characters of a name that are shown


def apply_adapter(
    params: Any,
    adapter: Adapter,
    *,
    base_hash: str | None = None,
    model: Model | None = None,
    new: Sequence[str] = (),
) -> tuple[Any, Attachment]:
    """Returns a base model's parameters with an adapter, and what it attaches.

        logits = model(params, batch, attachment=attachment)

    Methods that add arrays to the layers, such as LoRA, return an attachment; use
    `merge_adapter` to fold it into the parameters, where the method allows it.

    Args:
      params: parameters of the base model, in the dtype the adapter was trained in.
      adapter: as `load_adapter` returns it.
      base_hash: `base_hash` of the folder the parameters come from; None trusts them.
      model: that the parameters belong to; None trusts its configuration.
      new: leaves that the checkpoint of the base lacks, as from `new_leaves`.

    Raises:
      InputError: if the base is another one or has other labels, or a leaf or a part of
        a site is missing, does not fit or does not belong there.
    """
    require_base(adapter, base_hash, model)
    _require_labels(adapter, model)
    require_whole(params, adapter, new=new)
    warn_of_dtype(params, adapter)
    params, _ = swap(params, adapter)
    added = jax.tree.map(jnp.asarray, adapter.added)
    return params, Attachment(LayerValues(added), response=adapter.method.respond)


def merge_adapter(params: Any, adapter: Adapter, **options: Any) -> Any:
    """Returns plain parameters that compute what the adapted model computes.

    The arguments and errors are those of `apply_adapter`; bottleneck adapters and
    prefixes are not linear and cannot be merged either. To undo it bit for bit, keep
    the second value of `swap`, or the base's parameters if the method adds arrays.
    """
    params, _ = apply_adapter(params, adapter, **options)
    return adapter.method.merge(params, adapter.added)


def swap(params: Any, adapter: Adapter) -> tuple[Any, Adapter]:
    """Exchanges the values at the supports of an adapter with those of a model.

    Returns:
      The new parameters, and an adapter that holds the old values: swapping it in
      restores every bit.

    Raises:
      InputError: if a leaf is missing or does not fit.

    Example:
      >>> import numpy as np
      >>> params = {"w": jnp.array([1.0, 2.0, 3.0])}
      >>> support = {"w": np.array([0, 2], np.int32)}
      >>> other = Adapter(support, {"w": np.array([8.0, 9.0], np.float32)})
      >>> changed, undo = swap(params, other)
      >>> changed["w"], swap(changed, undo)[0]["w"]
      (Array([8., 2., 9.], dtype=float32), Array([1., 2., 3.], dtype=float32))
    """
    # As they may come from NumPy.
    params = jax.tree.map(jnp.asarray, params)
    require_fit(params, adapter)
    old_values, old_dense = {}, {}

    def exchange(name: str, leaf: jax.Array) -> jax.Array:
        if name in adapter.dense:
            old_dense[name] = fetch(leaf)
            return jax.device_put(adapter.dense[name], leaf.sharding)
        if name not in adapter.support:
            return leaf
        support = adapter.support[name]
        old_values[name] = read_entries(leaf, support)
        return write_entries(leaf, support, adapter.values[name])

    changed = map_named(exchange, params)
    return changed, Adapter(dict(adapter.support), old_values, old_dense)


def without_leaves(adapter: Adapter, leaves_out: Callable[[str], bool]) -> Adapter:
    """Returns an adapter without what it trains of some leaves."""
    parts = adapter.support, adapter.values, adapter.dense
    support, values, dense = (
        {name: array for name, array in part.items() if not leaves_out(name)}
        for part in parts
    )
    return replace(adapter, support=support, values=values, dense=dense)


def base_folder(adapter: Adapter, model: str | Path | None) -> Path:
    """Returns the folder of an adapter's base, or of the model to use in its place.

    A base that the adapter names is reported, and never fetched: the file may come
    from anybody.

    Args:
      adapter: as `load_adapter` returns it.
      model: folder or id; None is what the adapter names.

    Raises:
      InputError: if the model cannot be fetched, or the named one is not here.
    """
    if model is not None:
        return local_folder(model)
    named = printable(adapter.base_model)[:_LONGEST]
    _log.warning("the adapter names the base model `%s`", named)
    return cached_folder(adapter.base_model)


def require_base(
    adapter: Adapter,
    base_hash: str | None,
    model: Model | None = None,
    folder: Path | None = None,
) -> None:
    """Raises if the base is not the one that was adapted.

    The arguments are those of `apply_adapter`, and the folder of the base.
    """
    if base_hash is not None and base_hash != adapter.base_hash:
        raise InputError(
            "`model` must be the base of the adapter, "
            f"{brief(adapter.base_model)} with SHA-256 {adapter.base_hash[:12]}..., "
            f"got SHA-256 {base_hash[:12]}...{_difference(adapter, folder)} Pass the "
            "folder that the adapter was trained on."
        )
    if model is None:
        return
    now = base_config(model)
    if field := changed_field(adapter.base_config, now):
        raise InputError(
            f"`model` must be the base of the adapter, which has `{field}`="
            f"{brief(adapter.base_config[field])} in its configuration, got "
            f"{brief(now[field])} with the same weights. Pass the `config.json` that "
            "the adapter was trained with."
        )


def _difference(adapter: Adapter, folder: Path | None) -> str:
    """Returns a sentence on the leaves in which a folder is not an adapter's base."""
    before = adapter.base_leaves
    if folder is None or not before:
        return ""
    now = leaf_digests(folder)
    others = [leaf for leaf in before if now.get(leaf) != before[leaf]]
    if not others:
        return " Its leaves are those of the base, in files that differ."
    text = f" Leaves that differ: {len(others)} of {len(before)}, the first is "
    text += f"{listed(others[:1])}."
    # The last word is the checksum of the values.
    shape = lambda leaves, leaf: str(leaves.get(leaf, "none ")).rpartition(" ")[0]
    reshaped = [leaf for leaf in others if shape(before, leaf) != shape(now, leaf)]
    if reshaped:
        was, is_now = (listed([shape(one, reshaped[0])]) for one in (before, now))
        text += f" Of another shape or dtype: {listed(reshaped, most=3)}; the first "
        text += f"was {was} and is {is_now}."
    return text


def _require_labels(adapter: Adapter, model: Model | None) -> None:
    """Raises if the outputs of a model belong to labels in another order."""
    names = getattr(model.config, "label_names", None) if model is not None else None
    if names and adapter.labels and tuple(names) != tuple(adapter.labels):
        raise InputError(
            f"`model` must have the labels of the adapter, {listed(adapter.labels)}, "
            f"got {listed(names)}. Load it with `labels=adapter.labels`."
        )


def warn_of_dtype(params: Any, adapter: Adapter) -> None:
    """Warns if the parameters are not of the dtype that an adapter was trained in."""
    trained, found = adapter.settings.get("dtype"), jax.tree.leaves(params)[0].dtype
    if trained is not None and trained != found:
        _log.warning(
            "the adapter was trained on parameters in %s, and these are in %s",
            trained, found,
        )  # fmt: skip


def require_fit(params: Params, adapter: Adapter) -> None:
    """Raises unless parameters have the leaves and entries of an adapter.

    Raises:
      InputError: naming a leaf that is missing, or of another shape or dtype.
    """
    for name in sorted({*adapter.support, *adapter.values}):
        require_pair("`adapter`", name, adapter, "Take it from a tuner.")
    known = leaves_by_name(params)
    changed = {**adapter.values, **adapter.dense}
    if unknown := sorted({*changed} - {*known}):
        raise InputError(
            f"`params` must have the leaf `{unknown[0]}` of the adapter, but has none. "
            "Load the base model with the head that was trained."
        )
    for name, values in changed.items():
        leaf = known[name]
        is_sparse = name in adapter.support
        if values.dtype != leaf.dtype or not (is_sparse or values.shape == leaf.shape):
            raise InputError(
                f"`{name}` must be {leaf.dtype}{list(leaf.shape)} as in the model, got "
                f"{values.dtype}{list(values.shape)} in the adapter. Load the base in "
                "the dtype and with the labels that were trained."
            )
        if is_sparse:
            require_inside(name, adapter.support[name], leaf)

"""The method behind an adapter: what its arrays mean, and which have to be there."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from sparse_jax.adapter.file import Adapter
from sparse_jax.errors import InputError, brief
from sparse_jax.methods.bottlenecks import Bottleneck
from sparse_jax.methods.ia3 import IA3
from sparse_jax.methods.method import Method
from sparse_jax.methods.prefix import Prefix
from sparse_jax.methods.registry import METHODS
from sparse_jax.models.activations import ACTIVATIONS
from sparse_jax.models.hf.weights import HEADS
from sparse_jax.params.roles import DENSE, SPARSE, Role, map_roles
from sparse_jax.supports.granularity import GRANULARITIES

__all__ = ["method_of_adapter", "require_whole"]

Rules = tuple[str, ...]

# Options that came after the first adapter files; those lack them.
_LATER = ("alpha", "rslora", "dropout", "granularity")
# method that adds arrays -> the option, part and axis that say how wide it is
_WIDTHS = {
    "lora": ("rank", "a", -1), "dora": ("rank", "a", -1), "series": ("size", "up", -2),
    "parallel": ("size", "up", -2), "prefix": ("prefix_length", "keys", -2),
}  # fmt: skip
_ADDING = (*_WIDTHS, "ia3")


def method_of_adapter(adapter: Adapter) -> Method:
    """Returns the method whose `response` and `merge` an adapter needs.

    Raises:
      InputError: if the method, or an activation, is not known, or a run has not
        written a setting that the method needs.

    Example:
      >>> pair = {"a": np.zeros((2, 3, 4)), "b": np.zeros((2, 4, 3))}
      >>> settings = {"alpha": 16.0}
      >>> adapter = Adapter(added={"mlp/up": pair}, method="lora", settings=settings)
      >>> method_of_adapter(adapter)
      LoRA(dense=(), stack='layers', rank=4, where=('^mlp/up$',), alpha=16.0, \
rslora=False, dropout=0.0)
    """
    return _method(adapter, ())


def require_whole(params: Any, adapter: Adapter, *, new: Sequence[str] = ()) -> None:
    """Raises unless an adapter has all that its method has to have, and no more.

    An adapter that a run wrote has the leaves and sites of its rules; one that was
    made by hand has every part of the sites that it names.

    Args:
      params: parameters of the base model, or their shapes.
      adapter: as `load_adapter` returns it.
      new: leaves that the checkpoint of the base does not have.

    Raises:
      InputError: naming what is missing, does not belong there, or does not fit.
    """
    head = ("^classifier/",) if "classifier" in params else ()
    method = _method(adapter, head)
    if adapter.method in _ADDING and not adapter.added:
        raise InputError(
            f"`adapter` must have the arrays that {adapter.method} adds, and has none. "
            "Copy it again."
        )
    expected: Any = jax.eval_shape(method.added, params, jax.random.key(0))
    _require_sites(expected, adapter.added)
    if _is_of_run(adapter):
        _require_leaves(method, params, adapter, new)
    for leaf in new:
        if leaf not in adapter.dense and leaf not in adapter.support:
            raise InputError(
                f"`adapter` must have the leaf `{leaf}`, which the checkpoint of its "
                "base lacks, and does not. Train it with --dense, or copy it again."
            )


def _method(adapter: Adapter, head: Rules) -> Method:
    """Returns the method of an adapter; `head` is trained in full by default."""
    if adapter.method not in METHODS and not adapter.added and not _is_of_run(adapter):
        return Method()
    entry = _named("method", adapter.method, METHODS)
    options = _options(adapter)
    method: Any = entry.make(options, head)
    if isinstance(method, Bottleneck):
        method = replace(method, scale=adapter.settings.get("scale") or 1.0)
    is_free = options.get("where") is None and not _is_of_run(adapter)
    if is_free and adapter.method in _ADDING:
        return _at_sites(method, adapter.added)
    return method


def _is_of_run(adapter: Adapter) -> bool:
    """Returns whether `finetune` wrote an adapter: it always says what is dense."""
    return "dense" in adapter.settings


def _options(adapter: Adapter) -> dict[str, Any]:
    """Returns the options that an adapter was trained with."""
    names, settings = METHODS[adapter.method].options, adapter.settings
    missing = [name for name in names if name not in (*settings, *_LATER)]
    if missing and _is_of_run(adapter):
        raise InputError(
            f"`settings` of the adapter must have `{missing[0]}`, which its method "
            f"{adapter.method} needs, and does not. Copy it again."
        )
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    rules = {
        name: (rule,) if isinstance(rule, str) else tuple(rule)
        for name in ("where", "dense")
        if (rule := settings.get(name)) is not None
    }
    for name, table in (("activation", ACTIVATIONS), ("granularity", GRANULARITIES)):
        if name in given:
            _named(name, given[name], table)
    return {"density": 1.0, **_width(adapter), **given, **rules}


def _width(adapter: Adapter) -> dict[str, int]:
    """Returns the option that says how wide the arrays are, as they are."""
    if adapter.method not in _WIDTHS or not adapter.added:
        return {}
    option, part, axis = _WIDTHS[adapter.method]
    site, parts = next(iter(adapter.added.items()))
    if part not in parts or parts[part].ndim != 3:
        raise InputError(
            f"`adapter` must have a stack of matrices `{part}` at `{site}`, as "
            f"{adapter.method} adds it, and does not. Copy it again."
        )
    return {option: parts[part].shape[axis]}


def _at_sites(method: Any, added: Mapping[str, Any]) -> Method:
    """Returns a method at exactly the sites that have arrays."""
    rule = lambda sites: tuple(f"^{re.escape(site)}$" for site in sorted(sites))
    if isinstance(method, IA3):
        inputs = {site for site, parts in added.items() if "input" in parts}
        outputs = {*added} - inputs
        return replace(method, where=rule(outputs), feedforward=rule(inputs))
    return method if isinstance(method, Prefix) else replace(method, where=rule(added))


def _require_sites(expected: Any, added: Mapping[str, Any]) -> None:
    """Raises unless the added arrays are those that a method adds."""
    for site in sorted({*expected} | {*added}):
        if site not in added:
            raise InputError(
                f"`adapter` must have arrays at the site `{site}`, and has none. Copy "
                "it again, or load the base that it was trained on."
            )
        if {*added[site]} != {*expected.get(site, ())}:
            raise InputError(
                f"`adapter` must have {_words_of(expected.get(site, ()))} at the site "
                f"`{site}`, got {_words_of(added[site])}. Copy it again, or load the "
                "base that it was trained on."
            )
        for part, array in added[site].items():
            like = expected[site][part]
            if array.shape != like.shape or array.dtype not in (np.float32, like.dtype):
                raise InputError(
                    f"`added/{site}/{part}` must be {like.dtype}{list(like.shape)} for "
                    f"the model and the settings of the adapter, got "
                    f"{array.dtype}{list(array.shape)}. Copy it again, or load the "
                    "base that it was trained on."
                )


def _require_leaves(
    method: Method, params: Any, adapter: Adapter, new: Sequence[str]
) -> None:
    """Raises unless the leaves of a run's adapter are those that its rules match."""

    def check(role: Role, leaf: Any) -> None:
        name = role.name
        is_free = name in new or name.startswith(HEADS)
        is_whole, is_sparse = name in adapter.dense, name in adapter.support
        is_trained = is_whole if role.kind == DENSE else is_whole or is_sparse
        if role.kind in (DENSE, SPARSE) and not is_trained:
            raise InputError(
                f"`adapter` must have the leaf `{name}`, which its settings train, "
                "and does not. Copy it again, or load the base that it was trained on."
            )
        is_foreign = is_whole and role.kind != DENSE and not is_free
        if is_foreign or (is_sparse and role.kind != SPARSE):
            raise InputError(
                f"`adapter` must have only what its settings train, got the leaf "
                f"`{name}`. Copy it again, or load the base that it was trained on."
            )
        if is_sparse:
            shape = role.packed_shape(leaf.shape, method.support_size(role))
            if adapter.support[name].shape != shape:
                raise InputError(
                    f"`{name}.support` must be int32{list(shape)} for the density of "
                    f"the adapter, got {list(adapter.support[name].shape)}. Copy it "
                    "again, or load the base that it was trained on."
                )

    map_roles(check, method.roles(params), params)


def _words_of(parts: Sequence[str]) -> str:
    """Returns the names of parts."""
    return " and ".join(f"`{part}`" for part in sorted(parts)) or "no arrays"


def _named(setting: str, word: str, table: Mapping[str, Any]) -> Any:
    """Returns the value of a word in a table."""
    if word not in table:
        raise InputError(
            f"`{setting}` of the adapter must be one of {', '.join(table)}, got "
            f"{brief(word)}. Read it with the version that wrote it."
        )
    return table[word]

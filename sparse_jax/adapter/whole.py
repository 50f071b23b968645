"""The check that an adapter has exactly what its method trains."""

import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method
from sparse_jax.methods.sites import Added
from sparse_jax.models.functional import Params
from sparse_jax.models.hf.weights import HEADS
from sparse_jax.params.names import map_named
from sparse_jax.supports.roles import DENSE, SPARSE, Role, map_roles

__all__ = ["require_inside", "require_sites", "require_stack", "require_whole"]


def require_whole(params: Params, adapter: Adapter, *, new: Sequence[str] = ()) -> None:
    """Raises unless an adapter has exactly what its method trains.

    These are the leaves and sites that the rules of the method match; an adapter
    without a method may have any leaves, and no sites.

    Args:
      params: parameters of the base model, or their shapes.
      adapter: as `load_adapter` returns it.
      new: leaves that the checkpoint of the base does not have.

    Raises:
      InputError: naming what is missing, does not belong there, or does not fit.
    """
    require_sites(params, adapter)
    map_named(lambda name, leaf: _require_shape(name, leaf, adapter), params)
    if adapter.method != Method():
        _require_leaves(adapter.method, params, adapter, new)
    for leaf in new:
        if leaf not in adapter.dense and leaf not in adapter.support:
            raise InputError(
                f"`adapter` must have the leaf `{leaf}`, which the checkpoint of its "
                "base lacks, and does not. Train it with `dense`, or copy it again."
            )


def require_sites(params: Params, adapter: Adapter) -> None:
    """Raises `InputError` unless an adapter has the arrays that its method adds."""
    method, added = adapter.method, adapter.added
    expected: Added = jax.eval_shape(method.added, params, jax.random.key(0))
    if expected and not added:
        raise InputError(
            f"`adapter` must have the arrays that {adapter.word} adds, and has none. "
            "Copy it again."
        )
    if added and method == Method():
        raise InputError(
            "`method` of the adapter must be the one that added its arrays, got none. "
            "Pass it with the settings of the training, or take `tuner.adapter(state)`."
        )
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


def require_stack(argument: str, role: Role, adapter: Adapter) -> None:
    """Raises unless a run and an adapter both have positions in layers, or neither."""
    support = adapter.support.get(role.name)
    if support is None or role.kind != SPARSE or support.ndim == 1 + role.stacked:
        return
    wanted, got = "layers", "the whole"
    if not role.stacked:
        wanted, got = got, wanted
    raise InputError(
        f"`{argument}` must have positions in {wanted} of `{role.name}`, as this run "
        f"has, got {got}. Train with the same `stack`."
    )


def _require_shape(name: str, leaf: jax.Array, adapter: Adapter) -> None:
    """Raises unless what an adapter has of a leaf lies in it."""
    if name in adapter.support:
        require_inside(name, adapter.support[name], leaf)
    array = adapter.dense.get(name)
    if array is not None and array.shape != leaf.shape:
        raise InputError(
            f"`{name}` must be {leaf.dtype}{list(leaf.shape)} as in the model, got "
            f"{array.dtype}{list(array.shape)} in the adapter. Load the base in the "
            "dtype and with the labels that were trained."
        )


def require_inside(name: str, support: np.ndarray, leaf: jax.Array) -> None:
    """Raises unless the positions of a support lie in the leaf."""
    layers = () if support.ndim == 1 else support.shape[:1]
    size = math.prod(leaf.shape[len(layers) :])
    least, most = support.min(initial=0), support.max(initial=-1)
    if leaf.shape[: len(layers)] != layers or least < 0 or most >= size:
        got = f"down to {least}" if least < 0 else f"up to {most}"
        raise InputError(
            f"`{name}.support` must hold positions below {size} for "
            f"{leaf.dtype}{list(leaf.shape)}, got {list(support.shape)} {got}. "
            "Load the base that the adapter was trained on."
        )


def _require_leaves(
    method: Method, params: Params, adapter: Adapter, new: Sequence[str]
) -> None:
    """Raises unless the leaves of a run's adapter are those that its rules match."""

    def check(role: Role, leaf: jax.Array) -> None:
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


def _words_of(parts: Iterable[str]) -> str:
    """Returns the names of parts."""
    return " and ".join(f"`{part}`" for part in sorted(parts)) or "no arrays"

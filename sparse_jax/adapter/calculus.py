"""Sums of adapters on one base, and what two of them have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_jax.adapter.adapter import Adapter, Arrays, require_named
from sparse_jax.adapter.use import require_fit, without_leaves
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.methods.lora import LoRA
from sparse_jax.methods.method import Method
from sparse_jax.models.functional import Params
from sparse_jax.params.names import leaf_names
from sparse_jax.supports.positions import fetch, union_of

__all__ = ["LeafOverlap", "combine_adapters", "compare_supports", "shared_leaves"]


class LeafOverlap(NamedTuple):
    """How many entries of one leaf two adapters train."""

    first: int
    second: int
    shared: int

    @property
    def fraction(self) -> float:
        """Shared entries as a fraction of all that either trains, Jaccard's index."""
        return self.shared / max(self.first + self.second - self.shared, 1)


def compare_supports(first: Adapter, second: Adapter) -> dict[str, LeafOverlap]:
    """Returns the overlap of two adapters in every leaf that one of them trains.

    A leaf trained in full counts with all its entries.

    Raises:
      InputError: naming the leaf, if one adapter has positions in its layers and the
        other in the whole of it.

    Example:
      >>> adapters = [
      ...     Adapter({"w": np.array(support)}, {"w": np.ones(len(support))})
      ...     for support in ([0, 3], [3])
      ... ]
      >>> compare_supports(*adapters)
      {'w': LeafOverlap(first=2, second=1, shared=1)}
    """
    found, pair = {}, (first, second)
    for leaf in sorted({*_leaves(first)} | {*_leaves(second)}):
        sizes = [_trained_size(adapter, leaf) for adapter in pair]
        whole = [leaf in adapter.dense for adapter in pair]
        if any(whole):
            shared = sizes[1 - whole.index(True)]
        else:
            supports = [one.support[leaf] for one in pair if leaf in one.support]
            _require_alike(leaf, supports)
            shared = _shared(*supports) if len(supports) == 2 else 0
        found[leaf] = LeafOverlap(sizes[0], sizes[1], shared)
    return found


def shared_leaves(first: Adapter, second: Adapter) -> list[str]:
    """Returns the leaves in which two adapters train an entry in common."""
    both = compare_supports(first, second)
    return [leaf for leaf, overlap in both.items() if overlap.shared]


def combine_adapters(
    params: Params,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    new: Sequence[str] = (),
    head: int = 0,
) -> Adapter:
    """Returns one adapter for a weighted sum of several on one base.

        W = W_base + sum_i weights[i] * (W_i - W_base)

    The sum is taken in float32 and rounded once. An entry that only one adapter trains,
    with weight 1, is copied bit for bit; a weight of -1 subtracts. LoRA adapters are
    summed exactly, as one adapter whose rank is the sum of theirs.

    Args:
      params: parameters of the base, in the dtype that was trained.
      adapters: at least one, all of this base: all LoRA, or all without added arrays.
      weights: one for each; None is 1 for each.
      new: leaves that the checkpoint of the base lacks, as from `new_leaves`. They are
        not summed: the sum has those of `adapters[head]`.
      head: the adapter whose new leaves, task and labels the sum has.

    Raises:
      InputError: if the adapters are of different bases, or of methods that have no
        sum; naming the site, if the ranks add up to more than it has; if a leaf is
        missing; if `new` names others, or lacks a classifier that
        has other labels; or naming a leaf of another shape or dtype.

    Source:
      `add_weighted_adapter` of PEFT, with `combination_type="cat"` for LoRA.

    Example:
      >>> base = {"w": np.array([1.0, 2.0, 3.0], np.float32)}
      >>> one, two = (
      ...     Adapter({"w": np.array([i])}, {"w": np.array([9.0], np.float32)})
      ...     for i in (0, 2)
      ... )
      >>> total = combine_adapters(base, [one, two], [1.0, 0.5])
      >>> total.support["w"].tolist(), total.values["w"].tolist()
      ([0, 2], [9.0, 6.0])
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    _require_sum(adapters, weights, head)
    named = jax.tree.leaves(leaf_names(params))
    base = dict(zip(named, jax.tree.leaves(params), strict=True))
    leaves = sorted({leaf for adapter in adapters for leaf in _leaves(adapter)})
    require_named(named, new)
    chosen = adapters[head]
    for one in adapters:
        summed = one if one is chosen else without_leaves(one, lambda leaf: leaf in new)
        require_fit(params, summed)
    support, values, dense = {}, {}, {}
    for leaf in leaves:
        parts = list(zip(adapters, weights, strict=True))
        if leaf in new:
            parts = [(chosen, 1.0)]
        parts = [
            (one, weight) for one, weight in parts if weight and leaf in _leaves(one)
        ]
        if not parts:
            continue
        _require_labels(leaf, [chosen, *(one for one, _ in parts)])
        found = _sum_of(leaf, base[leaf], parts)
        if isinstance(found, tuple):
            support[leaf], values[leaf] = found
        else:
            dense[leaf] = found
    method, added = _low_rank_sum(adapters, weights)
    about = {"settings": {"dtype": chosen.settings.get("dtype")}, "method": method}
    if method == Method():
        about["word"] = "combined"
    return replace(
        chosen, support=support, values=values, dense=dense, added=added, **about
    )


def _require_sum(
    adapters: Sequence[Adapter], weights: Sequence[float], head: int
) -> None:
    """Raises unless adapters have a sum."""
    if not adapters or len(weights) != len(adapters):
        raise InputError(
            f"`weights` must be as many as adapters, at least one, got {len(weights)} "
            f"for {len(adapters)}. Pass one for each, or none."
        )
    if not np.isfinite(weights).all():
        raise InputError(f"`weights` must be finite, got {brief(weights)}.")
    if not 0 <= head < len(adapters):
        raise InputError(
            f"`head` must be in [0, {len(adapters)}), got {head}. It is the number of "
            "the adapter whose head is kept."
        )
    hashes = {one.base_hash for one in adapters if one.base_hash}
    if len(hashes) > 1:
        names = sorted({f"{one.base_model} ({one.base_hash[:12]})" for one in adapters})
        raise InputError(
            f"`adapters` must be of one base, got {', '.join(names)}. Train them on "
            "the same checkpoint."
        )
    kinds = {one.word for one in adapters if one.added}
    if kinds and not all(isinstance(one.method, LoRA) for one in adapters):
        words = ", ".join(sorted({one.word for one in adapters}))
        raise InputError(
            f"`adapters` must be all LoRA, or all without added arrays, got {words}. "
            "Merge them into models of their own."
        )


def _require_labels(leaf: str, adapters: Sequence[Adapter]) -> None:
    """Raises if a leaf has an output for each label, and labels differ."""
    labels = {one.labels: None for one in adapters if one.labels}
    if leaf.startswith("classifier/") and len(labels) > 1:
        first, second, *_ = map(listed, labels)
        raise InputError(
            f"`adapters` must have the same labels to have their `{leaf}` summed, got "
            f"{first} and {second}. Train them with the same, or name it in `new` to "
            "have that of one."
        )


def _sum_of(
    leaf: str, base: jax.Array, parts: Sequence[tuple[Adapter, float]]
) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
    """Returns the support and values of a sum, or the whole leaf if one part has it."""
    supports = [one.support[leaf] for one, _ in parts if leaf in one.support]
    _require_alike(leaf, supports)
    stacked = any(one.ndim == 2 for one in supports)
    rows = []
    # A layer at a time, so that a float32 copy of one is all that is made.
    for row in range(base.shape[0]) if stacked else [...]:
        changes = [
            (one.support[leaf][row], one.values[leaf][row], weight)
            if leaf in one.support
            else (slice(None), one.dense[leaf][row].reshape(-1), weight)
            for one, weight in parts
        ]
        rows.append(_sum_of_row(fetch(base[row]).reshape(-1), changes))
    if len(supports) < len(parts):
        return np.stack(rows).reshape(base.shape)
    support = union_of(supports)
    values = np.stack(
        [new[row] for row, new in zip(np.atleast_2d(support), rows, strict=True)]
    )
    return (support, values) if stacked else (support, values[0])


def _sum_of_row(
    old: np.ndarray, changes: Sequence[tuple[Any, np.ndarray, float]]
) -> np.ndarray:
    """Returns all values of a row, shape=(n,)."""
    base = old.astype(np.float32)
    total, last, count = base.copy(), old.copy(), np.zeros(old.shape, np.uint8)
    for places, values, weight in changes:
        total[places] += np.float32(weight) * (values.astype(np.float32) - base[places])
        last[places] = values
        # One change of weight 1 keeps its bits, as b + (v - b) is not always v.
        count[places] = np.minimum(count[places] + (1 if weight == 1 else 2), 2)
    return np.where(count == 2, total.astype(old.dtype), last)


def _low_rank_sum(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Method, dict[str, Arrays]]:
    """Returns a LoRA of the sum of the ranks, of scale 1."""
    if not any(one.added for one in adapters):
        return Method(), {}
    lora = [one.method for one in adapters if isinstance(one.method, LoRA)]
    rank = sum(method.rank for method in lora)
    sites = sorted({site for one in adapters for site in one.added})
    added: dict[str, Arrays] = {}
    for site in sites:
        like = next(one.added[site] for one in adapters if site in one.added)
        most = min(like["a"].shape[1], like["b"].shape[2])
        if rank > most:
            raise InputError(
                f"`adapters` must have ranks that add up to at most {most}, the "
                f"smaller side of the kernel at `{site}`, got {rank}. Combine fewer, "
                "or merge them into models of their own."
            )
        halves: dict[str, list[np.ndarray]] = {"a": [], "b": []}
        for one, method, weight in zip(adapters, lora, weights, strict=True):
            pair = one.added.get(site)
            if pair is None:
                layers, width, _ = like["a"].shape
                a = np.zeros((layers, width, method.rank), np.float32)
                b = np.zeros((layers, method.rank, like["b"].shape[-1]), np.float32)
                pair = {"a": a, "b": b}
            halves["a"].append(pair["a"])
            halves["b"].append(np.float32(weight * method.scale) * pair["b"])
        a, b = np.concatenate(halves["a"], axis=2), np.concatenate(halves["b"], axis=1)
        added[site] = {"a": a, "b": b}
    where = tuple(f"^{site}$" for site in sites)
    dense = tuple(sorted({leaf for one in adapters for leaf in one.dense}))
    exact = tuple(f"^{leaf}$" for leaf in dense)
    about = {"dense": exact or None, "stack": lora[0].stack}
    return LoRA(rank=rank, alpha=float(rank), where=where, **about), added


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """Returns how many positions two supports have in common."""
    if first.ndim == 1:
        return np.intersect1d(first, second, assume_unique=True).size
    return sum(map(_shared, first, second))


def _require_alike(leaf: str, supports: Sequence[np.ndarray]) -> None:
    """Raises unless supports of a leaf count positions in the same layers."""
    shapes = sorted({one.shape[:-1] for one in supports})
    if len(shapes) > 1:
        words = [f"{shape[0]} layers" if shape else "the whole" for shape in shapes]
        raise InputError(
            f"`adapters` must have positions in the same layers of `{leaf}`, got "
            f"{' and '.join(words)}. Train with the same `stack`."
        )


def _trained_size(adapter: Adapter, leaf: str) -> int:
    """Returns how many entries of a leaf an adapter trains."""
    empty = np.empty(0)
    return adapter.dense.get(leaf, adapter.support.get(leaf, empty)).size


def _leaves(adapter: Adapter) -> Mapping[str, np.ndarray]:
    """Returns the leaves of the base that an adapter changes."""
    return {**adapter.support, **adapter.dense}

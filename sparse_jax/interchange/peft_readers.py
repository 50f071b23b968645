"""(IA)3, SHiRA, Super-Tuning and prefixes as PEFT stores them."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from sparse_jax.adapter.adapter import Arrays
from sparse_jax.errors import InputError
from sparse_jax.interchange.peft_prefix import prefix_arrays
from sparse_jax.interchange.peft_save import WEIGHTS
from sparse_jax.interchange.peft_source import (
    PeftSource,
    Trained,
    require_shape,
    site_of,
)
from sparse_jax.interchange.peft_sparse import SparseForm, Stored, free_positions
from sparse_jax.methods.ia3 import IA3
from sparse_jax.methods.prefix import Prefix
from sparse_jax.methods.sparse import Sparse
from sparse_jax.models.attachment import MEMORY
from sparse_jax.models.hf.tensor_names import is_stacked
from sparse_jax.supports.entries import ENTRY

__all__ = ["read_ia3", "read_prefix", "sparse_reader"]


def read_ia3(source: PeftSource) -> Trained:
    """Returns (IA)3, whose vectors are rows at inputs and columns at outputs."""
    layout, config = source.model.family.layout, source.model.config
    sites: dict[str, Arrays] = {}
    for module in source.modules:
        (factor,) = module.take("ia3_l")
        width = source.shapes[module.places[0].leaf][-2]
        height = sum(source.shapes[place.leaf][-1] for place in module.places)
        is_input = factor.shape == (1, width)
        if not is_input:
            require_shape(module.name, factor.shape, (height, 1))
        for leaf, layer in module.places:
            site = site_of(leaf, module).removeprefix("layers/")
            layers, size = source.shapes[leaf][0], source.shapes[leaf][-1]
            part, size = ("input", width) if is_input else ("output", size)
            stack = sites.setdefault(site, {})
            stack.setdefault(part, np.ones((layers, size), np.float32))
            stack[part][layer] = (
                factor[0]
                if is_input
                else layout.split(f"layers/{site}/bias", factor[:, 0], config)
            )
            if len(stack) > 1:
                raise source.found.refused(
                    "feedforward_modules", f"the same in all layers at `{site}`"
                )
    rule = lambda part: tuple(
        f"^{site}$" for site in sorted(sites) if part in sites[site]
    )
    return Trained(IA3(where=rule("output"), feedforward=rule("input")), sites)


def sparse_reader(form: SparseForm) -> Callable[[PeftSource], Trained]:
    """Returns the reader of a sparse type."""

    def read(source: PeftSource) -> Trained:
        if source.found.config.get("save_precomputed_indices") is False:
            raise source.found.refused(
                "save_precomputed_indices", "true, as indices are not found again here"
            )
        base = source.need_base("it stores differences to them")
        leaves: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        for module in source.modules:
            leaf, layer = module.places[0]
            if len(module.places) > 1:
                raise InputError(
                    f"`folder` must have sparse entries of modules that are one linear "
                    f"map, got `{module.name}`, which is {len(module.places)} here. "
                    "Merge it in PEFT with `merge_and_unload`, and save that."
                )
            stored = Stored(*module.take(form.indices, form.values))
            width, height = source.shapes[leaf][-2:]
            entries = form.positions(stored, (width, height), module.name)
            leaves.setdefault(leaf, {})[layer] = entries
        density = _density(
            [
                (len(at), math.prod(source.shapes[leaf][-2:]))
                for leaf, stack in leaves.items()
                for at, _ in stack.values()
            ]
        )
        support, values = {}, {}
        for leaf, stack in leaves.items():
            whole = base.read(leaf)
            rows = whole.reshape(-1, math.prod(source.shapes[leaf][-2:]))
            count = ENTRY.size(density, rows.shape[1:2])
            pairs = [
                _padded(row, stack.get(i), count, form) for i, row in enumerate(rows)
            ]
            ours = [np.stack(part) for part in zip(*pairs, strict=True)]
            if not is_stacked(leaf):
                ours = [part[0] for part in ours]
            support[leaf], values[leaf] = ours
        where = tuple(f"^{re.escape(leaf)}$" for leaf in sorted(leaves))
        method = Sparse(density=density, where=where)
        return Trained(method, support=support, values=values)

    return read


def _density(counts: Sequence[tuple[int, int]]) -> float:
    """Returns the least density that gives every kernel its entries or more."""
    count, size = max(counts, key=lambda one: one[0] / one[1])
    density = max(count, 1) / size
    while density > 0 and ENTRY.size(
        math.nextafter(density, 0), (size,)
    ) == count != ENTRY.size(density, (size,)):
        density = math.nextafter(density, 0)
    return min(density, 1.0)


def _padded(
    row: np.ndarray,
    entries: tuple[np.ndarray, np.ndarray] | None,
    count: int,
    form: SparseForm,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and values of a kernel, filled with the base's to a count."""
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    at, deltas = nothing if entries is None else entries
    extra = free_positions(at, count)
    everything = np.concatenate([at, extra])
    order = np.argsort(everything)
    deltas = np.concatenate([deltas, np.zeros(len(extra), np.float32)])
    new = form.add(row[everything], deltas)
    # Adding zero to -0.0 makes it 0.0.
    new[len(at) :] = row[extra]
    return everything[order].astype(np.int32), new[order]


def read_prefix(source: PeftSource) -> Trained:
    """Returns a prefix."""
    tensor = source.found.tensors.get("prompt_embeddings")
    if tensor is None:
        raise InputError(
            f"`{source.found.path / WEIGHTS}` must have `prompt_embeddings`, and does "
            "not. Copy the folder again."
        )
    arrays = prefix_arrays(tensor, source.model)
    return Trained(Prefix(length=len(tensor)), {MEMORY: arrays})

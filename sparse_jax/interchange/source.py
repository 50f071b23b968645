"""An adapter and its base, which together can leave in any format."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import jax
import numpy as np

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.calculus import combine_adapters
from sparse_jax.adapter.file import ADAPTER, save_adapter
from sparse_jax.adapter.switch import AdapterSwitch
from sparse_jax.adapter.use import (
    base_folder,
    merge_adapter,
    require_base,
    swap,
    without_leaves,
)
from sparse_jax.adapter.whole import require_whole
from sparse_jax.data.glue import CAUSAL
from sparse_jax.errors import InputError, brief
from sparse_jax.interchange.open_adapter import open_one_of
from sparse_jax.interchange.patches import save_patches
from sparse_jax.interchange.peft_save import needs_base, save_peft
from sparse_jax.interchange.peft_sparse import SPARSE
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Head, Model, Params
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.labels import label_leaves, use_of_head
from sparse_jax.models.hf.pretrained import (
    base_hash,
    from_pretrained,
    new_leaves,
    read_model,
)
from sparse_jax.models.hf.read_config import read_config
from sparse_jax.models.hf.weights import rounded
from sparse_jax.params.fields import require_word
from sparse_jax.params.names import leaves_by_name
from sparse_jax.supports.positions import fetch

__all__ = [
    "DTYPES",
    "Source",
    "combine_files",
    "open_source",
    "write_delta",
    "write_patch",
    "write_peft",
]

DTYPES = ("float32", "bfloat16", "float16")


class _Outputs(TypedDict):
    """Arguments of `from_pretrained` that say what the outputs are."""

    head: Head
    num_labels: int | None
    labels: tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class Source:
    """An adapter, and the folder of its base, whose weights are not read yet."""

    adapter: Adapter
    folder: Path
    hash: str | None  # SHA-256 of the base; None if the adapter does not name one

    @functools.cached_property
    def is_causal(self) -> bool:
        """Whether the model writes texts, as a decoder does without labels."""
        adapter = self.adapter
        leaves = (*adapter.dense, *adapter.support)
        has_labels = bool(adapter.labels) or adapter.task not in ("", CAUSAL)
        has_head = any(leaf.startswith("classifier/") for leaf in leaves)
        family, _ = read_config(self.folder)
        return family.is_decoder and not (has_labels or has_head)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Labels of a classifier, none for a regression; None: those of the base."""
        adapter = self.adapter
        is_known = not self.is_causal and (adapter.labels or adapter.task)
        return adapter.labels if is_known else None

    @functools.cached_property
    def model(self) -> Model:
        """The model that was trained, without its parameters."""
        model = read_model(self.folder, **self._outputs)
        require_base(self.adapter, self.hash, model, self.folder)
        return model

    def params(self) -> Params:
        """Reads the parameters of the base, in the dtype of the training."""
        settings = self.adapter.settings
        # A head that the folder lacks is created here, and replaced by the adapter's.
        _, params = from_pretrained(
            self.folder,
            **self._outputs,
            dtype=settings.get("dtype") or "float32",
            key=jax.random.key(settings.get("seed") or 0),
        )
        return params

    def merged(self) -> Params:
        """Returns the parameters with the adapter in them."""
        model, params, adapter = self.model, self.params(), self.adapter
        about = {"new": new_leaves(model, self.folder, self.labels)}
        if adapter.added or not adapter.support:
            options = {"base_hash": self.hash, "model": model, **about}
            return merge_adapter(params, adapter, **options)
        require_whole(params, adapter, **about)
        # In place, as a copy of a large model may be more than there is room for.
        return AdapterSwitch(params, {"": adapter}).to("")

    @property
    def _outputs(self) -> _Outputs:
        """The head that was trained."""
        if self.is_causal:
            return {"head": CausalLM, "num_labels": None, "labels": None}
        made, count = Model(SequenceClassifier, *read_config(self.folder)), None
        if self.labels is None:
            # Of an adapter that names no labels, a head of its own says how many.
            heads = (self.adapter.dense.get(leaf) for leaf in label_leaves(made))
            count = next((head.shape[-1] for head in heads if head is not None), None)
        return {"head": made.head, "num_labels": count, "labels": self.labels}


def open_source(adapter: Adapter, model: str | Path | None) -> Source:
    """Finds the base of an adapter.

    Args:
      adapter: as `load_adapter` returns it.
      model: folder or id of the base; None is what the adapter names, if it is here.

    Raises:
      InputError: if there is no such model, or it is another one.
    """
    folder = base_folder(adapter, model)
    source = Source(adapter, folder, base_hash(folder) if adapter.base_hash else None)
    require_base(adapter, source.hash, folder=folder)
    return source


def combine_files(
    paths: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    *,
    head: int = 0,
    model: str | Path | None = None,
) -> int:
    """Writes the weighted sum of adapter files as one, and returns its entries.

    The arguments and errors are those of `combine_adapters`; `model` is the base, if
    it is not where the adapters say.
    """
    named, output = str(output), Path(output)
    is_adapter = output.suffix == ".safetensors"
    if not is_adapter or output.exists():
        reason = "which exists" if is_adapter else "which does not"
        raise InputError(
            f"`output` must be a new file that ends with .safetensors, got "
            f"{brief(named)}, {reason}. Choose another name."
        )
    adapters = [open_one_of("adapters", path, model) for path in paths]
    sources = [open_source(adapter, model) for adapter in adapters]
    source = sources[head]
    new = new_leaves(source.model, source.folder, source.labels)
    total = combine_adapters(source.params(), adapters, weights, new=new, head=head)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(output, total)
    return total.entries


def write_delta(source: Source, folder: Path) -> None:
    """Writes the adapter file."""
    save_adapter(folder / ADAPTER, source.adapter)


def write_peft(source: Source, folder: Path, *, peft_type: str | None = None) -> None:
    """Writes an adapter as PEFT reads it.

    Args:
      source: adapter and base.
      folder: that exists.
      peft_type: format of sparse entries; None is that of `save_peft`.

    Raises:
      InputError: as `save_peft`, or if the format is for another kind of adapter.
    """
    adapter = source.adapter
    if peft_type is not None:
        require_word("peft_type", peft_type, SPARSE)
        if not adapter.support:
            raise InputError(
                f"`peft_type` must be left out for {adapter.word!r}, which has one "
                f"form in PEFT, got {peft_type!r}."
            )
    adapter = _with_whole_head(source)
    # PEFT stores sparse entries as differences to the base, and the whole head.
    params = source.params() if needs_base(adapter, source.model) else None
    form = {} if peft_type is None else {"sparse": peft_type}
    save_peft(folder, adapter, source.model, params=params, **form)


def write_patch(source: Source, folder: Path, *, dtype: str | None = None) -> None:
    """Writes the patches that turn the base into the adapted model.

    Args:
      source: adapter and base.
      folder: that exists.
      dtype: of the weights that are served; None is that of the training.

    Raises:
      InputError: as `save_patches`, or if a value is too large for `dtype`.
    """
    adapter = _with_whole_head(source)
    if dtype is not None:
        require_word("dtype", dtype, DTYPES)
        cast = lambda arrays: {
            leaf: rounded(leaf, array, np.dtype(dtype))
            for leaf, array in arrays.items()
        }
        values, dense = cast(adapter.values), cast(adapter.dense)
        adapter = replace(adapter, values=values, dense=dense)
    save_patches(folder, adapter, source.model)


def _with_whole_head(source: Source) -> Adapter:
    """Returns an adapter with its whole head, if that of the base is another one.

    For the training its outputs were put in the order of the labels, or replaced.
    """
    adapter, labels = source.adapter, source.labels
    if labels is None:
        return adapter
    base = replace(source.model, config=read_config(source.folder)[1])
    order = use_of_head(base.config, labels).order
    head = {*label_leaves(source.model)} - {*adapter.dense}
    if not head or order == tuple(range(len(labels) or 1)):
        return adapter
    of_head = without_leaves(adapter, lambda leaf: leaf not in head)
    params, _ = swap(source.params(), of_head)
    leaves = leaves_by_name(params)
    whole = {leaf: fetch(leaves[leaf]) for leaf in sorted(head)}
    others = without_leaves(adapter, head.__contains__)
    return replace(others, dense={**others.dense, **whole})

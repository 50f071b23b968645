"""The tensors of a model's folder: which leaf each of them holds, and their values."""

import functools
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparse_jax.errors import InputError, listed
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.heads import MaskedLM
from sparse_jax.models.hf.tensor_names import (
    has_tensor,
    is_stacked,
    tensor_name,
    with_full_names,
)
from sparse_jax.models.hf.tensors import open_tensors
from sparse_jax.params.names import leaf_names, map_named

__all__ = ["Index", "HEADS", "Weights", "is_finite", "open_weights", "rounded"]

Index = tuple[slice, ...]  # of a part of an array

_log = logging.getLogger(__name__)

# Subtrees that belong to a task: a folder may come without them.
HEADS = ("classifier/", "lm_head/", "pooler/")
_FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors writes them
# What bitsandbytes, GPTQ, AWQ, FP8 and compressed-tensors keep beside their codes.
_QUANTIZED = re.compile(
    r"\.(SCB|qweight|qzeros|scales|g_idx|weight_format|weight_packed|weight_scale"
    r"|weight_zero_point|input_scale|weight\.(absmax|quant_map|quant_state\..*))$"
    r"|_scale_inv$"
)
# Constants that models of PyTorch carry along.
_BUFFERS = re.compile(r"\.(position_ids|token_type_ids|inv_freq|attn\.(masked_)?bias)$")
# Rows of a table that are compared at a time.
_ROWS = 4096
_CHECK = "Check that the weights belong to the `config.json` beside them."


@dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of a model's folder, none of them read yet."""

    folder: Path
    model: Model  # whose leaves they hold
    names: Mapping[str, str]  # the name a tensor should have -> the name it has
    files: Mapping[str, Any]  # the name it has -> the open file
    replaced: tuple[str, ...] = ()  # leaves of the head that are of no use here

    @functools.cached_property
    def missing_head(self) -> tuple[str, ...]:
        """Leaves of the head that the folder does not have, or not for this task."""
        return tuple(
            leaf
            for leaf in jax.tree.leaves(leaf_names(self.model.abstract()))
            if leaf in self.replaced
            or (
                leaf.startswith(HEADS)
                and tensor_name(self.model.family, leaf) not in self.names
            )
        )

    def check(self, shapes: Params) -> None:
        """Raises unless every leaf has its tensors, of its shape, in floating point.

        Nothing is read but the headers of the files. Tensors that no leaf takes are
        logged in one line.
        """
        taken, missing = set(), self.missing_head

        def check(leaf: str, like: jax.ShapeDtypeStruct) -> None:
            for name, shape in self._tensors_of(leaf, like.shape):
                taken.add(name)
                if leaf not in missing:
                    self._check_tensor(leaf, name, shape)

        map_named(check, shapes)
        unused = sorted({*self.names} - taken - {*self._copies.values()})
        unused = [name for name in unused if not _BUFFERS.search(name)]
        if unused and jax.process_index() == 0:
            _log.warning(
                "`%s` holds tensors that this model does not use: %s",
                self.folder, listed(unused, most=5),
            )  # fmt: skip

    def read(
        self, leaf: str, shape: tuple[int, ...], index: Index, dtype: np.dtype
    ) -> np.ndarray:
        """Reads a part of one leaf, stacked over the layers if it belongs to one.

        Raises:
          InputError: if a value is not finite.
        """
        layout, config = self.model.family.layout, self.model.config
        layers = range(1)
        if is_stacked(leaf):
            layers, index = range(shape[0])[index[0]], index[1:]
        parts = []
        for layer in layers:
            if not has_tensor(self.model.family, leaf, layer):
                parts.append(np.ones(np.empty(shape[1:])[index].shape, dtype))
                continue
            name = tensor_name(self.model.family, leaf, layer)
            found = self.names[name]
            file = self.files[found]
            if layout.part_of(leaf) is None:
                lazy = file.get_slice(found)
                part = layout.turned(leaf, lazy[layout.turned_index(leaf, index)])
            else:
                part = layout.split(leaf, file.get_tensor(found), config)[index]
            # A number too large for the dtype becomes infinite, and is reported below.
            with np.errstate(over="ignore"):
                part = part.astype(dtype, copy=False)
            if not is_finite(part):
                raise InputError(
                    f"`{leaf}` must be finite in {part.dtype}, got NaN or infinite "
                    f"values in the tensor `{found}` of `{self.folder}`. Use a "
                    "checkpoint from before its training diverged."
                )
            parts.append(part)
        return np.stack(parts) if is_stacked(leaf) else parts[0]

    def digests(self) -> dict[str, str]:
        """Returns the dtype, shape and CRC-32 of the tensors of every leaf it has."""
        found: dict[str, str] = {}

        def digest(leaf: str, like: jax.ShapeDtypeStruct) -> None:
            names = [name for name, _ in self._tensors_of(leaf, like.shape)]
            if not {*names} <= self.names.keys():
                return
            layers, crc, array = [len(names)] if is_stacked(leaf) else [], 0, None
            for name in names:
                array = self.files[self.names[name]].get_tensor(self.names[name])
                crc = zlib.crc32(np.atleast_1d(array).view(np.uint8).data, crc)
            assert array is not None
            found[leaf] = f"{array.dtype}{[*layers, *array.shape]} {crc:08x}"

        map_named(digest, self.model.abstract())
        return found

    def untied(self) -> "Weights":
        """Returns the weights of a model whose head is not tied if it differs.

        Raises:
          InputError: if the head of a masked language model differs: it cannot.
        """
        weights = self
        for name, copy in self._copies.items():
            if name not in self.names and copy in self.names:
                # Of a tied table, some files hold the last linear map only.
                names = {**weights.names, name: self.names[copy]}
                weights = replace(weights, names=names)
            elif copy in self.names and not self._are_equal(name, copy):
                weights = replace(weights, model=self._untied_model(name, copy))
        return weights

    @property
    def _copies(self) -> dict[str, str]:
        """Tensors of a tied head: the name of a tensor -> that of a second copy."""
        family = self.model.family
        words = tensor_name(family, "embeddings/word/embedding")
        if self.model.head is MaskedLM:
            bias, copy = tensor_name(family, "lm_head/bias"), family.lm_decoder
            return {words: f"{copy}.weight", bias: f"{copy}.bias"}
        is_tied = family.is_decoder and self.model.config.tied
        return {words: f"{family.names['lm_head']}.weight"} if is_tied else {}

    def _untied_model(self, name: str, copy: str) -> Model:
        """Returns the model with a head of its own, which an encoder cannot have."""
        where = f"`{self.names[copy]}` in `{self.folder}`"
        if self.model.head is MaskedLM:
            raise InputError(
                f"{where} must equal `{self.names[name]}`, and does not: a masked "
                "language model scores words by their embeddings. Remove one of them."
            )
        if jax.process_index() == 0:
            _log.warning(
                "%s differs from `%s`: they are not tied, whatever "
                "`tie_word_embeddings` says",
                where, self.names[name],
            )  # fmt: skip
        return replace(self.model, config=replace(self.model.config, tied=False))

    def _are_equal(self, first: str, second: str) -> bool:
        """Returns whether two tensors have the same shape and values."""
        pair = [self._floats(first), self._floats(second)]
        if pair[0].get_shape() != pair[1].get_shape():
            return False
        rows = pair[0].get_shape()[0]
        parts = [slice(i, min(i + _ROWS, rows)) for i in range(0, rows, _ROWS)]
        return all(
            np.array_equal(*(x[part].astype(np.float32) for x in pair))
            for part in parts
        )

    def _tensors_of(
        self, leaf: str, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields the names and shapes of the tensors that hold a leaf."""
        layers, one = (shape[0], shape[1:]) if is_stacked(leaf) else (1, shape)
        layout, config = self.model.family.layout, self.model.config
        expected = layout.tensor_shape(leaf, one, config)
        for layer in range(layers):
            if has_tensor(self.model.family, leaf, layer):
                yield tensor_name(self.model.family, leaf, layer), expected

    def _floats(self, name: str) -> Any:
        """Returns a tensor that is not read yet, if it holds floating-point numbers."""
        lazy = self.files[self.names[name]].get_slice(self.names[name])
        if (dtype := lazy.get_dtype()) not in _FLOATS:
            raise InputError(_not_floating(self.names[name], self.folder, dtype))
        return lazy

    def _check_tensor(self, leaf: str, name: str, expected: tuple[int, ...]) -> None:
        """Raises unless a tensor is there, of this shape and in floating point."""
        if name not in self.names:
            raise InputError(
                f"`model` must have the tensor `{name}` for `{leaf}`, but it has none. "
                f"{_CHECK}"
            )
        found = tuple(self._floats(name).get_shape())
        if found == expected:
            return
        remedy = _CHECK
        if leaf.startswith("classifier/") and expected[1:] == found[1:]:
            remedy = f"Pass `num_labels={found[0]}`, or a checkpoint without this head."
        raise InputError(
            f"`{name}` must have shape {list(expected)} for `{leaf}`, "
            f"got {list(found)}. {remedy}"
        )


def open_weights(folder: Path, model: Model) -> Weights:
    """Opens the tensors of a folder.

    Args:
      folder: of the model.
      model: as its `config.json` describes it. That of the result has a head of its
        own if the folder has one that differs from the word table.

    Raises:
      InputError: as `open_tensors`, or if the weights are quantized.
    """
    files = open_tensors(folder)
    for name in files:
        if _QUANTIZED.search(name):
            raise InputError(_not_floating(name, folder, "quantized weights"))
    names = with_full_names(model.family, files)
    return Weights(folder, model, names, files).untied()


def _not_floating(name: str, folder: Path, found: str) -> str:
    """Returns the message for weights that are codes for numbers."""
    return (
        f"`model` must have weights in {', '.join(_FLOATS)}, got {found} in the tensor "
        f"`{name}` of `{folder}`. Pass the checkpoint that was quantized, or load this "
        "one in transformers and save what `dequantize()` returns."
    )


def is_finite(array: np.ndarray) -> bool:
    """Returns whether an array has neither NaN nor infinite values."""
    if array.itemsize != 2:
        return bool(np.isfinite(array).all())
    # Exponents of nothing but ones, 2.5 times as fast as `isfinite` of these dtypes.
    top = np.array(np.inf, array.dtype).view(np.uint16)
    return not array.size or bool(
        np.bitwise_and(array.view(np.uint16), top).max() < top
    )


def rounded(leaf: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the values of a leaf in another dtype.

    Raises:
      InputError: naming the leaf, if one is too large for it.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        made = array.astype(dtype)
    if not is_finite(made) and is_finite(array):
        raise InputError(
            f"`dtype` must hold every value of the model, got {dtype}, which `{leaf}` "
            "has too large ones for. Pass bfloat16 or float32."
        )
    return made

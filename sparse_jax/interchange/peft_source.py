"""What the readers of PEFT's types see, and what they return."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sparse_jax.adapter.adapter import Arrays
from sparse_jax.errors import InputError
from sparse_jax.interchange.peft_folder import ModuleParts, PeftFolder
from sparse_jax.methods.method import Method
from sparse_jax.models.functional import Model
from sparse_jax.models.hf.tensor_names import is_stacked

__all__ = ["Base", "PeftSource", "Trained", "require_shape", "site_of"]


class Base(NamedTuple):
    """The parameters of the base, by leaf."""

    read: Callable[[str], np.ndarray]
    dtype: np.dtype


@dataclass(frozen=True)
class Trained:
    """What an adapter is made of, apart from leaves that were saved whole."""

    method: Method
    added: dict[str, Arrays] = field(default_factory=dict)
    support: Arrays = field(default_factory=dict)
    values: Arrays = field(default_factory=dict)
    dense: Arrays = field(default_factory=dict)


class PeftSource(NamedTuple):
    """What the readers of a type see."""

    found: PeftFolder
    model: Model
    base: Base | None
    modules: Sequence[ModuleParts]
    shapes: Mapping[str, tuple[int, ...]]  # of the leaves

    def need_base(self, why: str) -> Base:
        """Returns the base.

        Raises:
          InputError: if there is none.
        """
        if self.base is None:
            raise InputError(
                f"`params` must be the parameters of the base to read "
                f"`{self.found.path}`, got none: {why}. Pass what `from_pretrained` "
                "returned."
            )
        return self.base


def site_of(leaf: str, module: ModuleParts) -> str:
    """Returns the site of a kernel in the layers."""
    if not is_stacked(leaf):
        raise InputError(
            f"`folder` must add to linear maps of the layers only, got arrays for "
            f"`{module.name}`. Merge it in PEFT with `merge_and_unload`, and save that."
        )
    return leaf.removesuffix("/kernel")


def require_shape(name: str, found: tuple[int, ...], like: tuple[int, ...]) -> None:
    """Raises unless a tensor fits the model."""
    if found != like:
        raise InputError(
            f"`{name}` must have an array of shape {list(like)} for this model and "
            f"configuration, got {list(found)}. Pass the base that the adapter was "
            "trained on, with as many labels."
        )

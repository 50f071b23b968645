"""What a method is: which leaves it trains, and what it adds to the layers."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple, Self

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from sparse_jax.errors import InputError
from sparse_jax.models.attachment import Added, LayerValues, Module
from sparse_jax.params.fields import Json, from_json, to_json
from sparse_jax.params.names import Rule
from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.layout import Layout
from sparse_jax.supports.roles import FROZEN, SPARSE, Role, Roles, roles_of
from sparse_jax.supports.scores import Score

__all__ = ["Join", "Method", "PeftForm", "PeftPart", "refuse_to_merge"]


# Puts arrays beside each other along their last axis, as the outputs of a module lie.
Join = Callable[[Sequence[np.ndarray]], np.ndarray]
# Arrays of the parts of a module, None where nothing is added, and outputs of each
# part -> the array of the module.
Fuse = Callable[[Sequence[np.ndarray | None], Sequence[int], Join], np.ndarray]


class PeftPart(NamedTuple):
    """How PEFT stores one of the arrays that a method adds."""

    name: str  # suffix of the name of the module
    turn: Callable[[np.ndarray], np.ndarray]  # our array of one layer -> PEFT's
    # For several sites that are one module there, such as query, key and value; None
    # if PEFT's array of the module cannot say what ours say.
    fuse: Fuse | None = None


class PeftForm(NamedTuple):
    """How PEFT stores a method."""

    config: Mapping[str, Json]  # of `adapter_config.json`, with "peft_type"
    parts: Mapping[str, PeftPart]  # by the names of the added arrays
    # Fields of the configuration that are expressions of the modules at some sites.
    sites: Mapping[str, Sequence[str]] = {}
    # Number of our sites in one module -> its value in fields such as "rank_pattern".
    patterns: Callable[[int], Mapping[str, Json]] = lambda sites: {}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to fine-tune a model: hashable, without arrays.

    The base class trains nothing; each method overrides what it needs.
    """

    # Whether a model with the method is the base model before it is trained.
    starts_at_base: ClassVar[bool] = True
    # Expressions of the leaves trained in full, such as the classifier.
    dense: Rule | None = None
    # Top-level subtree whose leaves start with the layer axis [L] and which the model
    # runs through its `Attachment`; None if the model has no such stack.
    stack: str | None = "layers"

    def __post_init__(self):
        # Rules may be given as lists, which have no hash.
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))

    @property
    def ranking(self) -> Score | None:
        """What the sparse leaves are selected by, None if there are none."""
        return None

    def roles(self, params: optax.Params) -> Roles:
        """Returns the role of every leaf of the parameters."""
        return self._roles(params, where=())

    def support_size(self, role: Role) -> int:
        """Returns the entries trained in a sparse leaf, or in one layer of it."""
        return role.size

    def trained_size(self, role: Role, shape: tuple[int, ...]) -> int:
        """Returns the entries trained in a leaf of a shape, in all of its layers."""
        if role.kind == SPARSE:
            shape = role.packed_shape(shape, self.support_size(role))
        return 0 if role.kind == FROZEN else math.prod(shape)

    def added(self, params: optax.Params, key: jax.Array) -> Added:
        """Returns the new arrays of the method, leading axis [L], float32."""
        del params, key
        return {}

    def response(
        self,
        site: str,
        module: Module,
        x: jax.Array,
        added: Added,
        strength: ArrayLike = 1.0,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the output of a site in one layer, changed by the method.

        Args:
          site: name of the module inside its layer, such as "attention/query".
          module: maps x to the output of the base model; has the weights.
          x: input of the module, such as `[B, T, in]`.
          added: the slice of `added` that belongs to the layer.
          strength: shape=(), factor of what the method adds; 0 is the base model.
          key: of the layer, for dropout inside the method; None turns it off.
        """
        del site, added, strength, key
        return module(x)

    def respond(
        self,
        site: str,
        module: Module,
        x: jax.Array,
        layer: LayerValues,
        key: jax.Array | None,
    ) -> jax.Array:
        """Calls `response` as a model does, by the `response` of an `Attachment`."""
        return self.response(site, module, x, layer.added, layer.factor, key=key)

    def merge(
        self, params: optax.Params, added: Mapping[str, Mapping[str, ArrayLike]]
    ) -> optax.Params:
        """Returns parameters that alone compute what the method computes.

        Raises:
          InputError: if no parameters do, because the method is not linear.
        """
        del added
        return params

    def to_settings(self) -> dict[str, Json]:
        """Returns the fields as values of JSON: what an adapter file stores.

        Raises:
          InputError: naming the field, if a file cannot hold its value.

        Example:
          >>> Method(dense=["bias$"]).to_settings()
          {'dense': ['bias$'], 'stack': 'layers'}
        """
        return to_json(self)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Json], place: str) -> Self:
        """Returns the method whose `to_settings` these are.

        Args:
          settings: every field, by its name.
          place: what holds them, for messages.

        Raises:
          InputError: naming a setting that is missing, unknown, or breaks a rule.
        """
        return from_json(cls, settings, place)

    def to_peft(self, added: Mapping[str, Collection[str]]) -> PeftForm | None:
        """Returns how PEFT stores the added arrays, by site and part, if it can."""
        del added
        return None

    def _roles(
        self, params: optax.Params, *, where: Rule | None, layout: Layout = ENTRY
    ) -> Roles:
        """Returns the roles by the rules of this method."""
        subtrees = params if isinstance(params, Mapping) else {}
        stacked = (
            f"^{re.escape(self.stack)}/"
            if self.stack and self.stack in subtrees
            else None
        )
        rules = {"where": where, "dense": self.dense, "stacked": stacked}
        return roles_of(params, **rules, layout=layout, score=self.ranking)


def refuse_to_merge(method: Method, params: optax.Params, added: Added) -> optax.Params:
    """Returns the parameters if nothing is added, and raises otherwise.

    Raises:
      InputError: saying what to do instead.
    """
    if added:
        raise InputError(
            "`method` must be linear in its input to be merged, got "
            f"{type(method).__name__}. Keep it attached: `apply_adapter` returns the "
            "attachment that the model takes."
        )
    return params

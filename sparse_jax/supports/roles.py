"""Which leaves are trained sparsely, which in full, and which not at all."""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.errors import InputError
from sparse_jax.params.names import (
    Node,
    Rule,
    Tree,
    first_match,
    map_named,
    patterns,
    require_match,
)
from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.layout import Layout
from sparse_jax.supports.scores import Score

__all__ = [
    "DENSE",
    "FROZEN",
    "SPARSE",
    "TRAINED",
    "Role",
    "Roles",
    "is_role",
    "map_roles",
    "roles_of",
    "sides_of",
]

SPARSE, DENSE, FROZEN = "sparse", "dense", "frozen"
TRAINED = (SPARSE, DENSE)

# Positions and counts are int32.
_MOST_ENTRIES = 2**31 - 1


class Role(NamedTuple):
    """What a method does with one leaf."""

    kind: str  # SPARSE, DENSE or FROZEN
    name: str
    stacked: bool  # whether the first axis counts layers
    shape: tuple[int, ...]  # of the array, or of one layer of the stack
    layout: Layout = ENTRY  # what is chosen in a sparse leaf

    @property
    def size(self) -> int:
        """Entries of the array, or of one layer of the stack."""
        return math.prod(self.shape)

    def packed_shape(self, shape: tuple[int, ...], k: int) -> tuple[int, ...]:
        """Returns (k,), or (L, k) for a stack of L layers."""
        return (shape[0], k) if self.stacked else (k,)

    def read(self, leaf: jax.Array, support: jax.Array) -> jax.Array:
        """Returns what is trained of a leaf: the entries at its support, or all."""
        return self.layout.gather(leaf, support) if self.kind == SPARSE else leaf

    def write(
        self, leaf: jax.Array, support: jax.Array, values: jax.Array
    ) -> jax.Array:
        """Returns a leaf with what is trained of it replaced, in its own dtype."""
        if self.kind == SPARSE:
            return self.layout.scatter(leaf, support, values)
        return values.astype(leaf.dtype) if self.kind == DENSE else leaf


Roles: TypeAlias = Tree[Role]


def roles_of(
    tree: optax.Params,
    *,
    where: Rule | None = None,
    dense: Rule | None = None,
    stacked: Rule | None = None,
    layout: Layout = ENTRY,
    score: Score | None = None,
) -> Roles:
    """Returns the role of every leaf, by ordered rules over leaf names.

    `dense` comes first, then `where` (everything, if it is None), then frozen; leaves
    that do not hold floating-point numbers are frozen. Every leaf gets a role.

    Raises:
      InputError: if a pattern matches no leaf, or a sparse leaf cannot be trained in
        the layout, or ranked by the score.

    Example:
      >>> tree = {"query": jnp.zeros((4, 4)), "classifier": jnp.zeros(4)}
      >>> jax.tree.map(lambda role: role.kind, roles_of(tree, dense="classifier"),
      ...              is_leaf=lambda node: isinstance(node, Role))
      {'classifier': 'dense', 'query': 'sparse'}
    """
    kinds: dict[str, np.dtype] = {}
    map_named(lambda name, leaf: kinds.update({name: _dtype(name, leaf)}), tree)
    names = list(kinds)
    # `optax.tree.map_params` calls `init` with a placeholder that has no leaves.
    if names:
        require_match("where", where, names)
        require_match("dense", dense, names)
        require_match("stacked", stacked, names)
        _require_floats("where", where, kinds)
        _require_floats("dense", dense, kinds)
    rules = {DENSE: dense, SPARSE: ".*" if where is None else where}

    def role(name: str, leaf: jax.Array) -> Role:
        kind = first_match(rules, name, FROZEN)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.size == 0:
            kind = FROZEN
        is_stacked = first_match({"stacked": stacked}, name, "") == "stacked"
        if is_stacked and not leaf.shape:
            raise InputError(
                f"`{name}` must have an axis of layers to be stacked, got a scalar. "
                "Leave it out of `stacked`."
            )
        shape = leaf.shape[int(is_stacked) :]
        size = math.prod(shape)
        if kind == SPARSE and size > _MOST_ENTRIES:
            raise InputError(
                f"`{name}` must have fewer than 2**31 entries{' a layer' * is_stacked} "
                f"to be trained sparsely, got shape {list(leaf.shape)}. Name stacks of "
                "layers by `stacked`, or leave it out of `where`."
            )
        if kind == SPARSE:
            layout.require(name, shape)
        if kind == SPARSE and score is not None:
            score.require(name, shape)
        return Role(kind, name, is_stacked, tuple(shape), layout)

    return map_named(role, tree)


def _dtype(name: str, leaf: jax.Array) -> np.dtype:
    """Returns the dtype of a leaf, or raises if it is no array."""
    if not hasattr(leaf, "dtype"):
        raise InputError(
            f"`{name}` must be an array, got {leaf!r}. Convert it by `jnp.asarray`."
        )
    return leaf.dtype


def _require_floats(
    argument: str, rule: Rule | None, dtypes: dict[str, np.dtype]
) -> None:
    """Raises if all that an expression matches holds something else than reals."""
    for pattern in patterns(rule):
        found = [dtype for name, dtype in dtypes.items() if re.search(pattern, name)]
        if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in found):
            raise InputError(
                f"`{argument}` must match a leaf of real floating-point numbers, got "
                f"{pattern!r} for {', '.join(sorted({str(d) for d in found}))}."
            )


def is_role(node: object) -> bool:
    """Returns whether a node of a tree is a role."""
    return isinstance(node, Role)


def map_roles(
    function: Callable[..., Node],
    roles: Roles,
    *trees: object,
    only: Sequence[str] = (SPARSE, DENSE, FROZEN),
) -> Tree[Node]:
    """Maps `function(role, *leaves)` over trees that have a node for every role.

    Leaves of a kind that is not in `only` become `optax.MaskedNode()`, and may be
    that in any of the trees, so that trees of trained leaves keep the structure of
    the parameters.
    """

    def masked(role: Role, *leaves: object) -> Node | optax.MaskedNode:
        return function(role, *leaves) if role.kind in only else optax.MaskedNode()

    return jax.tree.map(masked, roles, *trees, is_leaf=is_role)


def sides_of(roles: Roles) -> tuple[Roles, Roles]:
    """Returns roles in which what is outside the layers, or inside, is frozen."""

    def side(stacked: bool) -> Roles:
        freeze = lambda role: role if role.stacked == stacked else frozen(role)
        return jax.tree.map(freeze, roles, is_leaf=is_role)

    frozen = lambda role: role._replace(kind=FROZEN)
    return side(True), side(False)

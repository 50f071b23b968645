"""Sparse: train the best-scored entries of each array, in the compact tier."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import optax

from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method
from sparse_jax.params.fields import option
from sparse_jax.params.names import Rule
from sparse_jax.supports.granularity import GRANULARITIES, granularity_named
from sparse_jax.supports.layout import Layout, require_density
from sparse_jax.supports.roles import SPARSE, Role, Roles, map_roles
from sparse_jax.supports.scores import SCORES, Score, low_rank, score_named

__all__ = ["Sparse"]

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Sparse(Method):
    """Trains k = ceil(density * n) entries of each array, or of each layer of a stack.

    With `score="gradient"` this is SIFT; the results are those of the Optax
    transformation `sift`, without its dense gradients. Both accept the same names,
    functions and layouts; a score or layout that has a name is stored by it.

    It adds no arrays, so `strength` has no effect here: to damp what was learned, as
    w0 + strength * (w - w0), would take the k initial values of each array.
    Merging is the identity: the parameters hold the trained entries.

    With `granularity="lane"` it trains ceil(density * 128) entries of every 128 rows of
    a column, for TPUs: at 5 %, according to the compiler, reading and writing them
    takes an eighth of the time of a Llama layer; single entries take six times that of
    the layer.

    With `granularity="row"` it trains ceil(density * rows) whole rows of every kernel,
    which are its inputs. In the linear layers their gradient costs that fraction of the
    dense one, which is never computed; `docs/scores.md` says where this does not hold.

    Raises:
      InputError: if `density` is outside (0, 1], there is no such score or granularity,
        `score_rank` is not for the score, or (in `roles`) an array cannot be trained by
        lanes, or lacks the rank.

    Example:
      >>> Sparse(density=0.01, where="query|value", dense="classifier").density
      0.01
    """

    density: float
    where: Rule | None = None  # Expressions of the sparse leaves; None is all others.
    # Nothing in an adapter depends on it, so it need not have a name.
    score: str | Score | Callable[..., jax.Array] = field(
        default="gradient", metadata=option(words=SCORES, is_stored=False)
    )
    granularity: str | Layout = field(
        default="entry", metadata=option(words=GRANULARITIES)
    )
    # Of "lift" and "off-principal", as of `low_rank`; earlier files have none.
    score_rank: int | None = field(default=None, metadata=option(is_stored=False))

    def __post_init__(self):
        super().__post_init__()
        # A number that can be hashed, so that a tuner can be an argument of `jit`.
        object.__setattr__(self, "density", require_density(self.density))
        score, layout = score_named(self.score), granularity_named(self.granularity)
        object.__setattr__(self, "score", _as_word(SCORES, score))
        object.__setattr__(self, "granularity", _as_word(GRANULARITIES, layout))
        if self.score_rank is not None and not score.has_rank:
            raise InputError(
                f"`score_rank` must be left out with score {self.score!r}, got "
                f"{self.score_rank!r}. It belongs to lift and off-principal."
            )
        _ = self.ranking

    @property
    def ranking(self) -> Score:
        """What the sparse leaves are selected by."""
        score = score_named(self.score)
        if self.score_rank is None:
            return score
        return low_rank(self.score_rank, lowest=score.lowest)

    def roles(self, params: optax.Params) -> Roles:
        """Returns the role of every leaf of the parameters."""
        layout = granularity_named(self.granularity)
        roles = self._roles(params, where=self.where, layout=layout)
        # A density that does not fit is found out before anything is computed.
        fits = lambda role, leaf: self.support_size(role)
        map_roles(fits, roles, params, only=(SPARSE,))
        return roles

    def support_size(self, role: Role) -> int:
        """Returns the entries trained in a sparse leaf, or in one layer of it."""
        return role.layout.size(self.density, role.shape)


def _as_word(table: Mapping[str, _T], value: _T) -> str | _T:
    """Returns the name of a value in a table, or the value if it has none."""
    return next((word for word, known in table.items() if known == value), value)

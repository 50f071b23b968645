"""When `sift` selects: after which gradients, and from which."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.params.arguments import require_count, require_whole
from sparse_jax.supports.roles import DENSE, Roles, is_role

__all__ = ["Selections"]


class Selections(NamedTuple):
    """The counts of gradients at which `sift` selects; see there.

    Example:
      >>> selections = Selections(after=2, by=3)
      >>> [bool(selections.at(count)[0]) for count in range(6)]  # collecting
      [False, False, True, True, True, False]
      >>> [bool(selections.at(count)[1]) for count in range(6)]  # due
      [False, False, False, False, True, False]
      >>> [bool(selections.waits(count)) for count in range(6)]
      [False, False, True, True, False, False]
    """

    after: int = 0
    by: int = 1
    every: int | None = None

    def require(self) -> None:
        """Raises unless there is room for all gradients between selections.

        Raises:
          InputError: naming the argument of `sift`.
        """
        require_whole("select_after", self.after)
        if self.after < 0:
            raise InputError(f"`select_after` must be at least 0, got {self.after}.")
        require_count("select_batches", self.by)
        if self.every is None:
            return
        require_count("reselect_every", self.every)
        if self.every < self.by:
            raise InputError(
                f"`reselect_every` must be at least `select_batches={self.by}`, "
                f"got {self.every}. Leave it out to select once."
            )

    def require_roles(self, roles: Roles) -> None:
        """Raises if nothing would be trained before the selection.

        Raises:
          InputError: naming the arguments of `sift`.
        """
        kinds = {role.kind for role in jax.tree.leaves(roles, is_leaf=is_role)}
        # `optax.tree.map_params` calls `init` with a placeholder that has no leaves.
        if self.after and kinds and DENSE not in kinds:
            raise InputError(
                f"`select_after` must be 0 without leaves in `dense`, got {self.after}."
                " They are what is trained before the selection."
            )

    def at(self, count: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Returns whether a gradient counts for a selection, and whether it is due.

        Args:
          count: gradients accepted before, int32.
        """
        # Updates to go until the next selection; negative once it lies behind.
        left = self.after + self.by - 1 - jnp.asarray(count)
        if self.every is not None:
            left = jnp.where(left < 0, left % self.every, left)
        return (left >= 0) & (left < self.by), left == 0

    def waits(self, count: jax.typing.ArrayLike) -> jax.Array:
        """Returns whether a gradient moves nothing, because a selection is prepared."""
        count = jnp.asarray(count)
        return (count >= self.after) & (count < self.after + self.by - 1)

    def selected(self, count: jax.typing.ArrayLike) -> jax.Array:
        """Returns whether the first selection is made with a gradient, or before."""
        return jnp.asarray(count) >= self.after + self.by - 1

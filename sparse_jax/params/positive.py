"""Numbers that must be positive."""

import math

from sparse_jax.errors import InputError

__all__ = ["require_positive"]


def require_positive(name: str, value: float, remedy: str = "") -> None:
    """Raises `InputError` unless a number is positive and finite.

    Args:
      name: of the argument.
      value: of it.
      remedy: a sentence to end the message with.

    Example:
      >>> require_positive("alpha", 16.0)
      >>> require_positive("alpha", float("inf"))
      Traceback (most recent call last):
      sparse_jax.errors.InputError: `alpha` must be positive and finite, got inf.
    """
    if not 0 < value < math.inf:
        # Zero and less break the first half of the rule, all else the second.
        rule = "positive" if value <= 0 else "positive and finite"
        end = f" {remedy}" if remedy else ""
        raise InputError(f"`{name}` must be {rule}, got {value}.{end}")

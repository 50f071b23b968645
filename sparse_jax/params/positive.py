"""Numbers that must be positive, or not negative."""

import math

from sparse_jax.errors import InputError

__all__ = ["require_not_negative", "require_positive"]


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
        raise _broken(name, value, "positive", value <= 0, remedy)


def require_not_negative(name: str, value: float) -> None:
    """Raises `InputError` unless a number is 0 or more, and finite.

    Example:
      >>> require_not_negative("eps", 0.0)
      >>> require_not_negative("eps", -1.0)
      Traceback (most recent call last):
      sparse_jax.errors.InputError: `eps` must be 0 or more, got -1.0.
    """
    if not 0 <= value < math.inf:
        raise _broken(name, value, "0 or more", value < 0)


def _broken(
    name: str, value: float, rule: str, is_too_small: bool, remedy: str = ""
) -> InputError:
    """Returns the error; of a number that is not too small, "finite" is what breaks."""
    rule = rule if is_too_small else f"{rule} and finite"
    end = f" {remedy}" if remedy else ""
    return InputError(f"`{name}` must be {rule}, got {value}.{end}")

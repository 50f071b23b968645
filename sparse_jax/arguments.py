"""Arguments: rules that several interfaces share."""

import numbers
from typing import Any

import jax

from sparse_jax.errors import InputError

__all__ = ["require_count", "require_key", "require_transformation", "require_whole"]


def require_count(argument: str, value: Any) -> None:
    """Raises unless a value is a whole number of at least one.

    Raises:
      InputError: naming the argument.

    Example:
      >>> require_count("hold", 2)
    """
    require_whole(argument, value)
    if value < 1:
        raise InputError(f"`{argument}` must be at least 1, got {value}.")


def require_whole(argument: str, value: Any) -> None:
    """Raises unless a value is a whole number that is known when a program is traced.

    Raises:
      InputError: naming the argument.

    Example:
      >>> require_whole("rank", 8)
    """
    if isinstance(value, jax.Array):
        raise InputError(
            f"`{argument}` must be static, got an array. It fixes shapes: keep "
            f"it out of `jit`, and in `static_args=({argument!r},)` of "
            "`inject_hyperparams`."
        )
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise InputError(f"`{argument}` must be a whole number, got {_short(value)}.")


def require_key(argument: str, key: Any) -> None:
    """Raises unless a value is one PRNG key, new-style or of raw uint32 numbers.

    Raises:
      InputError: naming the argument.

    Example:
      >>> require_key("key", jax.random.key(0))
      >>> require_key("key", jax.random.PRNGKey(0))
    """
    try:
        shape = jax.eval_shape(jax.random.bits, key).shape
    # Whatever JAX has to say of an object that is no key.
    except Exception:
        shape = None
    if shape != ():
        raise InputError(
            f"`{argument}` must be one PRNG key, got {_short(key)}. Pass "
            "`jax.random.key(seed)`."
        )


def require_transformation(argument: str, tx: Any) -> None:
    """Raises unless a value is an Optax transformation.

    Raises:
      InputError: naming the argument.

    Example:
      >>> import optax
      >>> require_transformation("inner", optax.adamw(1e-3))
    """
    parts = (getattr(tx, "init", None), getattr(tx, "update", None))
    if isinstance(tx, type) or not all(map(callable, parts)):
        name = getattr(tx, "__name__", None)
        remedy = f"Call it: `{name}(...)`" if name else "Pass `optax.adamw(1e-3)`"
        raise InputError(
            f"`{argument}` must be an Optax transformation, got "
            f"{f'the function `{name}`' if name else _short(tx)}. {remedy}."
        )


def _short(value: Any) -> str:
    """Returns a value for a message: of an array, its type and shape."""
    if isinstance(value, jax.Array):
        return f"an array of {value.dtype}{list(value.shape)}"
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."

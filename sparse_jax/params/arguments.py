"""Arguments: rules that several interfaces share."""

import numbers
from collections.abc import Iterable

import jax
import optax

from sparse_jax.errors import InputError, brief, reason_of

__all__ = [
    "require_count",
    "require_key",
    "require_one_device_view",
    "require_plain_update",
    "require_transformation",
    "require_whole",
]


def require_count(argument: str, value: int) -> None:
    """Raises unless a value is a whole number of at least one.

    Raises:
      InputError: naming the argument.

    Example:
      >>> require_count("hold", 2)
    """
    require_whole(argument, value)
    if value < 1:
        raise InputError(f"`{argument}` must be at least 1, got {value}.")


def require_whole(argument: str, value: object) -> None:
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


def require_key(argument: str, key: object, rule: str = "one PRNG key") -> None:
    """Raises unless a value is one PRNG key, new-style or of raw uint32 numbers.

    Args:
      argument: its name.
      key: its value.
      rule: what it must be, if that may be something else, too.

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
            f"`{argument}` must be {rule}, got {_short(key)}. Pass "
            "`jax.random.key(seed)`."
        )


def require_one_device_view(argument: str, tree: object) -> None:
    """Raises if arrays vary over the axes of a `jax.shard_map` that checks this.

    Raises:
      InputError: naming the axes.

    Example:
      >>> require_one_device_view("updates", {"w": jax.numpy.ones(2)})
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    axes = {axis for leaf in arrays for axis in _varying(jax.typeof(leaf))}
    if axes:
        raise InputError(
            f"`{argument}` must not vary over mesh axes, got {sorted(axes)}. Pass "
            "`check_vma=False` to `jax.shard_map` for one support a shard, or update "
            "outside of it for one support an array."
        )


def require_transformation(argument: str, tx: object) -> None:
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


def require_plain_update(argument: str, tx: optax.GradientTransformation) -> None:
    """Raises if the update of a transformation needs extra arguments, such as the loss.

    Raises:
      InputError: naming the argument.

    Example:
      >>> require_plain_update("optimizer", optax.adamw(1e-3))
    """
    value = jax.ShapeDtypeStruct((1,), "float32")
    try:
        jax.eval_shape(lambda x: tx.update(x, tx.init(x), x), {"w": value})
    except TypeError as error:
        if "required keyword-only argument" in str(error):
            raise InputError(
                f"`{argument}` must make updates of gradients, state and parameters "
                f"alone, got one that needs more: {reason_of(error)}. Choose another, "
                "such as `optax.adamw(1e-3)`."
            ) from error
    # One that knows the names of leaves fails here, where it must not.
    except Exception:
        return


def _varying(kind: object) -> Iterable[str]:
    """Returns the mesh axes that an array varies over, in older and newer JAX."""
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", ()) if manual is None else manual.varying


def _short(value: object) -> str:
    """Returns a value for a message: of an array, its type and shape."""
    if isinstance(value, jax.Array):
        return f"an array of {value.dtype}{list(value.shape)}"
    return brief(value)

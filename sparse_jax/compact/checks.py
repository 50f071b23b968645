"""What a tuner checks when it is made or traced; a compiled update checks nothing."""

import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.errors import InputError
from sparse_jax.models.attachment import Arrays, Attachment, LayerValues, Module
from sparse_jax.params.names import map_named

__all__ = [
    "Loss",
    "require_batches",
    "require_groups",
    "require_loss",
    "require_same",
    "sums_of",
]

# (params, batch, key, attachment) -> (sum of the losses, number they are averaged by)
Loss = Callable[..., tuple[jax.Array, jax.typing.ArrayLike]]

_SIGNATURE = "(params, batch, key, attachment) -> (total, weight)"


def require_loss(loss: object) -> None:
    """Raises unless a loss takes the four arguments of `Compact`.

    Raises:
      InputError: if it does not.

    Example:
      >>> require_loss(lambda params, batch, key, attachment: (0.0, 1))
    """
    problem = repr(type(loss).__name__)
    if callable(loss):
        problem = ""
        try:
            inspect.signature(loss).bind(*[None] * 4)
        except TypeError as error:
            problem = f"{getattr(loss, '__name__', 'a callable')!r}: {error}"
        except ValueError:
            pass  # A callable of C has no signature.
    if problem:
        raise InputError(
            f"`loss` must be a function {_SIGNATURE}, got {problem}. Take all four, "
            "and ignore those it does not need."
        )


def sums_of(
    loss: Loss,
    stack: str | None,
    params: optax.Params,
    attachment: Attachment,
    batch: object,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sums that a loss returns, as two float32 scalars.

    Raises:
      InputError: if that is not a sum and a weight, or if the model never asks its
        attachment for what is trained in the layers.
    """
    use = _UseOfStack()
    sums = loss(params, batch, key, use.watch(attachment))
    slots = attachment.slots
    values = attachment.trained if slots is None else slots.rows
    use.require(stack, bool(jax.tree.leaves(values.leaves)), values.added)
    return _two_scalars(sums)


def _two_scalars(
    sums: tuple[jax.Array, jax.typing.ArrayLike],
) -> tuple[jax.Array, jax.Array]:
    """Returns the two results of a loss, or raises if it has others."""
    is_pair = isinstance(sums, tuple | list) and len(sums) == 2
    shapes = [jnp.shape(part) for part in sums] if is_pair else None
    if shapes != [(), ()]:
        got = f"shapes {shapes}" if is_pair else jax.tree.map(jnp.shape, sums)
        raise InputError(
            f"`loss` must return two scalars, {_SIGNATURE}, got {got}. Return the sum "
            "of the losses and the number they are averaged by, such as "
            "`losses.sum(), losses.size`."
        )
    total, weight = (jnp.asarray(part) for part in sums)
    if jnp.issubdtype(total.dtype, jnp.complexfloating):
        raise InputError(
            f"`loss` must return a real total, got {total.dtype}. Take its absolute "
            "value."
        )
    return total.astype(jnp.float32), weight.astype(jnp.float32)


def require_groups(batch: object, accumulate: int) -> None:
    """Raises unless the leaves of a batch are `[accumulate, ...]`.

    Raises:
      InputError: naming the leaf.
    """
    if accumulate == 1:
        return

    remedy = "Reshape a batch of B examples to [accumulate, B / accumulate, ...]."
    _require_first(batch, accumulate, f"[accumulate={accumulate}, ...]", remedy)


def require_batches(batches: object, count: int) -> None:
    """Raises unless leaves hold as many batches as there are keys.

    Raises:
      InputError: naming the leaf.
    """

    remedy = (
        "Stack as many batches as there are keys, or pass the one key of one batch."
    )
    _require_first(batches, count, f"[{count}, ...] for {count} keys", remedy)


def _require_first(batch: object, size: int, rule: str, remedy: str) -> None:
    """Raises unless the first axis of every leaf has some size."""

    def require(name: str, leaf: jax.Array) -> None:
        shape = jnp.shape(leaf)
        if not shape or shape[0] != size:
            raise InputError(
                f"`batch` must have leaves of shape {rule}, got {list(shape)} for "
                f"`{name}`. {remedy}"
            )

    map_named(require, batch)


class _UseOfStack:
    """Notes what a model asks of an attachment while it is traced."""

    def __init__(self):
        self.weights = False
        self.sites: set[str] = set()

    def watch(self, attachment: Attachment) -> Attachment:
        """Returns an attachment that does the same and is noted."""

        def require_row(layer: LayerValues) -> None:
            if attachment.slots is not None and layer.leaves is None:
                raise InputError(
                    "`loss` must run the layers of a model by `attachment.slots`, got "
                    "a model that does not. Use `run_layers` of "
                    "`sparse_jax.models.stack`."
                )

        def weights(layer_params: Arrays, layer: LayerValues) -> Arrays:
            require_row(layer)
            self.weights = True
            return attachment.weights(layer_params, layer)

        def response(
            site: str,
            module: Module,
            x: jax.Array,
            layer: LayerValues,
            key: jax.Array | None,
        ) -> jax.Array:
            require_row(layer)
            self.sites.add(site)
            return attachment.response(site, module, x, layer, key)

        return attachment._replace(weights=weights, response=response)

    def require(
        self, stack: str | None, needs_weights: bool, added: Mapping[str, object]
    ) -> None:
        """Raises if what is trained in the layers was never asked for."""
        if needs_weights and not self.weights:
            raise InputError(
                "`loss` must hand `attachment` on to a model that asks for the weights "
                f"of its layers, got one that never did: nothing in `{stack}` would be "
                "trained. Call `attachment.weights(layer_params, trained[l])` in every "
                "layer, or pass `stack=None` to the method."
            )
        if missing := sorted({*added} - self.sites):
            raise InputError(
                "`loss` must hand `attachment` on to a model that asks for the "
                f"response of every site of the method, got none for {missing[0]!r}. "
                "Call `attachment.response(site, module, x, trained[l], key)` in every "
                "layer, or leave the site out of `where`."
            )


def require_same(part: str, found: object, expected: object) -> None:
    """Raises unless the arrays of a part of a state have the expected shapes.

    Raises:
      InputError: if the method or the optimizer is another.
    """
    shapes = lambda tree: [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
    same = jax.tree.structure(found) == jax.tree.structure(expected)
    if expected is not None and not (same and shapes(found) == shapes(expected)):
        raise InputError(
            f"`state` must be one of this tuner, got other arrays in its `{part}`. "
            "Start with `init` and `select` of a tuner with the same `method` and `tx`."
        )

"""The method behind an adapter file: what its arrays mean."""

from collections.abc import Callable
from typing import Any

from sparse_jax.adapter_file import Adapter
from sparse_jax.adapters.bottleneck import Bottleneck
from sparse_jax.adapters.dora import DoRA
from sparse_jax.adapters.ia3 import IA3
from sparse_jax.adapters.lora import LoRA
from sparse_jax.adapters.method import Method
from sparse_jax.adapters.parallel import Parallel
from sparse_jax.adapters.prefix import Prefix
from sparse_jax.adapters.series import Series
from sparse_jax.errors import InputError
from sparse_jax.models.activations import ACTIVATIONS

__all__ = ["method_of_adapter"]


def method_of_adapter(adapter: Adapter) -> Method:
    """Returns the method whose `response` and `merge` an adapter needs.

    Raises:
      InputError: if the adapter adds arrays by a method, or an activation, that is
        not known.

    Example:
      >>> import numpy as np
      >>> pair = {"a": np.zeros((2, 3, 4)), "b": np.zeros((2, 4, 3))}
      >>> settings = {"alpha": 16.0}
      >>> adapter = Adapter(added={"mlp/up": pair}, method="lora", settings=settings)
      >>> method_of_adapter(adapter)
      LoRA(dense=None, stack='layers', rank=4, where='attention', alpha=16.0, \
rslora=False, dropout=0.0)
    """
    if not adapter.added:
        return Method()
    return _named("method", adapter.method, _METHODS)(adapter)


def _low_rank(kind: type[LoRA]) -> Callable[[Adapter], Method]:
    """Returns the maker of a method with thin matrices A and B."""
    # Files of before these options do not have them.
    return lambda adapter: kind(
        rank=_first(adapter)["a"].shape[-1],
        alpha=adapter.settings.get("alpha"),
        rslora=bool(adapter.settings.get("rslora")),
        dropout=adapter.settings.get("dropout") or 0.0,
    )


def _bottleneck(kind: type[Bottleneck]) -> Callable[[Adapter], Method]:
    """Returns the maker of a method with a bottleneck."""
    return lambda adapter: kind(
        size=_first(adapter)["up"].shape[-2],
        activation=_named(
            "activation", adapter.settings.get("activation") or "relu", ACTIVATIONS
        ),
        scale=adapter.settings.get("scale") or 1.0,
    )


# word -> maker
_METHODS: dict[str, Callable[[Adapter], Method]] = {
    "lora": _low_rank(LoRA),
    "dora": _low_rank(DoRA),
    "series": _bottleneck(Series),
    "parallel": _bottleneck(Parallel),
    "ia3": lambda adapter: IA3(),
    "prefix": lambda adapter: Prefix(length=_first(adapter)["keys"].shape[-2]),
}


def _first(adapter: Adapter) -> Any:
    """Returns the arrays of one site."""
    return next(iter(adapter.added.values()))


def _named(setting: str, word: str, table: Any) -> Any:
    """Returns the value of a word in a table."""
    if word not in table:
        raise InputError(
            f"`{setting}` of the adapter must be one of {', '.join(table)}, got "
            f"{word!r}. Read it with the version that wrote it."
        )
    return table[word]

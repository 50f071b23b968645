"""Rows of the table of methods: by their name, an object, or what options fix."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparse_jax.errors import InputError, brief
from sparse_jax.methods.registry import METHODS, Entry

# JAX takes seconds to import, and the help of the command line reads this table.
if TYPE_CHECKING:
    from sparse_jax.methods.method import Method

__all__ = ["entry_of", "learning_rate_of", "learning_rates", "word_of"]


def learning_rates() -> str:
    """Returns the learning rates of all methods, for a help text."""
    rates = {entry.learning_rate for entry in METHODS.values()}
    words = lambda rate: [w for w, e in METHODS.items() if e.learning_rate == rate]
    return "; ".join(f"{rate:g} for {', '.join(words(rate))}" for rate in sorted(rates))


def learning_rate_of(method: "str | Method", options: Mapping[str, Any]) -> float:
    """Returns the usual peak learning rate of a method with some options.

    It is that of the row which fixes what the options say: that of `random` for `sift`
    with the score "random".

    Args:
      method: its name, or an object, which has its own options.
      options: by their names.

    Example:
      >>> learning_rate_of("sift", {"score": "random"})
      0.002
    """
    if not isinstance(method, str):
        return METHODS[word_of(method)].learning_rate
    entry, same = METHODS[method], []
    for one in METHODS.values():
        fixed = {name: one.defaults[name] for name in one.fixed}
        if one.path == entry.path and fixed and fixed.items() <= options.items():
            same.append(one)
    return (same or [entry])[0].learning_rate


def word_of(method: "Method") -> str:
    """Returns the name of a method: the first of its class that has its defaults.

    Raises:
      InputError: if its class is not registered.

    Example:
      >>> from sparse_jax import Sparse
      >>> word_of(Sparse(density=0.1)), word_of(Sparse(density=0.1, score="random"))
      ('sift', 'random')
    """
    entries = [one for one in METHODS.values() if one.kind is type(method)]
    if not entries:
        raise InputError(
            f"`method` must be of a registered class, got {type(method).__name__}. "
            "Register it with `register_method`."
        )
    for entry in sorted(entries, key=lambda entry: -len(entry.fixed)):
        if entry.changed_by(method) is None:
            return entry.word
    return entries[0].word


def entry_of(word: str, place: str) -> Entry:
    """Returns the row of a name in the table of methods.

    Raises:
      InputError: if there is none.
    """
    if word not in METHODS:
        raise InputError(
            f"`method` in {place} must be one of {', '.join(METHODS)}, got "
            f"{brief(word)}. Register it with `register_method`, or read the file with "
            "the version that wrote it."
        )
    return METHODS[word]

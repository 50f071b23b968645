"""Adapter files of format 1: they hold the command line's options of the method."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparse_jax.errors import InputError
from sparse_jax.methods.lookup import entry_of
from sparse_jax.methods.method import Method
from sparse_jax.methods.registry import METHODS
from sparse_jax.params.fields import Json, fields_of, read_json

__all__ = ["FORMAT_1", "method_of_format_1"]

FORMAT_1 = "sparse_jax adapter 1"

# Options that came after the first files. Those lack them, and mean the defaults.
_LATER = ("alpha", "rslora", "dropout", "granularity", "score", "score_rank")


def method_of_format_1(
    word: str,
    settings: Mapping[str, Json],
    dense: Sequence[str],
    *,
    has_added: bool,
    has_head: bool,
    place: str,
) -> Method:
    """Returns the method of a file, or `Method()` if it does not say enough.

    Args:
      word: name of the method.
      settings: of the method and its run.
      dense: names of the leaves that it holds as a whole.
      has_added: whether it holds arrays that a method adds.
      has_head: whether its task has a head, which is trained in full by default.
      place: the file, for messages.

    Raises:
      InputError: if the method is not known, or a setting that says what the arrays
        mean is missing or of a wrong type.
    """
    is_of_run = "dense" in settings  # `finetune` always wrote it.
    if word not in METHODS and not has_added and not is_of_run:
        return Method()
    entry = entry_of(word, place)
    if not is_of_run and not entry.adds_arrays:
        return Method()
    fields = {one.name: one for one in fields_of(entry.kind)}
    given = {
        name: read_json(one, settings[name], place)
        for name, one in fields.items()
        if settings.get(name) is not None
    }
    for name in entry.options:
        if name not in settings and name not in _LATER:
            raise InputError(
                f"`settings` in {place} must have `{name}`, which its method {word} "
                "needs, and does not. Copy it again; if it was made by hand, make it "
                "again with the method itself instead of its name."
            )
    head = ["^classifier/"] if has_head else []
    if not is_of_run:
        head = [f"^{re.escape(leaf)}$" for leaf in dense]
    method = entry.make(given, head)
    # Fields that are no options, such as the factor of a bottleneck.
    more = [name for name in given if name not in (*entry.options, "dense")]
    return replace(method, **{name: given[name] for name in more})

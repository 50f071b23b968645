"""The table of methods: their words, classes, learning rates and usual options."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from types import MappingProxyType
from typing import Any

from sparse_jax.errors import InputError, brief
from sparse_jax.methods.bottlenecks import Parallel, Series
from sparse_jax.methods.dense import Dense
from sparse_jax.methods.ia3 import IA3
from sparse_jax.methods.lora import DoRA, LoRA
from sparse_jax.methods.method import Method
from sparse_jax.methods.prefix import Prefix
from sparse_jax.methods.sparse import Sparse
from sparse_jax.params.fields import Option, fields_of
from sparse_jax.supports.scores import SCORES

__all__ = ["METHODS", "Entry", "register_method", "word_of"]


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
      word: of the command line and of files.
      kind: class of the method.
      learning_rate: peak that is usual.
      help: one sentence.
      defaults: values of fields where a run says nothing; by field.
      dense: rules of what is trained in full, in place of the head.
      also_dense: rules of what is trained in full beside the head.
    """

    word: str
    kind: type[Method]
    learning_rate: float
    help: str
    defaults: Mapping[str, Any]
    dense: tuple[str, ...]
    also_dense: tuple[str, ...]

    @property
    def options(self) -> Mapping[str, Option]:
        """The options of the command line by their names, with the defaults here.

        Example:
          >>> METHODS["prefix"].options["prefix_length"].default
          16
        """
        return {
            one.name: one._replace(default=self.defaults.get(one.field, one.default))
            for one in fields_of(self.kind)
            if one.help
        }

    def make(self, options: Mapping[str, Any], head: Sequence[str] = ()) -> Method:
        """Returns the method that options ask for.

        Args:
          options: values by the names of options, or the words of values; None stands
            for the default. `dense`, the rules of what is trained in full, replaces
            the head.
          head: rules of the head of a task.

        Raises:
          InputError: naming an option, if its value breaks a rule.

        Example:
          >>> METHODS["lora"].make({"rank": 4}, ["^classifier/"]).dense
          ('^classifier/',)
          >>> METHODS["bitfit"].make({}, ["^classifier/"]).dense
          ('bias$', '^classifier/')
        """
        values = dict(self.defaults)
        for name, one in self.options.items():
            if options.get(name) is not None:
                values[one.field] = one.read(options[name])
            elif one.default is MISSING:
                raise InputError(
                    f"`{name}` must be given with method {self.word!r}, got none."
                )
        dense = options.get("dense") or self.dense or head
        return self.kind(**values, dense=(*self.also_dense, *dense))


_METHODS: dict[str, Entry] = {}
# word -> its line, in the order of registration
METHODS: Mapping[str, Entry] = MappingProxyType(_METHODS)


def register_method(
    word: str,
    kind: type[Method],
    *,
    learning_rate: float,
    help: str = "",
    dense: Sequence[str] = (),
    also_dense: Sequence[str] = (),
    **defaults: Any,
) -> None:
    """Gives a class of methods a word, by which runs and adapter files name it.

    Fields made with `option(...)` become options; every field is stored in adapters.

    Args:
      word: lower-case letters, digits and underscores.
      kind: a frozen dataclass, a subclass of `Method`.
      learning_rate: peak that is usual.
      help: one sentence; without one it is the first of the class.
      dense: rules of what is trained in full, in place of the head of a task.
      also_dense: rules of what is trained in full beside it.
      **defaults: values of fields where a run says nothing.

    Raises:
      InputError: if the word is taken or cannot be one, the class is no method, or it
        has no such field.

    Example:
      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True, kw_only=True)
      ... class Norms(Method):
      ...     '''Trains the norms and the head.'''
      >>> register_method("norms", Norms, learning_rate=1e-3, also_dense=["norm/"])
      >>> METHODS["norms"].make({}, ["^classifier/"]).dense
      ('norm/', '^classifier/')
    """
    if not re.fullmatch("[a-z0-9_]+", word) or word in _METHODS:
        raise InputError(
            "`word` must be new, and of lower-case letters, digits and underscores, "
            f"got {word!r}. Words are {', '.join(_METHODS)}."
        )
    if not (inspect.isclass(kind) and issubclass(kind, Method) and is_dataclass(kind)):
        raise InputError(
            f"`kind` must be a dataclass and a subclass of `Method`, got {brief(kind)}."
        )
    names = {one.field for one in fields_of(kind)}
    if unknown := sorted({*defaults} - names):
        raise InputError(
            f"`{unknown[0]}` must be a field of `{kind.__name__}`, which has "
            f"{', '.join(sorted(names))}."
        )
    first = (inspect.getdoc(kind) or "").partition("\n")[0]
    _METHODS[word] = Entry(
        word, kind, learning_rate, help or first, defaults, (*dense,), (*also_dense,)
    )


def word_of(method: Method) -> str:
    """Returns the word of a method: the first of its class that has its defaults.

    Raises:
      InputError: if its class has no word.

    Example:
      >>> word_of(Sparse(density=0.1, rank_by=SCORES["random"]))
      'random'
    """
    entries = [one for one in _METHODS.values() if one.kind is type(method)]
    if not entries:
        raise InputError(
            f"`method` must be of a class with a word, got {type(method).__name__}. "
            "Give it one by `register_method`."
        )
    for entry in entries:
        fixed = {*entry.defaults} - {one.field for one in entry.options.values()}
        if all(getattr(method, name) == entry.defaults[name] for name in fixed):
            return entry.word
    return entries[0].word


# The maps that the paper adapts in its GLUE experiments.
_MAPS = "attention/(query|key|value|output)"
_AT_MAPS: dict[str, Any] = {"rank": 8, "where": (f"^{_MAPS}$",)}
_IN_MAPS: dict[str, Any] = {"density": 0.008, "where": (f"^layers/{_MAPS}/",)}

# Learning rates found by nobody's grid but usual; a few sparse entries want larger
# steps than all.
register_method(
    "full", Dense, learning_rate=3e-5, dense=(".*",), help="Trains all parameters."
)
register_method("head", Dense, learning_rate=1e-3, help="Trains the head alone.")
register_method(
    "bitfit", Dense, learning_rate=1e-3, also_dense=("bias$",),
    help="Trains the biases and the head.",
)  # fmt: skip
register_method("lora", LoRA, learning_rate=1e-3, **_AT_MAPS)
register_method("dora", DoRA, learning_rate=1e-3, **_AT_MAPS)
register_method("series", Series, learning_rate=1e-3, size=64)
register_method("parallel", Parallel, learning_rate=1e-3, size=64)
register_method("ia3", IA3, learning_rate=3e-3)
register_method("prefix", Prefix, learning_rate=1e-2, length=16)
register_method(
    "sift", Sparse, learning_rate=7e-4, rank_by=SCORES["gradient"], **_IN_MAPS
)
register_method(
    "random", Sparse, learning_rate=7e-4, rank_by=SCORES["random"], **_IN_MAPS
)
register_method(
    "magnitude", Sparse, learning_rate=7e-4, rank_by=SCORES["magnitude"], **_IN_MAPS
)

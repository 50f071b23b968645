"""The table of methods: their names, classes, learning rates and default options."""

import inspect
import numbers
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from sparse_jax.errors import InputError, brief, reason_of
from sparse_jax.params.fields import (
    Option,
    fields_of,
    require_new,
    require_word,
    setting,
)
from sparse_jax.params.positive import require_positive

# JAX takes seconds to import, and the help of the command line reads this table.
if TYPE_CHECKING:
    from sparse_jax.methods.method import Method

__all__ = [
    "METHODS",
    "USUAL",
    "Entry",
    "MethodOptions",
    "register_method",
    "require_method_has",
]

SIZE, PREFIX_LENGTH = 64, 16  # of the methods that add arrays of a width
# What options with the name of a method are if they are left out; objects have theirs.
USUAL: dict[str, Any] = {
    "density": 0.008, "granularity": "entry", "score": "gradient", "rank": 8,
    "rslora": False,
}  # fmt: skip
_usual = lambda name, text: setting(None, text, str(USUAL[name]))


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The options of methods in a run: fields of their classes, by name."""

    density: float | None = _usual(
        "density", "Fraction of the entries that sparse methods train."
    )
    granularity: str | None = _usual(
        "granularity",
        "What sparse methods select: single entries (entry, or entry16 to store their "
        "positions in two bytes instead of four), the same number of entries in every "
        "128 rows of a column (lane, for TPUs), or blocks: row or column of a kernel, "
        "4x4, 256x256.",
    )
    score: str | None = _usual(
        "score",
        "What sift ranks entries by: gradient, normalized, magnitude, "
        "gradient/magnitude, random, lift, off-principal, smallest-magnitude, snip, "
        "fisher, smallest-fisher, or a score added with `register_score`.",
    )
    score_rank: int | None = setting(
        None,
        "Rank of the approximation that low-rank scores rank entries by.",
        "that of a LoRA with as many parameters",
    )
    rank: int | None = _usual("rank", "Rank of lora and dora.")
    alpha: float | None = setting(
        None, "Scale of lora and dora: alpha / rank.", "twice the rank"
    )
    rslora: bool | None = setting(None, "Scale by alpha / sqrt(rank) instead.")
    dropout: float | None = setting(
        None, "Dropout rate on the input of lora and dora.", "0"
    )
    size: int | None = setting(
        None, "Bottleneck width of series and parallel.", f"{SIZE}"
    )
    activation: str | None = setting(
        None,
        "Activation of series and parallel: relu, gelu, silu or tanh.",
        "relu",
    )
    prefix_length: int | None = setting(
        None,
        "Prefix tokens (keys and values) that prefix adds to every layer.",
        f"{PREFIX_LENGTH}",
    )
    where: tuple[str, ...] | None = setting(
        None,
        "Regular expression of the parameters that a sparse method trains, or of the "
        "modules that other methods adapt; may be repeated.",
        "attention query, key, value and output; series: attention/output and "
        "mlp/down; parallel: mlp/down; ia3: key and value, and the input of mlp/down",
    )

    def require_method_options(self, method: "str | Method") -> None:
        """Raises `InputError` if an option breaks its rule, or `method` lacks it."""
        is_word = isinstance(method, str)
        for name in ("rank", "alpha", "size", "prefix_length", "score_rank"):
            value = getattr(self, name)
            if value is not None:
                require_positive(name, value)
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(
                f"`density` must be in (0, 1], got {self.density}. It is the fraction "
                "of entries trained, so training 1% of them is 0.01."
            )
        for one in fields(MethodOptions):
            value, usual = getattr(self, one.name), USUAL.get(one.name)
            # Programs that compare methods by name may share a density and a rank.
            is_free = value == usual or one.name in ("density", "rank")
            if value is not None and not (is_word and is_free):
                require_method_has(one.name, value, method)
        if isinstance(method, str):
            for one in METHODS[method].options.values():
                value = getattr(self, one.name, None)
                # Only words can be in `config.json`.
                if one.words is not None and value is not None:
                    require_word(one.name, value, one.words)
            METHODS[method].make(vars(self))


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
      word: name on the command line and in files.
      path: class of the method, or module:class to import when it is used.
      learning_rate: usual peak learning rate.
      defaults: default values of fields, or their names, by field.
      dense: rules of what is trained in full, in place of the head.
      also_dense: rules of what is trained in full beside the head.
      fixed: fields that are no options, such as the score of `random`.
    """

    word: str
    path: "type[Method] | str"
    learning_rate: float
    defaults: Mapping[str, Any]
    dense: tuple[str, ...]
    also_dense: tuple[str, ...]
    fixed: tuple[str, ...]

    @property
    def kind(self) -> "type[Method]":
        """Class of the method."""
        if isinstance(self.path, str):
            return pkgutil.resolve_name(self.path)
        return self.path

    @property
    def values(self) -> Mapping[str, Any]:
        """Default values of fields, by field."""
        known = {one.field: one for one in fields_of(self.kind)}
        return {name: known[name].read(word) for name, word in self.defaults.items()}

    @property
    def adds_arrays(self) -> bool:
        """Whether it adds arrays to the layers, whose meaning its settings say."""
        from sparse_jax.methods.method import Method

        return self.kind.added is not Method.added

    @property
    def options(self) -> Mapping[str, Option]:
        """The options of the command line by their names, with the defaults here.

        Example:
          >>> METHODS["prefix"].options["prefix_length"].default
          16
        """
        known, found = {one.name for one in fields(MethodOptions)}, {}
        for one in fields_of(self.kind):
            if (one.help or one.name in known) and one.field not in self.fixed:
                default = USUAL.get(one.name, one.default)
                default = self.defaults.get(one.field, default)
                found[one.name] = one._replace(default=default)
        return found

    def make(self, options: Mapping[str, Any], head: Sequence[str] = ()) -> "Method":
        """Returns the method that options ask for.

        Args:
          options: values by the names of options, or the names of values; None
            or an empty list is the default. `dense`, the rules of what is trained in
            full, replaces the head.
          head: rules of the head of a task.

        Raises:
          InputError: naming an option, if its value breaks a rule.

        Example:
          >>> METHODS["lora"].make({"rank": 4}, ["^classifier/"]).dense
          ('^classifier/',)
          >>> METHODS["bitfit"].make({}, ["^classifier/"]).dense
          ('bias$', '^classifier/')
        """
        values = dict(self.values)
        for name, one in self.options.items():
            given = options.get(name)
            value = one.default if given in (None, (), []) else given
            if value is MISSING:
                raise InputError(
                    f"`{name}` must be given with method {self.word!r}, got none."
                )
            values[one.field] = one.read(value)
        dense = _texts("dense", options.get("dense") or self.dense or head)
        return self.kind(**values, dense=(*self.also_dense, *dense))

    def changed_by(self, method: "Method") -> str | None:
        """Returns a fixed field that has another value in a method, if there is one."""
        either = {name: (self.defaults[name], self.values[name]) for name in self.fixed}
        return next((x for x in either if getattr(method, x) not in either[x]), None)


# name -> its row, in the order of registration
METHODS: dict[str, Entry] = {}


def register_method(
    word: str,
    kind: "type[Method] | str",
    *,
    learning_rate: float,
    dense: str | Sequence[str] = (),
    also_dense: str | Sequence[str] = (),
    fixed: str | Sequence[str] = (),
    **defaults: Any,
) -> None:
    """Registers a class of methods under a name, for runs and adapter files.

    Fields made with `option(...)` become options; every field is stored in adapters.

    Args:
      word: its name: lower-case letters, digits, `_`, `-` and `/`.
      kind: a frozen dataclass, a subclass of `Method`; or module:class to import.
      learning_rate: usual peak learning rate.
      dense: rules of what is trained in full, in place of the head of a task.
      also_dense: rules of what is trained in full beside it.
      fixed: which of `defaults` are fixed, so that they are no options.
      **defaults: default values of fields, or their names.

    Raises:
      InputError: if the name is taken or invalid, the class is no method or has no
        such field, or the learning rate is not positive.

    Example:
      >>> from dataclasses import dataclass
      >>> from sparse_jax import Method
      >>> @dataclass(frozen=True, kw_only=True)
      ... class Norms(Method):
      ...     '''Trains the norms and the head.'''
      >>> register_method("norms", Norms, learning_rate=1e-3, also_dense=["norm/"])
      >>> METHODS["norms"].make({}, ["^classifier/"]).dense
      ('norm/', '^classifier/')
      >>> del METHODS["norms"]
    """
    require_new(word, METHODS)
    if unknown := [one for one in _texts("fixed", fixed) if one not in defaults]:
        raise InputError(
            f"`fixed` must be names of fields that are given here, got {unknown[0]!r}. "
            "Pass its value as well."
        )
    # A bool is a number of Python, and never a learning rate.
    is_number = isinstance(learning_rate, numbers.Real) and learning_rate is not True
    if not (is_number and 0 < learning_rate < 1e300):
        raise InputError(
            f"`learning_rate` must be positive and finite, got {brief(learning_rate)}. "
            "It is the usual peak learning rate of the method, commonly 1e-3."
        )
    # The classes of this folder are imported when they are used: they take JAX along.
    if word not in _BUILT_IN:
        kind = _imported(kind) if isinstance(kind, str) else kind
        _require_kind(kind, defaults)
    METHODS[word] = Entry(
        word, kind, float(learning_rate), defaults, _texts("dense", dense),
        _texts("also_dense", also_dense), _texts("fixed", fixed),
    )  # fmt: skip


def _texts(argument: str, texts: str | Sequence[str]) -> tuple[str, ...]:
    """Returns texts as a tuple; one alone is no sequence of letters."""
    texts = (texts,) if isinstance(texts, str) else texts
    if isinstance(texts, Sequence) and all(isinstance(one, str) for one in texts):
        return tuple(texts)
    raise InputError(
        f"`{argument}` must be a text, or a sequence of them, got {brief(texts)}."
    )


def _imported(path: str) -> Any:
    """Returns what a user's module:class names."""
    try:
        return pkgutil.resolve_name(path)
    # The module may raise anything at all.
    except Exception as error:
        raise InputError(
            f"`kind` must be a class, or module:class that can be imported, got "
            f"{brief(path)}: {reason_of(error)}."
        ) from error


def _require_kind(kind: object, defaults: Mapping[str, Any]) -> None:
    """Raises unless an object is a class of methods that has some fields."""
    from sparse_jax.methods.method import Method

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


def require_method_has(name: str, value: object, method: "str | Method") -> None:
    """Raises `InputError` unless a method has an option; an object has none."""
    if isinstance(method, str) and name in METHODS[method].options:
        return
    owners = [word for word, entry in METHODS.items() if name in entry.options]
    remedy = "; use `dense` to choose whole parameters" if name == "where" else ""
    remedy = f"It belongs to {', '.join(owners)}{remedy}"
    if not isinstance(method, str):
        remedy = "An object has its own options: set it there"
    raise InputError(
        f"`{name}` must be left out with method {brief(method)}, got {brief(value)}. "
        f"{remedy}."
    )


# The maps that the paper adapts in its GLUE experiments.
_MAPS = "attention/(query|key|value|output)"
_AT_MAPS = {"where": (f"^{_MAPS}$",)}
_IN_MAPS = {"where": (f"^layers/{_MAPS}/",)}
_FIXED_SCORE = {**_IN_MAPS, "fixed": ("score",)}

# name -> class in this folder, learning rate, other arguments of `register_method`.
# The learning rates are common ones, not tuned by a grid search; a few sparse entries
# need larger steps than all, and random ones still larger (STS-B with MiniLM at 5 %: a
# Pearson correlation of 0.78 at 2e-3).
_BUILT_IN: dict[str, tuple[str, float, dict[str, Any]]] = {
    "full": ("dense:Dense", 3e-5, {"dense": (".*",)}),
    "head": ("dense:Dense", 1e-3, {}),
    "bitfit": ("dense:Dense", 1e-3, {"also_dense": ("bias$",)}),
    "lora": ("lora:LoRA", 1e-3, _AT_MAPS),
    "dora": ("lora:DoRA", 1e-3, _AT_MAPS),
    "series": ("bottlenecks:Series", 1e-3, {"size": SIZE}),
    "parallel": ("bottlenecks:Parallel", 1e-3, {"size": SIZE}),
    "ia3": ("ia3:IA3", 3e-3, {}),
    "prefix": ("prefix:Prefix", 1e-2, {"length": PREFIX_LENGTH}),
    "sift": ("sparse:Sparse", 7e-4, _IN_MAPS),
    "lift": ("sparse:Sparse", 7e-4, {**_FIXED_SCORE, "score": "lift"}),
    "random": ("sparse:Sparse", 2e-3, {**_FIXED_SCORE, "score": "random"}),
    "magnitude": ("sparse:Sparse", 7e-4, {**_FIXED_SCORE, "score": "magnitude"}),
}
for _word, (_class, _rate, _more) in _BUILT_IN.items():
    register_method(_word, f"{__package__}.{_class}", learning_rate=_rate, **_more)

"""The table of samplers: their names, classes and options."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_jax.errors import InputError, brief
from sparse_jax.params.fields import one_of, require_new, require_word, setting
from sparse_jax.params.positive import require_positive

# JAX takes seconds to import, and the help of the command line reads this table.
if TYPE_CHECKING:
    from sparse_jax.samplers.sampler import Sampler

__all__ = [
    "SAMPLERS",
    "SamplerEntry",
    "SamplerOptions",
    "make_sampler",
    "num_active",
    "options_of_sampler",
    "register_sampler",
    "require_no_measuring",
    "require_sampler_has",
    "sampler_class",
    "word_of_sampler",
]

RECOMPUTE = ("none", "frozen", "all")
# Options of every run that trains a few layers at a time, whatever the sampler.
_OF_ALL = ("restart_layers", "recompute")


class SamplerEntry(NamedTuple):
    """A row of the table."""

    kind: "type[Sampler] | str"  # the class, or module:class to import when it is used
    help: str  # a few words for `--help`
    options: tuple[str, ...]  # fields of `SamplerOptions` that its `fitted` takes
    required: tuple[str, ...] = ()  # those of them that have no default


SAMPLERS = {
    "ist": SamplerEntry(
        "sparse_jax.samplers.importance:Importance",
        "by an importance learned from probes of the loss",
        ("active", "hold", "probe_every", "importance_rate", "normalize_rewards"),
    ),
    "uniform": SamplerEntry(
        "sparse_jax.samplers.simple:Uniform", "at random", ("active", "hold")
    ),
    "cyclic": SamplerEntry(
        "sparse_jax.samplers.simple:Cyclic", "in turn", ("active", "hold")
    ),
    "fixed": SamplerEntry(
        "sparse_jax.samplers.simple:Fixed",
        "at random with probabilities --layer-weights",
        ("active", "hold", "layer_weights"),
        required=("layer_weights",),
    ),
    "static": SamplerEntry(
        "sparse_jax.samplers.simple:Static",
        "by you, with --layers",
        ("layers",),
        required=("layers",),
    ),
    "norm": SamplerEntry(
        "sparse_jax.samplers.gradient_norm:GradientNorm",
        "by gradient norm",
        ("active", "hold"),
    ),
    "middle": SamplerEntry(
        "sparse_jax.samplers.simple:Middle", "from the middle of the stack", ("active",)
    ),
    "cka": SamplerEntry(
        "sparse_jax.samplers.measured:CKA",
        "by how much they change the hidden states",
        ("active",),
    ),
    "spectral": SamplerEntry(
        "sparse_jax.samplers.measured:Spectral",
        "by how far their weights are from noise",
        ("active",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """The options of runs that train a few layers at a time."""

    active: float = setting(0.25, "Fraction of the layers trained per update.")
    hold: int = setting(1, "Updates between draws of the active layers.")
    layers: tuple[int, ...] | None = setting(
        None,
        "Layer that the sampler static trains, counted from 0; may be repeated.",
        "none",
    )
    layer_weights: tuple[float, ...] | None = setting(
        None,
        "Weight of a layer for the sampler fixed; repeat it once for every layer.",
        "none",
    )
    probe_every: int = setting(10, "Updates between probes of the layers by ist.")
    importance_rate: float = setting(10.0, "Step size of the importance scores of ist.")
    normalize_rewards: bool = setting(
        False,
        "Divide the rewards of ist by their standard deviation; use with "
        "--importance-rate 0.3 or so.",
    )
    restart_layers: bool = setting(
        False, "Reset the optimizer state of a layer when it becomes active again."
    )
    recompute: str = setting(
        "none",
        f"Layers to rematerialize in the backward pass: {one_of(RECOMPUTE)}.",
    )

    def require_sampler_options(self, sampler: "str | Sampler | None") -> None:
        """Raises `InputError` if an option breaks its rule, or `sampler` lacks it."""
        require_word("recompute", self.recompute, RECOMPUTE)
        for name in ("hold", "probe_every", "importance_rate"):
            require_positive(name, getattr(self, name))
        if not 0 < self.active <= 1:
            raise InputError(
                f"`active` must be in (0, 1], got {self.active}. It is the fraction of "
                "the layers that an update trains, commonly 0.25."
            )
        for one in fields(SamplerOptions):
            value = getattr(self, one.name)
            if value != one.default:
                require_sampler_has(one.name, value, sampler)
        if isinstance(sampler, str):
            _require_given(sampler, vars(self))


def register_sampler(
    word: str,
    kind: "type[Sampler]",
    *,
    help: str = "",
    options: tuple[str, ...] = ("active", "hold"),
) -> None:
    """Registers a sampler under a name, for `ist`, `finetune` and `--sampler`.

    Args:
      word: its name: lower-case letters, digits, `_`, `-` and `/`.
      kind: the class.
      help: a few words on which layers it draws.
      options: fields of `SamplerOptions` that `kind.fitted` takes.

    Raises:
      InputError: if the name is taken or invalid, or `kind` is no class of samplers.

    Example:
      >>> from sparse_jax.samplers.simple import Cyclic
      >>> class InPairs(Cyclic): ...
      >>> register_sampler("in-pairs", InPairs, help="in turn, two at a time")
      >>> make_sampler("in-pairs", num_layers=4, num_active=2)
      InPairs(num_layers=4, num_active=2, hold=1, descending=False, shuffled=False)
      >>> del SAMPLERS["in-pairs"]
    """
    from sparse_jax.samplers.sampler import Sampler

    require_new(word, SAMPLERS)
    if not (isinstance(kind, type) and issubclass(kind, Sampler)):
        raise InputError(f"`kind` must be a subclass of `Sampler`, got {brief(kind)}.")
    SAMPLERS[word] = SamplerEntry(kind, help, options)


def sampler_class(word: str) -> "type[Sampler]":
    """Returns the class of a sampler by its name.

    Raises:
      InputError: if there is none.

    Example:
      >>> sampler_class("ist").__name__
      'Importance'
    """
    if not isinstance(word, str) or word not in SAMPLERS:
        raise InputError(
            f"`sampler` must be a `Sampler`, or one of {', '.join(SAMPLERS)}, got "
            f"{brief(word)}."
        )
    kind = SAMPLERS[word].kind
    return pkgutil.resolve_name(kind) if isinstance(kind, str) else kind


def make_sampler(
    word: str, *, num_layers: int, num_active: int, **options: Any
) -> "Sampler":
    """Returns the sampler of a name for a model of `num_layers` layers.

    Args:
      word: its name, such as "ist".
      num_layers: L.
      num_active: layers that are updated at a time.
      **options: of any samplers; those that this one does not have are left out.

    Raises:
      InputError: if a number breaks its rule.

    Example:
      >>> make_sampler("uniform", num_layers=4, num_active=1, hold=2, probe_every=5)
      Uniform(num_layers=4, num_active=1, hold=2)
    """
    kind = sampler_class(word)
    _require_given(word, options)
    known = {*SAMPLERS[word].options, *(one.name for one in fields(kind))}
    taken = {name: value for name, value in options.items() if name in known}
    return kind.fitted(num_layers=num_layers, num_active=num_active, **taken)


def require_no_measuring(sampler: "str | Sampler") -> None:
    """Raises if a sampler chooses by `measure`, where there is nobody to call it.

    Raises:
      InputError: naming the sampler.
    """
    from sparse_jax.samplers.sampler import Sampler

    rule = sampler if isinstance(sampler, Sampler) else sampler_class(sampler)
    if rule.measures:
        raise InputError(
            "`sampler` must be one that measures no model before the first update, "
            f"got {brief(sampler)}. `finetune` takes it; here pass "
            "`Static.of(...)` with the layers of the largest scores of its `measure`."
        )


def num_active(active: float, num_layers: int) -> int:
    """Returns the layers that are updated at a time.

    Rounded down as in the released code, but at least one.

    Example:
      >>> [num_active(0.25, layers) for layers in (32, 6, 2)]
      [8, 1, 1]
    """
    # 0.29 * 100 is a little less than 29.
    return max(1, int(active * num_layers + 1e-9))


def _require_given(word: str, options: Mapping[str, Any]) -> None:
    """Raises unless the options that a sampler cannot do without are given."""
    for name in SAMPLERS[word].required:
        if not options.get(name):
            raise InputError(
                f"`{name}` must be given with sampler {word!r}, got none. Functions "
                f"without that option take a `{sampler_class(word).__name__}(...)`."
            )


def word_of_sampler(sampler: "Sampler") -> str:
    """Returns the name of a sampler.

    Raises:
      InputError: if its class is not registered.
    """
    for word in SAMPLERS:
        if sampler_class(word) is type(sampler):
            return word
    raise InputError(
        f"`sampler` must be one of {', '.join(SAMPLERS)}, or an object of their "
        f"classes, got {brief(sampler)}. Register a class of your own "
        "with `register_sampler`."
    )


def options_of_sampler(sampler: "str | Sampler | None") -> tuple[str, ...]:
    """Returns the options of runs with a sampler; an object has its own numbers.

    Example:
      >>> options_of_sampler("uniform")
      ('restart_layers', 'recompute', 'active', 'hold')
    """
    if sampler is None:
        return ()
    return (*_OF_ALL, *(SAMPLERS[sampler].options if isinstance(sampler, str) else ()))


def require_sampler_has(
    name: str, value: object, sampler: "str | Sampler | None"
) -> None:
    """Raises `InputError` unless runs with a sampler have an option."""
    if name in options_of_sampler(sampler):
        return
    owners = [word for word, entry in SAMPLERS.items() if name in entry.options]
    place, remedy = f"with sampler {brief(sampler)}", ""
    if sampler is None:
        place = "without a sampler"
        remedy = f"; add `--sampler {(owners or [*SAMPLERS])[0]}`"
    raise InputError(
        f"`{name}` must be left out {place}, got {brief(value)}. It belongs to "
        f"{', '.join(owners or SAMPLERS)}{remedy}."
    )

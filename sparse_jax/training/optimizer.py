"""The optimizer of a run: one of Optax, a schedule of its rate, a clipped norm."""

import functools
import inspect
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.compact.compact import CompactState, TrainedValues, Tuner
from sparse_jax.errors import InputError, brief
from sparse_jax.params.names import Rule
from sparse_jax.supports.masters import current_values, keep_masters
from sparse_jax.supports.packing import write_back
from sparse_jax.training.recipe_options import (
    COOLDOWN,
    MOMENTS,
    OPTIMIZERS,
    SCHEDULE_FREE,
    WARM_UP,
    RecipeOptions,
)
from sparse_jax.transforms.adam_8bit import scale_by_adam_8bit

if TYPE_CHECKING:
    from optax.contrib import MuonDimensionNumbers

__all__ = [
    "Schedule",
    "averaged",
    "learning_rate_at",
    "make_optimizer",
    "require_takes",
    "schedule_of",
]

# Names, in a tree of trained values, of what has the layers as its first axis.
_STACKS = ("^added/", "^leaves/layers/")
# Argument of Optax -> the option that it is, if its value is that.
_BETAS = ("betas", "b1 and b2")


class Schedule(NamedTuple):
    """The numbers of a schedule, float32: arguments of the compiled update.

    As constants of the program they would make it another one for every learning rate.
    """

    peak: jax.typing.ArrayLike
    updates: jax.typing.ArrayLike
    rise: jax.typing.ArrayLike  # 1 / updates of the warm-up
    fall: jax.typing.ArrayLike  # 1 / updates of the decay
    most: jax.typing.ArrayLike  # of the decay's factor: infinite if it starts at once
    bend: jax.typing.ArrayLike  # 1 for the decay of a cosine, 0 for a line
    weight_decay: jax.typing.ArrayLike


def schedule_of(
    peak: float,
    updates: int,
    warmup: float = WARM_UP,
    kind: str = "linear",
    cooldown: float = COOLDOWN,
    weight_decay: float = 0.0,
) -> Schedule:
    """Returns the schedule of a run.

    Args:
      peak: the largest rate, reached after the warm-up.
      updates: updates of the whole run.
      warmup: a fraction of the updates, or from 1 on their number; the least is one.
      kind: linear, cosine, constant or wsd.
      cooldown: the decay of wsd, as `warmup`.
      weight_decay: what weights lose at a rate of 1.

    Raises:
      InputError: if the warm-up is longer than the run, or leaves no room for the
        cooldown.
    """
    number = lambda share: max(1, round(share * updates if share < 1 else share))
    warm_up = number(warmup)
    if warm_up > updates:
        raise InputError(
            f"`warmup` must be at most {updates}, the updates of the run, got "
            f"{warm_up}. A fraction, such as {WARM_UP}, fits every run."
        )
    # From the largest rate to the one that would come after the run, which is zero.
    most = updates - warm_up + 1
    decay = {"constant": 1, "wsd": number(cooldown)}.get(kind, most)
    if decay > most:
        raise InputError(
            f"`cooldown` must be at most {most}, the updates from the end of the "
            f"warm-up, got {decay}. A fraction, such as {COOLDOWN}, fits every run."
        )
    one = np.float32(1)
    return Schedule(
        peak=np.float32(peak),
        updates=np.float32(updates),
        # Compilers multiply by the inverse of a constant, and so gives the same bits.
        rise=one / np.float32(warm_up),
        fall=one / np.float32(decay),
        most=np.float32(math.inf if kind == "linear" else 1),
        bend=np.float32(kind == "cosine"),
        weight_decay=np.float32(weight_decay),
    )


def learning_rate_at(count: jax.typing.ArrayLike, schedule: Schedule) -> jax.Array:
    """Returns the learning rate of an update.

        peak * min((count + 1) / warm_up, decay),   left = (updates - count) / D
        decay = left, (1 - cos(pi min(left, 1))) / 2, 1 or min(left, 1)
          for linear, cosine, constant and wsd;
        D = updates - warm_up + 1, or the updates of the cooldown for wsd

    No update has a rate of zero, neither the first nor the last: these are the rates
    of transformers' schedules for one update more, from its second on.

    Args:
      count: updates made before.
      schedule: as from `schedule_of`.

    Example:
      >>> schedule = schedule_of(1.0, 4)
      >>> [round(float(learning_rate_at(count, schedule)), 2) for count in range(4)]
      [1.0, 0.75, 0.5, 0.25]
    """
    count = jnp.asarray(count, jnp.float32)
    peak, updates, rise, fall, most, bend, _ = map(jnp.asarray, schedule)
    left = jnp.minimum((updates - count) * fall, most)
    decay = jnp.where(bend > 0, (1 - jnp.cos(jnp.pi * left)) / 2, left)
    return peak * jnp.minimum((count + 1) * rise, decay)


def make_optimizer(
    options: RecipeOptions | None = None, *, is_stacked: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer that options name, which does not clip.

    Its `update` takes the `schedule` as an extra argument.

    Args:
      options: of a run; None is AdamW without decay.
      is_stacked: whether arrays of the layers have these as their first axis.
    """
    options = options or RecipeOptions()
    is_8bit = options.moment_dtype == MOMENTS[2]
    make, known = _named(options.optimizer, is_8bit)
    given: dict[str, Any] = {}
    b1, b2 = options.betas or (None, None)
    for names, value in (
        (("b1", "adam_b1"), b1),
        (("b2", "adam_b2"), b2),
        (("eps",), options.eps),
        (("mask", "weight_decay_mask"), _decays),
        (("mu_dtype",), jnp.bfloat16 if options.moment_dtype == MOMENTS[1] else None),
        (("stacked",), _STACKS if is_stacked else None),
        (
            ("muon_weight_dimension_numbers",),
            functools.partial(_matrices, is_stacked=is_stacked),
        ),
    ):
        given |= {name: value for name in names if name in known and value is not None}

    def made(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
        more: dict[str, Any] = {}
        if "weight_decay" in known:
            more["weight_decay"] = jnp.asarray(schedule.weight_decay)
        rate = functools.partial(learning_rate_at, schedule=schedule)
        return optax.with_extra_args_support(make(rate, **given, **more))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        schedule: Schedule,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        # Made where it is used, so that its numbers are arguments of the program.
        return made(schedule).update(updates, state, params, **extra_args)

    init = lambda params: made(schedule_of(1.0, 1)).init(params)
    typed: Any = update
    return optax.GradientTransformationExtraArgs(init, typed)


def require_takes(options: RecipeOptions) -> None:
    """Raises `InputError` if an option has no meaning for the optimizer of a run."""
    _, known = _named(options.optimizer)
    needs = {
        "weight_decay": ("weight_decay",),
        "betas": ("b1", "adam_b1"),
        "eps": ("eps",),
        "moment_dtype": ("mu_dtype",),
    }
    defaults = RecipeOptions()
    for name, arguments in needs.items():
        value = getattr(options, name)
        if value == getattr(defaults, name) or {*arguments} & {*known}:
            continue
        able = [word for word in OPTIMIZERS if {*arguments} & {*_named(word)[1]}]
        raise InputError(
            f"`{name}` must be left out with optimizer {options.optimizer!r}, got "
            f"{brief(value)}. In Optax these have it: {', '.join(able)}."
        )


def averaged(tuner: Tuner, state: CompactState) -> CompactState:
    """Returns the state whose values are the average that schedule-free training keeps.

    The state itself, unless its optimizer is one. What is trained is evaluated and
    written there; the gradients are taken elsewhere.
    """
    kept = optax.tree.get(state.opt_state, "ScheduleFreeState")
    if kept is None:
        return state
    roles = tuner.roles(state.params)
    trees = (state.support, state.masters, state.params)
    values = TrainedValues(state.added, current_values(roles, *trees))._asdict()
    # Optax's generic types.
    values = TrainedValues(**optax.contrib.schedule_free_eval_params(kept, values))  # pyright: ignore
    leaves, split = values.leaves, tuner.split_masters
    return state._replace(
        params=write_back(roles, state.params, state.support, leaves),
        masters=keep_masters(roles, leaves, state.params, split),
        added=values.added,
    )


def _schedule_free_adamw(
    learning_rate: optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns Optax's optimizer of the name, which has no mask of its own."""
    base = optax.chain(
        optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.contrib.schedule_free(base, learning_rate, b1)


def _muon(
    learning_rate: optax.Schedule,
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    mu_dtype: Any = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    muon_weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns Optax's optimizer of the name, which decays only what is not Adam's."""
    steps = optax.contrib.muon(
        1.0, eps=eps, mu_dtype=mu_dtype, adam_b1=adam_b1, adam_b2=adam_b2,
        muon_weight_dimension_numbers=muon_weight_dimension_numbers,
    )  # fmt: skip
    # Steps are downward already, and so is the decay.
    decay = optax.add_decayed_weights(-weight_decay, mask)
    return optax.chain(steps, decay, optax.scale_by_schedule(learning_rate))


def _adamw_8bit(
    learning_rate: optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stacked: Rule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns Optax's optimizer of the name, with moments of 8 bits."""
    return optax.chain(
        scale_by_adam_8bit(b1, b2, eps, stacked=stacked),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


# Those that Optax has in a form that lacks something.
_OWN = MappingProxyType({SCHEDULE_FREE: _schedule_free_adamw, "muon": _muon})


def _named(
    word: object, is_8bit: bool = False
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Returns the function of Optax that makes an optimizer, and its arguments."""
    make: Any = _OWN.get(str(word)) or getattr(optax, str(word), None)
    make = make or getattr(optax.contrib, str(word))
    known = tuple(inspect.signature(make).parameters)
    if not is_8bit:
        return make, known
    more = inspect.signature(_adamw_8bit).parameters
    return _adamw_8bit, tuple(name for name in more if name in (*known, "stacked"))


def _decays(values: optax.Params) -> Any:
    """Returns which arrays decay: all but biases, and the scales of norms."""

    def one(path: tuple[Any, ...], _: object) -> bool:
        kind = jax.tree_util.keystr(path[-1:], simple=True)
        return not kind.endswith("bias") and kind != "scale"

    return jax.tree.map_with_path(one, values)


def _matrices(values: optax.Params, *, is_stacked: bool) -> Any:
    """Returns the axes of the matrices in the layers, and None for what is none."""
    from optax.contrib import MuonDimensionNumbers

    def one(path: tuple[Any, ...], leaf: jax.Array) -> "MuonDimensionNumbers | None":
        # Word tables and heads, too, are left to Adam.
        place = [getattr(key, "key", None) for key in path]
        in_layers = place[0] == "added" or place[:2] == ["leaves", "layers"]
        first = int(is_stacked)
        if not in_layers or leaf.ndim != first + 2:
            return None
        return MuonDimensionNumbers(first, first + 1)

    return jax.tree.map_with_path(one, values)

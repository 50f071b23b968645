"""The plan of a step: what the compiler says that it needs."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from sparse_jax.compact.layerwise import Layerwise
from sparse_jax.errors import InputError, first_line
from sparse_jax.models.functional import Model
from sparse_jax.planning.abstract import (
    AbstractRun,
    abstract_run,
    held_bytes,
    selected_by,
)
from sparse_jax.planning.choices import choices_in
from sparse_jax.planning.cycles import seconds_of
from sparse_jax.planning.hlo import Traffic, collectives_of
from sparse_jax.planning.often import Often, often_of
from sparse_jax.planning.operations import Kernel, count_flops, kernels_of
from sparse_jax.planning.target import Chip, Target
from sparse_jax.sharding.mesh import MeshShape
from sparse_jax.training.build import sampler_of
from sparse_jax.training.results import count_trained
from sparse_jax.training.settings import Settings

__all__ = [
    "Plan",
    "flops_of",
    "kernels_of_step",
    "make_plan",
    "often_in",
    "with_largest_batch",
]

# Share of the peak of its matrix units that a large model commonly reaches on a GPU.
UTILIZATION = 0.5
# An all-reduce is a reduce-scatter and an all-gather.
_PASSES = {"all-reduce": 2}
_NEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available")
# Compilations to find the largest batch; two were enough for all that was tried.
_TRIES = 4
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one device needs for one update. Sizes are in bytes.

    Attributes:
      method: word of the command line, with the sampler of layers if any, and with
        the words of `CHOICES` that hold.
      trained: parameters that are trained, on all devices together.
      held: bytes by what they are for, exact, as `held_bytes` says.
      temporaries: activations, gradients and all else that a step needs beside its
        arguments, as the compiler lays them out; None without a compiler.
      peak: most that is alive at any time, as the compiler counts, in the larger of
        the programs: an update, and the selection before the first one.
      reserved: arguments and temporaries of the larger one: what has to fit.
      update_peak: the same of an update.
      selection_peak: the same of the selection; None if nothing is selected.
      collectives: what is sent, by kind.
      flops: operations of the matrix products of a mean update, which trains the
        layers that its sampler draws, all devices together.
      seconds: estimate of the time of a mean update; None without a data sheet.
      fits: whether `reserved` is less than the memory of the chip.
      largest_batch: examples of an update that fit.
      notes: what else has to be known.
    """

    method: str
    trained: int
    held: Mapping[str, int]
    temporaries: int | None = None
    peak: int | None = None
    reserved: int | None = None
    update_peak: int | None = None
    selection_peak: int | None = None
    collectives: Mapping[str, Traffic] | None = None
    flops: int
    seconds: float | None = None
    fits: bool | None = None
    largest_batch: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def state(self) -> int:
        """Bytes that stay between two updates."""
        return sum(self.held.values()) - self.held["gradients"] - self.held["batch"]

    def as_dict(self) -> Mapping[str, object]:
        """Returns the plan as plain values, for JSON."""
        told = asdict(self) | {"state": self.state}
        if self.collectives is not None:
            told["collectives"] = {k: t._asdict() for k, t in self.collectives.items()}
        return told


def make_plan(
    model: Model,
    settings: Settings,
    *,
    length: int,
    shape: MeshShape,
    target: Target,
) -> Plan:
    """Compiles one update for devices that may be absent, and reports what it needs.

    Args:
      model: as from `read_model`.
      settings: of the run.
      length: tokens of every example.
      shape: of the mesh.
      target: as from `find_target`.

    Raises:
      InputError: if the settings fit neither the model nor the mesh.
    """
    devices = target.devices or jax.devices("cpu")[: shape.size]
    run = abstract_run(model, settings, length, shape, devices)
    words = (settings.method_word, settings.sampler_word, *choices_in(settings))
    state = run.state
    rule = sampler_of(settings, model.config.num_layers)
    found = (run.tuner.method, state.params, state.added, run.head, rule)
    counts = count_trained(*found)
    plan = Plan(
        method="+".join(word for word in words if word),
        trained=counts.trained,
        held=held_bytes(run),
        flops=flops_of(run),
        notes=tuple(
            note for note in (target.note, run.placement.remark) if note is not None
        ),
    )
    if not target.devices:
        return plan
    return _compiled(plan, run, target.chip)


def with_largest_batch(
    model: Model,
    settings: Settings,
    plan: Plan,
    *,
    length: int,
    shape: MeshShape,
    target: Target,
) -> Plan:
    """Returns a plan with the examples of an update that fit.

    What a step needs beside its state grows almost evenly with the batch: twice the
    batch shows by how much, and what follows is compiled to be sure. The number is a
    multiple of the devices that share a batch, 0 if not even one example for each of
    them fits, and stays None if the memory is not known.

    Args:
      plan: as `make_plan` returns it for the other arguments.
    """
    if target.chip is None or plan.reserved is None or not target.devices:
        return plan
    room, share = target.chip.memory, shape.data * shape.fsdp * settings.accumulate
    size, needed, fitting = settings.batch_size, plan.reserved, 0
    other = 2 * size
    for _ in range(_TRIES):
        changed = replace(settings, batch_size=other)
        found = make_plan(model, changed, length=length, shape=shape, target=target)
        if found.reserved is None:
            return plan
        each = max(1, (found.reserved - needed) / (other - size))
        fitting = int(size + (room - needed) // each) // share * share
        if fitting == other or fitting < share:
            break
        other = fitting
    return replace(plan, largest_batch=max(0, fitting))


def _compiled(plan: Plan, run: AbstractRun, chip: Chip | None) -> Plan:
    """Returns a plan with what the compiler says."""
    args = (run.state, run.batch, run.key)
    try:
        compiled = _program(run.runner.lower(*args, schedule=run.schedule))
        selects = bool(jax.tree.leaves(run.state.support))
        score = run.tuner.method.ranking
        by_gradient = score is not None and score.needs_gradient
        # Methods that are compared share their options.
        batches = run.settings.select_batches if by_gradient else 1
        chosen: Any = None
        if selects:
            by = (run.state, *selected_by(run, batches))
            chosen = _program(run.runner.lower_choice(*by)).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return _too_large(plan, error)
    found: Any = compiled.memory_analysis()
    text, often = compiled.as_text() or "", often_in(run)
    plan = replace(plan, collectives=collectives_of(text, often))
    reserved, peak, selection = _reserved(found), _peak(found), None
    if chosen is not None:
        reserved, selection = max(reserved, _reserved(chosen)), _peak(chosen)
    return replace(
        plan,
        temporaries=found.temp_size_in_bytes,
        peak=max(peak, selection or 0),
        update_peak=peak,
        selection_peak=selection,
        reserved=reserved,
        seconds=_seconds(plan, run, text, often, chip),
        fits=None if chip is None else reserved <= chip.memory,
    )


def _program(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Returns the compiled program, for devices that may be absent."""
    with warnings.catch_warnings():
        # A cache of compiled programs holds none for devices that are absent.
        warnings.filterwarnings("ignore", "Error reading persistent compilation")
        return lowered.compile()


def _reserved(found: Any) -> int:
    """Returns the bytes of a program; what it overwrites counts once."""
    extra = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + extra


def _peak(found: Any) -> int:
    """Returns the most bytes of a program that are in use at once."""
    # XLA:CPU counts no temporaries there, and holds all of them.
    is_whole = found.peak_memory_in_bytes >= found.temp_size_in_bytes
    return found.peak_memory_in_bytes if is_whole else _reserved(found)


def _too_large(plan: Plan, error: Exception) -> Plan:
    """Returns the plan of a program that the compiler refuses, being too large."""
    found = _NEEDED.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise InputError(
            "`target` must have a compiler that takes this program, got the error: "
            f"{first_line(error)}."
        ) from error
    # The compiler gives up before it knows what it can overwrite.
    least = plan.state + plan.held["gradients"]
    needed = int(float(found[1]) * _UNITS[found[2]])
    note = (
        "the compiler refuses a program that is larger than the chip; what is reserved "
        "is then the least it can be, the state and the gradients"
    )
    notes = (*plan.notes, note)
    return replace(plan, reserved=max(least, needed), fits=False, notes=notes)


def _seconds(
    plan: Plan, run: AbstractRun, text: str, often: Often, chip: Chip | None
) -> float | None:
    """Returns the estimated time of an update: the program's, and what is sent."""
    if chip is None or plan.collectives is None:
        return None
    sent = sum(
        _PASSES.get(kind, 1) * one.bytes for kind, one in plan.collectives.items()
    )
    if chip.clock:
        found = seconds_of(text, chip, kernels_of_step(run), often)
        return None if found is None else found.total + sent / chip.links
    return (
        plan.flops / run.placement.mesh.size / (UTILIZATION * chip.flops)
        + sent / chip.links
    )


def flops_of(run: AbstractRun) -> int:
    """Returns the operations of the matrix products of a mean update."""
    often = often_in(run)  # draws, which devices that are absent cannot
    with jax.set_mesh(run.placement.mesh):
        return count_flops(*_step(run), often=often)


def often_in(run: AbstractRun) -> Often:
    """Returns how often an update runs what the sampler of a run decides."""
    tuner = run.tuner
    if not isinstance(tuner, Layerwise):
        return often_of(None)
    return often_of(tuner.sampler_for(run.state.params), tuner.seed)


def kernels_of_step(run: AbstractRun) -> Mapping[tuple[str, tuple[int, ...]], Kernel]:
    """Returns the kernels of an update."""
    with jax.set_mesh(run.placement.mesh):
        return kernels_of(*_step(run))


def _step(run: AbstractRun) -> tuple[Any, ...]:
    """Returns the function of an update, and the shapes of its arguments."""
    step = lambda *args: run.tuner.step(*args[:3], schedule=args[3])
    return step, run.state, run.batch, run.key, run.schedule

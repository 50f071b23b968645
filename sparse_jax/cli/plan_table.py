"""Plans side by side, for people and for programs."""

from collections.abc import Mapping, Sequence

from sparse_jax.cli.json_file import write_json
from sparse_jax.planning.plan import UTILIZATION, Plan
from sparse_jax.planning.target import Target
from sparse_jax.samplers.registry import SAMPLERS
from sparse_jax.sharding.mesh import MeshShape
from sparse_jax.training.progress import bytes_shown

__all__ = ["print_plans", "write_plans"]

_HELD = {
    "parameters": "parameters",
    "added": "added arrays",
    "masters": "masters of trained values",
    "supports": "supports",
    "optimizer": "optimizer state",
}


def print_plans(
    plans: Sequence[Plan], target: Target, shape: MeshShape, batch: tuple[int, int]
) -> None:
    """Prints a table with a column for every plan, and what the estimates assume.

    Args:
      plans: of the same batch on the same devices.
      target: the devices.
      shape: the mesh.
      batch: examples of one update, and tokens of each.
    """
    # Rich takes a while to import, so it is imported where it is used.
    from rich.console import Console
    from rich.table import Table

    examples, length = batch
    table = Table(
        title=f"One update of {examples:,} x {length:,} tokens on {target.name}, "
        f"mesh {shape}"
    )
    table.add_column("on one device", style="bold")
    for plan in plans:
        # A long name has its words below one another.
        table.add_column(plan.method.replace("+", " +"), justify="right")
    for what, values in _rows(plans).items():
        table.add_row(what, *values)
    console = Console(highlight=False)
    console.print(table)
    for line in _words(plans, target):
        console.print(line, soft_wrap=True)


def write_plans(
    path: str,
    plans: Sequence[Plan],
    target: Target,
    shape: MeshShape,
    asked: Mapping[str, object],
) -> None:
    """Writes plans as JSON: sizes in bytes, times in seconds.

    Raises:
      InputError: if that is not possible.
    """
    chip = None if target.chip is None else target.chip._asdict()
    found = {
        "asked": dict(asked),
        "target": {"name": target.name, "devices": shape.size, "chip": chip},
        "mesh": shape.axes,
        "assumptions": _words(plans, target),
        "plans": [plan.as_dict() for plan in plans],
    }
    write_json(path, found)


def _rows(plans: Sequence[Plan]) -> dict[str, list[str]]:
    """Returns the rows of the table."""
    rows: dict[str, list[str]] = {
        "trained parameters (all devices)": [f"{plan.trained:,}" for plan in plans]
    }
    for name, what in _HELD.items():
        if any(plan.held[name] for plan in plans):
            rows[what] = [_size(plan.held[name]) for plan in plans]
    rows["state, between updates"] = [_size(plan.state) for plan in plans]
    rows["temporaries"] = [_size(plan.temporaries) for plan in plans]
    rows["  of these, gradients"] = [_size(plan.held["gradients"]) for plan in plans]
    rows["peak live memory"] = [_size(plan.peak) for plan in plans]
    if any(plan.selection_peak is not None for plan in plans):
        rows["  in an update"] = [_size(plan.update_peak) for plan in plans]
        rows["  in the selection"] = [_selection(plan) for plan in plans]
    rows["reserved memory"] = [_size(plan.reserved) for plan in plans]
    rows["fits"] = [_fits(plan) for plan in plans]
    if any(plan.largest_batch is not None for plan in plans):
        rows["largest batch"] = [
            "not known" if plan.largest_batch is None else f"{plan.largest_batch:,}"
            for plan in plans
        ]
    kinds = sorted({kind for plan in plans for kind in plan.collectives or {}})
    for kind in kinds:
        rows[kind] = [_traffic(plan, kind) for plan in plans]
    rows["FLOPs (all devices)"] = [f"{plan.flops:.3g}" for plan in plans]
    rows["time of an update"] = [
        "not known" if plan.seconds is None else f"about {plan.seconds:.3g} s"
        for plan in plans
    ]
    return rows


def _words(plans: Sequence[Plan], target: Target) -> list[str]:
    """Returns what the numbers that are shown assume, a fact a line."""
    chip, words = target.chip, []
    if chip is not None:
        memory, flops = _size(int(chip.memory)), chip.flops / 1e12
        words.append(f"{chip.name}: {memory} for programs, {flops:.0f} TFLOP/s (bf16).")
    if any(plan.reserved is not None for plan in plans):
        words.append(
            "Temporaries, peak and reserved memory: as the compiler reports them."
        )
    sends = any(plan.collectives for plan in plans)
    if any(plan.largest_batch is not None for plan in plans):
        words.append("Largest batch: estimated from a program of twice the batch.")
    if any(plan.seconds is not None for plan in plans):
        words += _of_time(target)
        if sends:
            words.append("Time of communication: all links at once, not overlapped.")
    if any(word in SAMPLERS for plan in plans for word in plan.method.split("+")):
        words.append("Sampled layers: FLOPs and time are those of a mean update.")
    words += dict.fromkeys(f"Note: {note}." for plan in plans for note in plan.notes)
    return words


def _of_time(target: Target) -> list[str]:
    """Returns what the estimate of the time is."""
    if target.chip is None or not target.chip.clock:
        return [f"Time: matrix products at {UTILIZATION:.0%} of the peak FLOP/s."]
    return [
        "Time: the cycles that the compiler expects.",
        "Time of kernels: at the peak FLOP/s or the memory bandwidth.",
        "Time of gathers and scatters: the compiler's `optimal_seconds`.",
    ]


def _selection(plan: Plan) -> str:
    """Returns the peak of the selection of a plan."""
    if plan.selection_peak is None and plan.update_peak is not None:
        return "none"
    return _size(plan.selection_peak)


def _fits(plan: Plan) -> str:
    """Returns whether a plan fits its chip."""
    if plan.fits is None:
        return "not known"
    return "yes" if plan.fits else "no"


def _traffic(plan: Plan, kind: str) -> str:
    """Returns the traffic of a plan by one kind of collective."""
    if plan.collectives is None:
        return "not known"
    traffic = plan.collectives.get(kind)
    return "none" if traffic is None else f"{_size(traffic.bytes)} in {traffic.count:,}"


def _size(size: int | None) -> str:
    """Returns bytes for people."""
    return "not known" if size is None else bytes_shown(size)

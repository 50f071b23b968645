"""The command `sparse-jax finetune`."""

import logging
import sys
from typing import Annotated, Any

import typer

from sparse_jax.cli import options
from sparse_jax.cli.options import require_used, take_devices
from sparse_jax.errors import InputError, printable

__all__ = ["LogLines", "finetune"]


def finetune(
    context: typer.Context,
    model: Annotated[str, options.MODEL],
    task: Annotated[str, options.TASK],
    output: Annotated[str, options.OUTPUT],
    data: Annotated[str | None, options.DATA] = None,
    loss_on: Annotated[str | None, options.LOSS_ON] = None,
    packing: Annotated[bool, options.PACKING] = False,
    template: Annotated[str | None, options.TEMPLATE] = None,
    held_out: Annotated[float | None, options.HELD_OUT] = None,
    drop_unlabeled: Annotated[bool, options.DROP_UNLABELED] = False,
    method: Annotated[str, options.METHOD] = "sift",
    density: Annotated[float, options.DENSITY] = 0.008,
    granularity: Annotated[str, options.GRANULARITY] = "entry",
    rank: Annotated[int, options.RANK] = 8,
    alpha: Annotated[float | None, options.ALPHA] = None,
    rslora: Annotated[bool, options.RSLORA] = False,
    dropout: Annotated[float | None, options.DROPOUT] = None,
    size: Annotated[int | None, options.SIZE] = None,
    activation: Annotated[str | None, options.ACTIVATION] = None,
    prefix_length: Annotated[int | None, options.PREFIX_LENGTH] = None,
    where: Annotated[list[str] | None, options.WHERE] = None,
    dense: Annotated[list[str] | None, options.DENSE] = None,
    ist: Annotated[bool, options.IST] = False,
    sampler: Annotated[str | None, options.SAMPLER] = None,
    active: Annotated[float, options.ACTIVE] = 0.25,
    hold: Annotated[int, options.HOLD] = 1,
    layers: Annotated[list[int] | None, options.LAYERS] = None,
    layer_weights: Annotated[list[float] | None, options.LAYER_WEIGHTS] = None,
    probe_every: Annotated[int, options.PROBE_EVERY] = 10,
    importance_rate: Annotated[float, options.IMPORTANCE_RATE] = 10.0,
    restart_layers: Annotated[bool, options.RESTART_LAYERS] = False,
    recompute: Annotated[str, options.RECOMPUTE] = "none",
    learning_rate: Annotated[float | None, options.LEARNING_RATE] = None,
    batch_size: Annotated[int, options.BATCH_SIZE] = 32,
    accumulate: Annotated[int, options.ACCUMULATE] = 1,
    epochs: Annotated[int, options.EPOCHS] = 3,
    max_steps: Annotated[int | None, options.MAX_STEPS] = None,
    group_by_length: Annotated[bool, options.GROUP_BY_LENGTH] = False,
    max_length: Annotated[int | None, options.MAX_LENGTH] = None,
    dtype: Annotated[str, options.DTYPE] = "float32",
    checkpointing: Annotated[bool, options.CHECKPOINTING] = False,
    mesh: Annotated[str | None, options.MESH] = None,
    devices: Annotated[int | None, options.DEVICES] = None,
    distributed: Annotated[bool, options.DISTRIBUTED] = False,
    coordinator: Annotated[str | None, options.COORDINATOR] = None,
    processes: Annotated[int | None, options.PROCESSES] = None,
    process: Annotated[int | None, options.PROCESS] = None,
    seed: Annotated[int, options.SEED] = 0,
    save_every: Annotated[int, options.SAVE_EVERY] = 500,
    keep: Annotated[int, options.KEEP] = 2,
    overwrite: Annotated[bool, options.OVERWRITE] = False,
    resume: Annotated[bool, options.RESUME] = False,
) -> None:
    """Fine-tune a model on a task, and save what was trained."""
    given: dict[str, Any] = {**locals()}
    del given["context"]
    if given.pop("ist"):
        given["sampler"] = sampler = _ist(sampler)
    for name in ("where", "dense", "layers", "layer_weights"):
        given[name] = tuple(given[name]) if given[name] else None
    _show_log()
    surroundings = ("devices", "distributed", "coordinator", "processes", "process")
    take_devices(mesh=given["mesh"], **{name: given.pop(name) for name in surroundings})
    # JAX takes seconds to import, and `--help` has to be quick.
    import sparse_jax
    from sparse_jax.cli.summary import print_summary
    from sparse_jax.sharding.processes import is_first_process, leave, lost_processes

    settings = sparse_jax.Settings(**given)
    require_used(context, [(method, sampler)])
    try:
        metrics = sparse_jax.finetune(settings)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stop.code if isinstance(stop, SystemExit) else 130
        print(f"stopped. {_remedy(output)}", file=sys.stderr)
        raise SystemExit(code) from None
    # What JAX raises where the connection to another process breaks.
    except RuntimeError:
        if not (lost := lost_processes()):
            raise
        leave(lost)
    if is_first_process():
        print_summary(settings, metrics)


def _ist(sampler: str | None) -> str:
    """Returns the sampler that --ist stands for."""
    if sampler not in (None, "ist"):
        raise InputError(
            f"`sampler` must be left out with --ist, got {sampler!r}. --ist is the "
            "same as --sampler ist."
        )
    return "ist"


def _remedy(output: str) -> str:
    """Returns what to do about a run that was stopped."""
    from pathlib import Path

    from sparse_jax.training.output_folder import CONFIG

    if not (Path(output) / CONFIG).is_file():
        return "Nothing was written."
    return "Continue from the last checkpoint by the same command with --resume."


class LogLines(logging.Handler):
    """Prints the log without codes that a terminal obeys, whatever names are in it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record on the standard error of now."""
        try:
            print(printable(self.format(record)), file=sys.stderr)
        except (OSError, ValueError):
            self.handleError(record)


def _show_log() -> None:
    """Sends the lines of the progress to standard error."""
    log = logging.getLogger("sparse_jax")
    if not log.handlers:
        log.addHandler(LogLines())
    log.setLevel(logging.INFO)
    # absl, which comes with Orbax, gives the root logger a handler of its own.
    log.propagate = False

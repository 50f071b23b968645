"""The command `sparse-jax finetune`."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

import typer

from sparse_jax.cli.messages import as_typed, names_typed
from sparse_jax.cli.options import (
    CONFIG,
    DEVICES,
    IST,
    choose_settings,
    flag,
    option,
    require_used,
    take_devices,
    takes_settings,
)
from sparse_jax.errors import printable

__all__ = ["LogLines", "finetune"]


@takes_settings()
def finetune(
    context: typer.Context,
    config: str | None = CONFIG,
    ist: bool = IST,
    devices: int | None = DEVICES,
    distributed: bool = flag(
        "--distributed", "Join the other processes of a TPU pod or SLURM job."
    ),
    coordinator: str | None = option(
        None, "Address of the first process, such as HOST:1234.", "none"
    ),
    processes: int | None = option(None, "Number of processes.", "1"),
    process: int | None = option(None, "Number of this process, counted from 0.", "0"),
    **settings: Any,
) -> None:
    """Fine-tune a model on a task, and save what was trained.

    The loss shown is smoothed; metrics.jsonl has the loss of every update.
    """
    _show_log(context)
    given = choose_settings(context, settings, config, ist)
    take_devices(
        devices,
        mesh=given["mesh"],
        distributed=distributed,
        coordinator=coordinator,
        processes=processes,
        process=process,
        no_cache=given["no_cache"],
    )
    # JAX takes seconds to import, and `--help` has to be quick.
    import sparse_jax
    from sparse_jax.cli.summary import print_summary
    from sparse_jax.sharding.processes import is_first_process, leave, lost_processes

    run = sparse_jax.Settings(**given)
    require_used(context, [run])
    try:
        metrics = sparse_jax.finetune(run)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stop.code if isinstance(stop, SystemExit) else 130
        print(f"stopped. {_remedy(run.output)}", file=sys.stderr)
        raise SystemExit(code) from None
    # What JAX raises where the connection to another process breaks.
    except RuntimeError:
        if not (lost := lost_processes()):
            raise
        leave(lost)
    if is_first_process() and not run.dry_run:
        print_summary(run, metrics)


def _remedy(output: str) -> str:
    """Returns what to do about a run that was stopped."""
    from pathlib import Path

    from sparse_jax.training.output_folder import CONFIG

    if not (Path(output) / CONFIG).is_file():
        return "Nothing was written."
    return "Continue from the last checkpoint by the same command with --resume."


class LogLines(logging.Handler):
    """Prints the log without codes that a terminal obeys, whatever names are in it.

    Args:
      names: options by the arguments that they set.
    """

    def __init__(self, names: Mapping[str, str] | None = None):
        super().__init__()
        self._names = names or {}

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record on the current standard error."""
        try:
            line = as_typed(self.format(record), self._names)
            print(printable(line), file=sys.stderr)
        except (OSError, ValueError):
            self.handleError(record)


def _show_log(context: typer.Context) -> None:
    """Sends the lines of the progress to standard error."""
    log = logging.getLogger("sparse_jax")
    if not log.handlers:
        log.addHandler(LogLines(names_typed(context.command)))
    log.setLevel(logging.INFO)
    # absl, which comes with Orbax, gives the root logger a handler of its own.
    log.propagate = False

"""Options that a command was given although they change nothing."""

from collections.abc import Sequence
from typing import Any

import typer

from sparse_jax.errors import InputError

__all__ = ["require_used"]


def require_used(
    context: typer.Context, runs: Sequence[tuple[str, str | None]]
) -> None:
    """Raises for an option that no run of a command has.

    `Settings` have a rank whatever the method, so that programs can share them. On the
    command line an option without an effect is a mistake, even at its default.

    Args:
      context: the options of the command.
      runs: method and sampler of every run, not empty.

    Raises:
      InputError: naming the option and what it belongs to.
    """
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        refusals = [_refusal(name, value, *run) for run in runs]
        if refusals[0] is not None and all(refusals):
            raise refusals[0]


def _refusal(
    name: str, value: Any, method: str, sampler: str | None
) -> InputError | None:
    """Returns the error of an option that a run does not have."""
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.training import settings

    try:
        if any(name in names for names in settings.OPTIONS.values()):
            settings.require_method(name, value, method)
        if name in settings.LAYER_DEFAULTS:
            settings.require_sampler(name, value, sampler)
    except InputError as error:
        return error
    return None

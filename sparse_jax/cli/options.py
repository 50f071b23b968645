"""Options of commands: those of the settings, and those that commands share."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import typer
from typer import Option
from typer.core import TyperCommand

from sparse_jax.errors import InputError
from sparse_jax.methods.registry import MethodOptions, require_method_has
from sparse_jax.params.pairs import PAIRS
from sparse_jax.samplers.registry import SamplerOptions, require_sampler_has
from sparse_jax.training.data_options import DataOptions
from sparse_jax.training.evaluation_options import EvaluationOptions
from sparse_jax.training.recipe_options import RecipeOptions
from sparse_jax.training.settings import Settings, setting_options

__all__ = [
    "ADAPTER",
    "AGAIN",
    "BASE",
    "BATCH_SIZE",
    "CONFIG",
    "DEVICES",
    "IST",
    "LABELS",
    "MAX_LENGTH",
    "OVERWRITE",
    "Sections",
    "choose_settings",
    "flag",
    "named_on_command_line",
    "option",
    "require_used",
    "take_devices",
    "takes_settings",
]

Command = TypeVar("Command", bound=Callable[..., None])
_METHOD_OPTIONS = {one.name for one in fields(MethodOptions)}
_SAMPLER_OPTIONS = {one.name for one in fields(SamplerOptions)}
# Those of groups, such as methods and samplers, last.
_FIELDS = {
    one.name: one
    for one in sorted(
        setting_options().values(),
        key=lambda one: one.name not in vars(Settings)["__annotations__"],
    )
}
_RUN = "Run"
# Heading in the help -> groups of settings, and others that belong to them.
_SECTIONS: dict[str, tuple[tuple[type, ...], tuple[str, ...]]] = {
    _RUN: ((Settings,), ()),
    "Data": ((DataOptions,), ("batch_size", "group_by_length", "max_length")),
    "What is trained": (
        (MethodOptions,),
        (
            "method", "dense", "adapter", "avoid", "select_after", "select_batches",
            "reselect_every", "head_bias",
        ),
    ),
    "Layers": ((SamplerOptions,), ("sampler", "ist")),
    "Optimizer, schedule and loss": ((RecipeOptions,), ()),
    "Evaluation": ((EvaluationOptions,), ()),
    "Devices": (
        (),
        ("mesh", "devices", "distributed", "coordinator", "processes", "process"),
    ),
}  # fmt: skip


def _section_of(name: str) -> str:
    """Returns the heading that an option of a run stands under."""
    for heading, (_, names) in _SECTIONS.items():
        if name in names:
            return heading
    for heading, (groups, _) in _SECTIONS.items():
        if any(name in vars(group).get("__annotations__", {}) for group in groups):
            return heading
    return _RUN


class Sections(TyperCommand):
    """A command whose help has its many options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the options."""
        rows: dict[str, list[tuple[str, str]]] = {name: [] for name in _SECTIONS}
        for one in self.get_params(ctx):
            if (row := one.get_help_record(ctx)) is not None:
                rows[_section_of(one.name or "")].append(row)
        for heading, found in rows.items():
            if found:
                with formatter.section(heading):
                    formatter.write_dl(found)


def option(default: Any, text: str, shown: str = "", *names: str, **more: Any) -> Any:
    """Returns an option; `shown` describes a default that is not shown as it is."""
    if shown:
        text, more["show_default"] = f"{text}  [default: {shown}]", False
    return Option(default, *names, help=text, **more)


def flag(name: str, text: str, default: object = False, shown: str = "") -> Any:
    """Returns an option without a value."""
    return option(default, text, shown, name)


ADAPTER = "Adapter file, or the folder of a run or of a PEFT adapter."
AGAIN = option(None, "The same as the argument.", "none")
BASE = option(
    None,
    "Base model: a folder, or an id on the Hugging Face Hub.",
    "the adapter's, if it is on this machine",
)
LABELS = option(
    None,
    "Label of a classifier whose adapter does not name its labels, as is usual for "
    "PEFT; repeat it in the order of the outputs.",
    "those of the adapter",
    metavar="<str>",
)
BATCH_SIZE = option(None, "Examples per batch.", "as in training")
MAX_LENGTH = option(
    None,
    "Maximum number of tokens per example; longer ones are truncated.",
    "as in training",
)
OVERWRITE = flag("--overwrite", "Replace the output file.")
CONFIG = option(
    None,
    "YAML or JSON file of settings, such as the config.json of a run; options on the "
    "command line override it.",
    "none",
)
IST = flag("--ist", "Short for --sampler ist.")
DEVICES = option(None, "Number of CPU devices to simulate, to try out a mesh.", "none")


def takes_settings(
    *names: str, defaults: Mapping[str, object] | None = None
) -> Callable[[Command], Command]:
    """Gives a command the options of fields of `Settings`: type, default and help.

    Those that are no argument of its own are keywords, and come first in the help.

    Args:
      *names: the fields; none is all of them.
      defaults: of fields that have others in this command.
    """
    defaults = defaults or {}
    taken = names or tuple(_FIELDS)

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = signature.parameters
        made = {name: _parameter(name, defaults) for name in taken}
        parameters = [one for name, one in made.items() if name not in own]
        for name, one in own.items():
            if name in made:
                parameters.append(made[name])
            elif one.kind is not one.VAR_KEYWORD:
                parameters.append(one.replace(kind=one.KEYWORD_ONLY))
        command.__signature__ = signature.replace(parameters=parameters)
        return command

    return decorate


def _parameter(name: str, defaults: Mapping[str, object]) -> inspect.Parameter:
    """Returns the option of a field."""
    one = _FIELDS[name]
    default = defaults.get(name, one.default)
    if default is MISSING:
        # Not required by Typer, because a file may have it.
        made = option(None, f"{one.help}  [required]", show_default=False)
    elif one.type is bool:
        made = flag(f"--{name.replace('_', '-')}", one.help, default)
    else:
        shown = one.shown if default is None else ""
        made = option(
            default,
            one.help,
            shown,
            metavar=_METAVARS.get(name, _METAVARS.get(one.type)),
        )
    # What may be repeated is a list, unless it says how many there are.
    items = get_args(one.type)
    kind: Any = list[items[0]] if ... in items else one.type
    kind = str if one.type == PAIRS else kind
    kind = kind if default is not None and default is not MISSING else kind | None
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=made, annotation=kind)


# Typer would show the type of every list as that of texts.
_METAVARS: dict[object, str] = {
    PAIRS: "<ours=theirs,...>",
    "avoid": "<str>",
    "eval_data": "<file>",
    "report_to": "<str>",
    tuple[str, ...]: "<regex>",
    tuple[int, ...]: "<int>",
    tuple[float, ...]: "<float>",
    tuple[float, float]: "<float> <float>",
}


def choose_settings(
    context: typer.Context, settings: Mapping[str, Any], config: str | None, ist: bool
) -> dict[str, Any]:
    """Returns settings: of the command line, else of a file, else the defaults.

    Args:
      context: of the command.
      settings: the options of the command that are settings.
      config: the file, if there is one.
      ist: whether --ist is given.

    Raises:
      InputError: if one that has no default is not given, or the file is wrong.
    """
    named, file = named_on_command_line(context), {}
    if config is None and named.get("resume") and not {"model", "task"} <= {*named}:
        config = _config_of(str(named.get("output", "")))
    if config is not None:
        from sparse_jax.training.config_file import read_settings

        file = read_settings(config, named)
    chosen = {**settings, **file, **{k: v for k, v in named.items() if k in settings}}
    if ist:
        if named.get("sampler", "ist") != "ist":
            raise InputError(
                f"`sampler` must be left out with --ist, got {named['sampler']!r}. "
                "--ist is the same as --sampler ist."
            )
        chosen["sampler"] = "ist"
    for name in settings:
        if chosen[name] is None and _FIELDS[name].default is MISSING:
            raise InputError(
                f"`{name}` must be given, got nothing. Pass --{name}, or --config with "
                "a file that has it."
            )
    # An option that may be repeated is a list.
    is_list = lambda value: isinstance(value, list)
    return {k: tuple(v) or None if is_list(v) else v for k, v in chosen.items()}


def _config_of(output: str) -> str:
    """Returns the settings of the run in a folder.

    Raises:
      InputError: if there is none.
    """
    from sparse_jax.training.output_folder import CONFIG, require_run

    path = Path(output) / CONFIG
    require_run(path)
    return str(path)


def named_on_command_line(context: typer.Context) -> dict[str, Any]:
    """Returns the options that were given, and not left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {
        name: value
        for name, value in context.params.items()
        if (source := sources[name]) is not None and source.name == "COMMANDLINE"
    }


def require_used(context: typer.Context, runs: Sequence[Settings]) -> None:
    """Raises for an option that no run of a command has.

    `Settings` have a rank whatever the method, so that programs can share them. On the
    command line an option without an effect is a mistake, even at its default.

    Args:
      context: the options of the command.
      runs: settings of every run, not empty.

    Raises:
      InputError: naming the option and what it belongs to.
    """
    for name, value in named_on_command_line(context).items():
        refusals = [_refusal(name, value, run) for run in runs]
        if refusals[0] is not None and all(refusals):
            raise refusals[0]


def _refusal(name: str, value: object, run: Settings) -> InputError | None:
    """Returns the error of an option that a run does not have."""
    try:
        if name in _METHOD_OPTIONS:
            require_method_has(name, value, run.method)
        if name in _SAMPLER_OPTIONS:
            require_sampler_has(name, value, run.sampler)
    except InputError as error:
        return error
    return None


def take_devices(
    devices: int | None,
    *,
    mesh: str | None = None,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    no_cache: bool = False,
) -> None:
    """Prepares JAX for a command; comes before all else.

    Args:
      devices: number to simulate on the CPU of this process; None takes what there is.
      mesh: what the devices are for; without one a single device is used.
      distributed: whether other processes run the same command.
      coordinator, processes, process: as for `join_processes`; each implies
        `distributed`.
      no_cache: whether to compile everything again.

    Raises:
      InputError: if a number is out of range, nothing uses the devices, or JAX has
        another kind of device.
    """
    if devices is not None and devices < 1:
        raise InputError(f"`devices` must be positive, got {devices}.")
    if devices is not None and devices > 1 and mesh is None:
        raise InputError(
            f"`devices` must come with a mesh, got {devices} and none. Say what they "
            f"are for, as in --mesh data={devices}."
        )
    from sparse_jax.training.compilation_cache import use_compilation_cache

    use_compilation_cache(not no_cache)
    given = (coordinator, processes, process)
    if devices is None and not distributed and given == (None, None, None):
        return
    import jax

    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    if distributed or given != (None, None, None):
        from sparse_jax.sharding.processes import join_processes, watch_processes

        join_processes(coordinator, processes, process)
        watch_processes()
    if devices is not None and jax.default_backend() != "cpu":
        raise InputError(
            f"`devices` must be left out where there are real ones, got {devices} and "
            f"{jax.device_count()} of kind {jax.default_backend()}. Set "
            "JAX_PLATFORMS=cpu to simulate some anyway."
        )

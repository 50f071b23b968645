"""The command `sparse-jax`."""

import ctypes
import importlib.util
import os
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import typer

from sparse_jax.cli.combine import combine, compare
from sparse_jax.cli.evaluate import evaluate
from sparse_jax.cli.export import export
from sparse_jax.cli.finetune import finetune
from sparse_jax.cli.generate import generate
from sparse_jax.cli.inspect import inspect
from sparse_jax.cli.messages import as_in_file, as_typed, names_typed
from sparse_jax.cli.options import Sections, flag, named_on_command_line
from sparse_jax.cli.plan import plan
from sparse_jax.cli.predict import predict
from sparse_jax.errors import InputError, brief, printable
from sparse_jax.training.other_names import name_hint

__all__ = ["app", "main", "run"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of `malloc.h`
# Newer versions of Typer keep Click, and the name of this class, to themselves.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Fine-tune pre-trained Transformers by training only what matters.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(cls=Sections)(finetune)
app.command()(evaluate)
app.command()(predict)
app.command()(generate)
app.command()(export)
app.command()(combine)
app.command()(compare)
app.command()(inspect)
app.command(cls=Sections)(plan)


@app.callback(invoke_without_command=True)
def root(
    version: bool = flag("--version", "Show the version and exit."),
) -> None:
    """Fine-tune pre-trained Transformers by training only what matters."""
    if version:
        print(f"sparse-jax {metadata.version('sparse_jax')}")
        raise typer.Exit


def run() -> None:
    """Runs the command in a process of its own, which needs no PyTorch."""
    # Where it is installed, transformers would import it, which takes 2 seconds of CPU.
    # SciPy looks into `sys.modules` and stumbles over an entry of None there.
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *args: (
        None if name == "torch" else find(name, *args)
    )
    _keep_freed_memory()
    main()


def _keep_freed_memory() -> None:
    """Lets the process use memory again that it has freed, where glibc serves it.

    XLA:CPU frees what an update needs after every update. By default glibc gives that
    back to the kernel, which clears every page for the next: a seventh of the CPU time
    of updates of SmolLM2-135M, and 4 % of those of MiniLM.
    """
    # Elsewhere there is no such function, or on Windows no such library.
    with suppress(OSError, AttributeError, TypeError):
        adjust = ctypes.CDLL(None).mallopt
        adjust(_MMAP_MAX, 0)
        adjust(_TRIM_THRESHOLD, 2**31 - 1)


def main() -> None:
    """Runs the command; wrong input is one line on standard error and exit code 2."""
    # Its advice is to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    words = sys.argv[1:] or ["--help"]
    try:
        code = app(words, prog_name="sparse-jax", standalone_mode=False)
    except InputError as error:
        _refuse(as_typed(_as_set(str(error), words), _names(words)))
    except _UsageError as error:
        _refuse(_reading(error, words))
    except OSError as error:
        # A closed folder, or a name that is too long, where it was typed. About any
        # other place, such as a file of a library, the error is a bug.
        if (message := _about_place(error, words)) is None:
            raise
        _refuse(message)
    except typer.Abort:
        raise SystemExit(130) from None
    else:
        raise SystemExit(code)


def _refuse(message: str) -> NoReturn:
    """Prints what is wrong on one line, and ends with exit code 2."""
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(2) from None


def _about_place(error: OSError, words: list[str]) -> str | None:
    """Returns what is wrong about a place that was typed; None for any other error."""
    command, place = _command(words), error.filename
    if command is None or not isinstance(place, str | os.PathLike):
        return None
    names, found = names_typed(command), {}
    # Numbers and the words of flags are no places.
    for name, value in _typed(command, words).items():
        for typed in value if isinstance(value, list) else [value]:
            if isinstance(typed, str) and typed and _is_about(place, typed):
                found[names[name]] = len(Path(typed).absolute().parts)
    if not found:
        return None
    # A file in a folder, and the folder, may both be typed.
    nearest = [name for name, depth in found.items() if depth == max(found.values())]
    return (
        f"{' or '.join(nearest)} must be a place that can be used, got "
        f"{brief(os.fspath(place))}: {error.strerror}."
    )


def _is_about(place: str | os.PathLike[str], typed: str) -> bool:
    """Returns whether a place is what was typed, or is made for it.

    That may be in it, beside it until it is complete, or above it and not there yet.
    """
    found, path = Path(place).absolute(), Path(typed).absolute()
    is_part = found.name.startswith((f"{path.name}.", f".{path.name}."))
    return (
        found.is_relative_to(path)
        or (found.parent == path.parent and is_part)
        or (path.is_relative_to(found) and not os.path.exists(found))
    )


def _command(words: list[str]) -> Any:
    """Returns the command that is typed, or None if there is none."""
    return getattr(typer.main.get_command(app), "commands", {}).get(words[0])


def _typed(command: Any, words: list[str]) -> dict[str, Any]:
    """Returns the values that are typed, by their arguments; reads them again."""
    return named_on_command_line(command.make_context(words[0], words[1:]))


def _as_set(message: str, words: list[str]) -> str:
    """Returns a message that names the file of settings, if what is wrong is there."""
    command = _command(words)
    typed = {} if command is None else _typed(command, words)
    if "config" not in typed:
        return message
    from sparse_jax.training.config_file import read_settings

    # What is wrong may be the file.
    with suppress(InputError):
        settings = read_settings(typed["config"], typed)
        return as_in_file(message, settings, typed["config"])
    return message


def _names(words: list[str]) -> dict[str, str]:
    """Returns what is typed for the arguments of a command."""
    command = _command(words)
    typed = {word.partition("=")[0] for word in words}
    names = {} if command is None else names_typed(command, "--adapter" not in typed)
    if typed & {"--prompts", "--input"}:
        # A prompt is one of a file then.
        names.pop("prompt", None)
    return names


def _reading(error: Any, words: list[str]) -> str:
    """Returns what could not be read, and where the options are explained."""
    if error.ctx and hasattr(error, "possibilities"):
        name = error.option_name.lstrip("-").replace("-", "_")
        known = [param.name for param in error.ctx.command.params]
        # Typer's own are all that look alike.
        error.possibilities = None
        if hint := name_hint(name, known, joined=" "):
            error.message += f".{hint}"
    message = error.format_message().rstrip(".")
    # Typer's own words do not have the value.
    if errors := getattr(error.__cause__, "errors", None):
        message += f", got {errors()[0]['input']!r}"
    # The parser, which counts the values of an option, knows of no command.
    help_of = f"sparse-jax {words[0]}" if _command(words) else "sparse-jax"
    return f"{message}{'' if message.endswith('?') else '.'} See `{help_of} --help`."


if __name__ == "__main__":
    run()

"""Progress: a bar in a terminal, plain lines elsewhere, and the memory in use."""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING

import jax
import psutil

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = [
    "Progress",
    "bytes_shown",
    "current_bytes",
    "peak_bytes",
    "release_freed_memory",
    "show_progress",
    "warnings_kept",
]


def bytes_shown(size: float) -> str:
    """Returns a number of bytes for people.

    Example:
      >>> bytes_shown(3 * 2**29), bytes_shown(2048), bytes_shown(100)
      ('1.50 GiB', '2.00 KiB', '100 B')
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size:.0f} B"


def current_bytes() -> int:
    """Returns the bytes in use: of the first device, or on CPU of this process."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """Returns the most bytes in use so far, of the device or of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    info = psutil.Process().memory_info()
    if peak := getattr(info, "peak_wset", 0):  # Windows
        return peak
    # The module exists on Unix only.
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG = 1.0  # seconds of a compilation that leaves much behind


def release_freed_memory() -> None:
    """Gives back what reading a model and compiling leave, where glibc serves it.

    What an update needs is one piece, which fits no gap: without this SmolLM2-135M
    takes 2.52 GiB for its first updates by LoRA, and with it 2.20.
    """
    _trim()
    _listen()


def _trim() -> None:
    """Gives back what is free."""
    # Elsewhere there is no such function, or on Windows no such library.
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _listen() -> None:
    """Gives back what long compilations leave, from now on."""

    def compiled(event: str, duration_secs: float, **more: object) -> None:
        del more
        if event == _COMPILED and duration_secs > _LONG:
            _trim()

    jax.monitoring.register_event_duration_secs_listener(compiled)


_LINE_EVERY = 50  # updates
_SMOOTHING = 0.9  # share of the old value in the shown loss

_log = logging.getLogger(__name__)


@contextmanager
def show_progress(total: int, start: int = 0) -> Iterator["Progress"]:
    """Yields a progress bar on standard error, or a writer of lines to a log.

    Args:
      total: updates of the run.
      start: updates made before a resumed run.
    """
    # Rich takes a while to import, so it is imported where it is used.
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(total)
        return
    with _bar(console) as bar:
        task = bar.add_task("training", total=total, completed=start, status="starting")
        yield _Bar(bar, task, total)


@contextmanager
def warnings_kept() -> Iterator[list[str]]:
    """Yields the warnings of a run as they are logged, each once."""
    kept: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (line := record.getMessage()) not in kept:
                kept.append(line)
            # Without this handler Python would print what nobody else takes.
            others = {*log.handlers, *(logging.root.handlers * log.propagate)}
            if others == {self} and logging.lastResort is not None:
                logging.lastResort.handle(record)

    keeper, log = Keeper(logging.WARNING), logging.getLogger("sparse_jax")
    log.addHandler(keeper)
    try:
        yield kept
    finally:
        log.removeHandler(keeper)


class _Pace:
    """The smoothed loss, and how fast updates are when nothing compiles."""

    def __init__(self):
        self.loss = float("nan")
        self.timed, self.tokens, self.seconds = 0, 0, 0.0

    def add(self, loss: float, tokens: int, seconds: float, is_compiling: bool) -> None:
        """Takes an update into account."""
        self.loss = _smoothed(self.loss, loss)
        if is_compiling:
            return
        self.timed, self.tokens = self.timed + 1, self.tokens + tokens
        self.seconds += seconds

    def text(self, updates_left: int) -> str:
        """Returns loss, tokens per second, memory, and the time of what is left."""
        words = [f"loss {self.loss:.4f}"]
        if self.timed:
            words.append(f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s")
        words.append(bytes_shown(current_bytes()))
        if self.timed:
            words.append(f"{self.seconds / self.timed * updates_left:.0f} s left")
        return "  ".join(words)


class _Bar:
    """Shows progress as a bar in a terminal."""

    def __init__(self, bar: "RichProgress", task: "TaskID", total: int):
        self.bar, self.task, self.total, self.pace = bar, task, total, _Pace()

    def update(
        self, step: int, loss: float, tokens: int, seconds: float, *, is_compiling: bool
    ) -> None:
        """Reports one update: its loss, tokens, and duration, and if it compiled."""
        self.pace.add(loss, tokens, seconds, is_compiling)
        status = self.pace.text(self.total - step)
        self.bar.update(self.task, completed=step, status=status)

    def wait(self, text: str) -> None:
        """Reports what takes long and makes no update, beside the bar."""
        self.bar.update(self.task, status=text)

    def note(self, text: str) -> None:
        """Reports an event, such as the result of an evaluation, above the bar."""
        self.bar.console.print(text, highlight=False)


class _Lines:
    """Writes progress as lines, with the methods of `_Bar`."""

    def __init__(self, total: int):
        self.total, self.pace = total, _Pace()
        self.every = max(1, min(_LINE_EVERY, total // 10))

    def update(
        self, step: int, loss: float, tokens: int, seconds: float, *, is_compiling: bool
    ) -> None:
        """Writes a line now and then."""
        self.pace.add(loss, tokens, seconds, is_compiling)
        if step % self.every == 0 or step == self.total:
            text = self.pace.text(self.total - step)
            _log.info("step %d/%d  %s", step, self.total, text)

    def wait(self, text: str) -> None:
        """Leaves it out."""

    def note(self, text: str) -> None:
        """Writes a line."""
        _log.info(text)


Progress = _Bar | _Lines


def _smoothed(old: float, new: float) -> float:
    """Returns a moving average that starts at the first value."""
    return new if old != old else _SMOOTHING * old + (1 - _SMOOTHING) * new


def _bar(console: "Console") -> "RichProgress":
    """Returns a progress bar with its columns."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}"),
        console=console,
    )

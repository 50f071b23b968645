"""Progress: a bar in a terminal, plain lines elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from sparse_jax.training.memory import bytes_shown, current_bytes

__all__ = ["Progress", "show_progress"]

_LINE_EVERY = 50  # updates
_SMOOTHING = 0.9  # share of the old value in the shown loss and rate

_log = logging.getLogger(__name__)


class Progress(Protocol):
    """What the loop tells its audience."""

    def update(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Reports one update: its loss, tokens, and duration."""
        ...

    def wait(self, text: str) -> None:
        """Reports what takes long and makes no update."""
        ...

    def note(self, text: str) -> None:
        """Reports an event, such as the result of an evaluation."""
        ...


@contextmanager
def show_progress(total: int, start: int = 0) -> Iterator[Progress]:
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
        yield _Bar(bar, task)


class _Shown:
    """Smoothed numbers."""

    def __init__(self):
        self.loss, self.rate = float("nan"), float("nan")

    def text(self, loss: float, tokens: int, seconds: float) -> str:
        """Returns the loss, tokens per second and memory as text."""
        self.loss = _smoothed(self.loss, loss)
        self.rate = _smoothed(self.rate, tokens / max(seconds, 1e-9))
        memory = bytes_shown(current_bytes())
        return f"loss {self.loss:.4f}  {self.rate:,.0f} tokens/s  {memory}"


class _Bar:
    """Shows progress as a bar."""

    def __init__(self, bar, task):
        self.bar, self.task, self.shown = bar, task, _Shown()

    def update(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Moves the bar."""
        status = self.shown.text(loss, tokens, seconds)
        self.bar.update(self.task, completed=step, status=status)

    def wait(self, text: str) -> None:
        """Shows it beside the bar."""
        self.bar.update(self.task, status=text)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self.bar.console.print(text, highlight=False)


class _Lines:
    """Writes progress as lines."""

    def __init__(self, total: int):
        self.total, self.shown, self.began = total, _Shown(), time.perf_counter()
        self.every = max(1, min(_LINE_EVERY, total // 10))
        self.seen = 0

    def update(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Writes a line now and then."""
        self.seen += 1
        text = self.shown.text(loss, tokens, seconds)
        if step % self.every == 0 or step == self.total:
            pace = (time.perf_counter() - self.began) / self.seen
            left = pace * (self.total - step)
            _log.info("step %d/%d  %s  %.0f s left", step, self.total, text, left)

    def wait(self, text: str) -> None:
        """Leaves it out."""

    def note(self, text: str) -> None:
        """Writes a line."""
        _log.info(text)


def _smoothed(old: float, new: float) -> float:
    """Returns a moving average that starts at the first value."""
    return new if old != old else _SMOOTHING * old + (1 - _SMOOTHING) * new


def _bar(console):
    """Returns a progress bar with its columns."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}"),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("left"),
        console=console,
    )

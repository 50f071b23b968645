"""Trackers: where the rows of a run are shown while it goes on.

`metrics.jsonl` has every row, whatever else is asked for. A tracker is a second reader
of them; without one, or with one that fails, the run is no worse.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from sparse_jax.errors import InputError, brief, reason_of
from sparse_jax.params.fields import Json, require_new, require_word
from sparse_jax.training.run_files import Row, is_evaluation, updates_of

__all__ = [
    "TRACKED",
    "TRACKERS",
    "Callbacks",
    "Start",
    "Tracker",
    "Trackers",
    "register_tracker",
    "require_trackers",
    "tracked",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Callbacks:
    """Your functions that a run calls during training.

    An exception ends the run; `resume` continues from its last checkpoint.

    Attributes:
      on_step: takes the row of an update, as `metrics.jsonl` has it.
      on_evaluate: takes the row of a split, with its metrics.
      on_save: takes the number of updates of a checkpoint that begins to be written.

    Raises:
      InputError: if one is no function.

    Example:
      >>> calls = Callbacks(on_evaluate=lambda row: print(row["accuracy"]))
      >>> calls.see({"step": 5, "epoch": 1, "split": "validation", "accuracy": 0.8})
      0.8
    """

    on_step: Callable[[Row], object] | None = None
    on_evaluate: Callable[[Row], object] | None = None
    on_save: Callable[[int], object] | None = None

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not callable(value):
                raise InputError(
                    f"`{one.name}` must be a function of one argument, got "
                    f"{brief(value)}."
                )

    def see(self, row: Row) -> None:
        """Takes a row of a run."""
        if is_evaluation(row):
            if self.on_evaluate is not None:
                self.on_evaluate(row)
        elif self.on_step is not None and updates_of([row]):
            self.on_step(row)

    def saved(self, step: int) -> None:
        """Takes the number of updates of a checkpoint."""
        if self.on_save is not None:
            self.on_save(step)


class Tracker(Protocol):
    """Shows numbers by the updates they belong to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes the numbers of an update or of an evaluation, such as `train/loss`."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


@dataclass(frozen=True)
class Start:
    """What a tracker is opened with.

    Attributes:
      folder: of the run.
      settings: of the run, as `config.json` has them.
      step: updates made before a resumed run; rows after it are made again.
    """

    folder: Path
    settings: Mapping[str, Json]
    step: int


@dataclass(frozen=True)
class _Entry:
    """A row of the table.

    Attributes:
      open: opens it.
      module: that it needs, and whose extra has the name of the tracker.
    """

    open: Callable[[Start], Tracker]
    module: str | None = None


class _TensorBoard:
    """Writes event files to the folder `tensorboard` of the run."""

    def __init__(self, start: Start):
        from tensorboardX import SummaryWriter

        # What was logged after the checkpoint of a resumed run is not shown.
        purge = start.step + 1 if start.step else None
        folder = str(start.folder / EVENTS)
        self._writer = SummaryWriter(folder, purge_step=purge)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Logs to a run of the project WANDB_PROJECT, or sparse_jax.

    A resumed run goes on in the run of the same folder. Other variables of the
    environment are those of wandb, such as WANDB_MODE=offline.
    """

    def __init__(self, start: Start):
        import wandb  # pyright: ignore[reportMissingImports]

        mark = start.folder / WANDB / "sparse_jax-run"
        is_known = start.step > 0 and mark.is_file()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sparse_jax"),
            name=start.folder.name,
            dir=str(start.folder),  # in which it makes the folder
            id=mark.read_text().strip() if is_known else None,
            resume="allow",
            config=dict(start.settings),
        )
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(f"{self._run.id}\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


# Folders in that of the run.
TRACKED = EVENTS, WANDB = "tensorboard", "wandb"
TRACKERS: dict[str, _Entry] = {
    "tensorboard": _Entry(_TensorBoard, "tensorboardX"),
    "wandb": _Entry(_WeightsAndBiases, "wandb"),
}


def register_tracker(word: str, open: Callable[[Start], Tracker]) -> None:
    """Registers a tracker under a name, for `report_to` and `--report-to`.

    Args:
      word: its name: lower-case letters, digits, `_`, `-` and `/`.
      open: start -> tracker, called when a run begins.

    Raises:
      InputError: if the name is invalid, or another tracker has it.

    Example:
      >>> class Printer:
      ...     def log(self, values, step): print(step, values)
      ...     def close(self): print("done")
      >>> register_tracker("printer", lambda start: Printer())
      >>> del TRACKERS["printer"]
    """
    # The same function may come again, as where a cell of a notebook does.
    require_new(word, [one for one in TRACKERS if TRACKERS[one].open is not open])
    TRACKERS[word] = _Entry(open)


def require_trackers(words: Sequence[str]) -> None:
    """Raises `InputError` if a tracker is unknown, or what it needs not installed."""
    for word in words:
        require_word("report_to", word, TRACKERS)
        module = TRACKERS[word].module
        if module is not None and find_spec(module) is None:
            raise InputError(
                f"`report_to` must name a tracker that is installed, got {word!r} and "
                f"no {module}. Run `pip install 'sparse_jax[{word}]'`."
            )


class Trackers:
    """The trackers of a run; one that fails is left out from then on."""

    def __init__(self, words: Sequence[str], start: Start):
        self._open: dict[str, Tracker] = {}
        for word in words:
            self._try(word, lambda word=word: self._begin(word, start))

    def log(self, row: Row) -> None:
        """Passes on the numbers of a row of `metrics.jsonl`."""
        if values := tracked(row):
            for word, tracker in list(self._open.items()):
                self._try(word, lambda one=tracker: one.log(values, row["step"]))

    def close(self) -> None:
        """Ends them."""
        for word, tracker in list(self._open.items()):
            self._try(word, tracker.close)

    def _begin(self, word: str, start: Start) -> None:
        """Opens one."""
        self._open[word] = TRACKERS[word].open(start)

    def _try(self, word: str, act: Callable[[], None]) -> None:
        """Does something with one; a service or a full disk must not end a run."""
        try:
            act()
        except Exception as error:  # What it raises is its own.
            self._open.pop(word, None)
            _log.warning("%s is not logged to any more (%s)", word, reason_of(error))


def tracked(row: Row) -> dict[str, float]:
    """Returns the numbers of a row, by the names that trackers show.

    Example:
      >>> tracked({"step": 4, "loss": 0.5, "learning_rate": 0.1, "tokens": 80,
      ...          "seconds": 2.0, "is_compiling": False})
      {'train/loss': 0.5, 'train/learning_rate': 0.1, 'train/tokens_per_second': 40.0}
      >>> tracked({"step": 4, "epoch": 1, "split": "test", "accuracy": 0.75})
      {'test/accuracy': 0.75}
    """
    if is_evaluation(row):
        left = {"step", "epoch"}
        return _numbers(row["split"], {k: row[k] for k in row if k not in left})
    if not updates_of([row]):
        return {}
    left = {"step", "tokens", "seconds", "is_compiling"}
    values: dict[str, Any] = {name: row[name] for name in row if name not in left}
    if not row["is_compiling"] and row["seconds"]:
        values["tokens_per_second"] = row["tokens"] / row["seconds"]
    return _numbers("train", values)


def _numbers(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers among values, below the name of a group."""
    return {
        f"{group}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }

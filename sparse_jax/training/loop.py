"""The training loop."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from sparse_jax.compact import CompactState
from sparse_jax.sharding.runner import Runner
from sparse_jax.tasks.batches import Batch
from sparse_jax.training.checkpoint import Checkpoints, Position
from sparse_jax.training.feed import Feed
from sparse_jax.training.progress import Progress
from sparse_jax.training.run_directory import RunDirectory
from sparse_jax.training.signals import StopSignals

__all__ = ["Loop"]


@dataclass(eq=False)
class Loop:
    """Feeds batches to a tuner, and tells and saves what happens.

    Everything that is random follows from the seed and the place in the run, so that a
    run continued from a checkpoint gives the numbers of one that was not interrupted.

    Attributes:
      runner: makes the updates.
      put: batch -> the same where it is used.
      feed: the batches.
      seed: of dropout and of random supports.
      total: batches of the run.
      rate: number of updates -> learning rate, for the rows.
      evaluate: state -> metrics of every split.
      save_every: batches between two checkpoints, beside the end of every epoch.
      signals: ask to stop.
    """

    runner: Runner
    put: Callable[[Batch], Any]
    feed: Feed
    seed: int
    total: int
    rate: Callable[[int], float]
    evaluate: Callable[[CompactState], dict[str, dict[str, float]]]
    save_every: int
    directory: RunDirectory
    checkpoints: Checkpoints
    progress: Progress
    signals: StopSignals
    _shapes: set[tuple[int, ...]] = field(default_factory=set)
    _known: dict[str, Any] = field(default_factory=dict)

    def run(self, state: CompactState, at: Position) -> tuple[CompactState, Position]:
        """Trains from a position to the end; the state is given away.

        The end of an epoch is saved before it is evaluated: a run that stops between
        the two evaluates when it is resumed.

        Raises:
          KeyboardInterrupt: or `SystemExit`, after a signal and a checkpoint.
        """
        length = self.feed.batches_per_epoch
        for epoch in range(math.ceil(self.total / length)):
            end = min((epoch + 1) * length, self.total)
            if at.batches > end:
                continue
            if at.batches < end:
                state, at = self._epoch(epoch, state, at, end)
                self.checkpoints.save(state, at)
            with self.signals.at_once():
                self._evaluate(state, at, epoch)
        return state, at

    def _epoch(
        self, epoch: int, state: CompactState, at: Position, end: int
    ) -> tuple[CompactState, Position]:
        """Trains to the end of an epoch, or of the run."""
        start = epoch * self.feed.batches_per_epoch
        batches = self.feed.train(epoch, start=at.batches - start)
        for batch in itertools.islice(batches, end - at.batches):
            state, at = self._batch(state, at, batch)
            if at.batches == end:
                break
            stopping = self.signals.requested()
            if stopping or at.batches % self.save_every == 0:
                self.checkpoints.save(state, at)
            if stopping:
                self.signals.stop_if_requested()
        return state, at

    def _batch(
        self, state: CompactState, at: Position, batch: Batch
    ) -> tuple[CompactState, Position]:
        """Selects if that is still to do, and makes an update."""
        key = jax.random.fold_in(jax.random.key(self.seed), at.batches)
        step = at.batches + 1
        if not at.is_selected:
            state, finite = self.runner.select(state, self.put(batch), key)
            if not finite:
                self.directory.add_row({"step": step, "is_skipped": True})
                return state, at._replace(batches=step, skipped=at.skipped + 1)
        is_first = self._is_first(batch)
        began = time.perf_counter()
        state, metrics = self.runner.step(state, self.put(batch), key)
        metrics = self._news(metrics)
        seconds = time.perf_counter() - began
        tokens = int(np.sum(batch["attention_mask"]))
        rate = self.rate(step - 1 - at.skipped)
        self.directory.add_row(
            {"step": step, **metrics, "learning_rate": rate, "tokens": tokens,
             "seconds": seconds, "is_compiling": is_first}
        )  # fmt: skip
        self.progress.update(step, metrics["loss"], tokens, seconds)
        return state, at._replace(batches=step, is_selected=True)

    def _news(self, metrics: dict[str, jax.Array]) -> dict[str, Any]:
        """Returns metrics as numbers and lists, without lists that have not changed."""
        told = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        known, self._known = self._known, told
        return {
            name: value
            for name, value in told.items()
            if not isinstance(value, list) or value != known.get(name)
        }

    def _is_first(self, batch: Batch) -> bool:
        """Returns whether a batch is the first of its shape, which compiles."""
        shape = np.shape(batch["input_ids"])
        is_first = shape not in self._shapes
        self._shapes.add(shape)
        return is_first

    def _evaluate(self, state: CompactState, at: Position, epoch: int) -> None:
        """Evaluates every split."""
        self.progress.wait("evaluating")
        for split, metrics in self.evaluate(state).items():
            place: dict[str, Any] = {"step": at.batches, "epoch": epoch + 1}
            self.directory.add_row({**place, "split": split, **metrics})
            words = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self.progress.note(f"epoch {epoch + 1}  {split}  {words}")

"""The training loop."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.data.batches import Batch, stack_batches
from sparse_jax.errors import InputError
from sparse_jax.models.modules import Inputs
from sparse_jax.params.fields import Json
from sparse_jax.sharding.runner import MeshRunner
from sparse_jax.supports.roles import SPARSE, map_roles
from sparse_jax.training.best_model import BestModel
from sparse_jax.training.build import Job
from sparse_jax.training.checkpoint import Checkpoints, Position
from sparse_jax.training.feed import Ahead
from sparse_jax.training.kl_budget import KlBudget
from sparse_jax.training.objective import Evaluated, Metrics
from sparse_jax.training.optimizer import learning_rate_at
from sparse_jax.training.progress import Progress
from sparse_jax.training.run_directory import RunDirectory
from sparse_jax.training.run_files import skipped_at_end
from sparse_jax.training.start import note_entries
from sparse_jax.training.stop_signals import StopSignals

__all__ = ["Loop"]

_log = logging.getLogger(__name__)
# As one program: by itself each of its operations would be compiled.
_rate_at = jax.jit(learning_rate_at)

# Batches in a row whose loss or gradient is not finite. Some are bad luck; a model that
# has diverged does not come back.
_MOST_SKIPPED = 20


@dataclass(eq=False)
class Loop:
    """Feeds batches to a tuner, and reports and saves what happens.

    Everything that is random follows from the seed and the number of the batch, so that
    a run resumed from a checkpoint has the numbers of one that was not interrupted.

    Attributes:
      job: what is trained, on which batches.
      runner: makes the updates.
      evaluate: state -> what is found on every split.
      directory: takes the rows.
      checkpoints: of the states.
      progress: is reported to.
      signals: ask to stop.
      patch: writes the changed weights of a state after some number of updates; until
        the selection there are none.
      before: makes the updates before the selection, if there are any.
      budget: compares states with the base on a text; None where there is no text.
      best: compares the states that are evaluated; None if they are not.
    """

    job: Job
    runner: MeshRunner
    evaluate: Callable[[CompactState], Evaluated]
    directory: RunDirectory
    checkpoints: Checkpoints
    progress: Progress
    signals: StopSignals
    patch: Callable[[CompactState, int], None]
    before: MeshRunner | None = None
    budget: KlBudget | None = None
    best: BestModel | None = None
    _shapes: set[tuple[bool, tuple[int, ...]]] = field(default_factory=set)
    _known: dict[str, Json] = field(default_factory=dict)
    _coming: Ahead = field(default_factory=lambda: Ahead(()))

    def __post_init__(self):
        self._schedules = {then: self.job.schedule(then) for then in (False, True)}
        self._text: Metrics = {}  # of the last comparison with the base
        # A resumed run goes on from the lists of its rows.
        for row in self.directory.rows:
            self._known |= row

    def run(self, state: CompactState, at: Position) -> tuple[CompactState, Position]:
        """Trains from a position to the end; the state is donated.

        A state is saved before it is evaluated: a run that stops between the two
        evaluates when it is resumed. At the end a model outside its KL budget
        is brought into it.

        Raises:
          InputError: if too many batches in a row, or all of them, are skipped because
            their loss or gradient is not finite, or the run ends before the selection.
          KeyboardInterrupt: or `SystemExit`, after a signal and a checkpoint.
        """
        length, total = self.job.feed.batches_per_epoch, self.job.total
        epoch = 0
        self._pin()
        if self.job.settings.eval_on_start and not at.batches:
            with self.signals.at_once():
                state = self._evaluate(state, at, -1)
        for epoch in range(math.ceil(total / length)):
            end = min((epoch + 1) * length, total)
            if at.batches > end:
                continue
            if at.batches < end:
                state, at = self._epoch(epoch, state, at, end)
                self._save(state, at)
            # What stops the training in an epoch is an evaluation.
            if not self._is_stopped:
                with self.signals.at_once():
                    state = self._evaluate(state, at, epoch)
            if self._is_stopped:
                break
        if at.skipped == at.batches:
            self._give_up(at)
        if not at.is_selected:
            self._end_early(at)
        if self._is_over and self.budget is not None:
            with self.signals.at_once():
                state, strength = self.budget.held(state, self._text["kl"])
                _log.warning(
                    "the KL to the base was %.4g nats per token, above `kl_budget`: "
                    "the change to the base is scaled by %.3g",
                    self._text["kl"], strength,
                )  # fmt: skip
                state = self._evaluate(state, at, epoch, strength=strength)
        return state, at

    @property
    def _is_over(self) -> bool:
        """Whether the last comparison was outside the budget."""
        return self.budget is not None and self.budget.is_over(self._text)

    @property
    def _is_stopped(self) -> bool:
        """Whether that, or the want of a better model, ends the training."""
        if self.best is not None and self.best.is_over(self.directory.rows):
            return True
        return self.job.settings.kl_stop and self._is_over

    def _pin(self) -> None:
        """Has the checkpoint of the best model so far kept."""
        if self.best is not None and self.job.settings.load_best_model_at_end:
            self.checkpoints.pinned = self.best.standing(self.directory.rows).step

    def _epoch(
        self, epoch: int, state: CompactState, at: Position, end: int
    ) -> tuple[CompactState, Position]:
        """Trains to the end of an epoch, or of the run."""
        start = epoch * self.job.feed.batches_per_epoch
        every = self.job.settings.eval_every or math.inf
        batches = self.job.feed.train(epoch, start=at.batches - start)
        self._coming = Ahead(itertools.islice(batches, end - at.batches))
        while (batch := self._next(state, at)) is not None:
            # Before the update, so that a run resumed here evaluates, too.
            if at.batches > start and at.batches % every == 0:
                # A signal stops an evaluation at once.
                if at.batches % self.job.settings.save_every:
                    self._save(state, at)
                with self.signals.at_once():
                    state = self._evaluate(state, at, epoch)
                if self._is_stopped:
                    break
            state, at = self._batch(state, at, batch)
            if at.batches == end:
                break
            if self.signals.requested():
                self.checkpoints.save(state, at)
                self.signals.stop_if_requested()
            if at.batches % self.job.settings.save_every == 0:
                self._save(state, at)
        return state, at

    def _next(self, state: CompactState, at: Position) -> Batch | None:
        """Returns the next batch; saves a checkpoint if it cannot be read."""
        try:
            return self._coming.take()
        except InputError:
            if at.batches:
                self._save(state, at)
            raise

    def _save(self, state: CompactState, at: Position) -> None:
        """Saves a checkpoint, unless it might be the model that has diverged."""
        if not skipped_at_end(self.directory.rows):
            self.checkpoints.save(state, at)

    def _batch(
        self, state: CompactState, at: Position, batch: Batch
    ) -> tuple[CompactState, Position]:
        """Selects if that is still to do, and makes an update."""
        key, step = self._key(at.batches), at.batches + 1
        runner, count = self.runner, at.batches - at.skipped
        if self.before is not None and count < self.job.select_after:
            runner = self.before
        elif not at.is_selected:
            state, finite = self._select(state, batch, at)
            at = at._replace(is_selected=finite)
            if not finite:
                return state, self._skip(at, "the gradient to select by")
            if self.budget is not None:
                self.budget.begin(state.params, state.support)
        elif self._is_due(count):
            state, finite = self._select(state, batch, at)
            if not finite:
                return state, self._skip(at, "the gradient to select by")
        is_first = self._is_first(batch, runner)
        began = time.perf_counter()
        schedule = self._schedules[at.is_selected]
        extra = {} if schedule is None else {"schedule": schedule}
        state, metrics = runner.step(state, self._put(batch), key, **extra)
        self._coming.read()  # while the device computes
        is_skipped, loss = metrics.pop("is_skipped"), float(metrics["loss"])
        if is_skipped:
            norm = float(metrics["gradient_norm"])
            return state, self._skip(
                at, f"the loss ({loss:.4g}) or the gradient norm ({norm:.4g})"
            )
        news = self._news(metrics)
        seconds = time.perf_counter() - began
        tokens = int(np.sum(batch["attention_mask"]))
        rate = None
        if schedule is not None:
            count -= self.job.select_after * at.is_selected
            rate = float(_rate_at(count, schedule))
        self.directory.add_row(
            {"step": step, **news, "learning_rate": rate, "tokens": tokens,
             "seconds": seconds, "is_compiling": is_first}
        )  # fmt: skip
        self.progress.update(step, loss, tokens, seconds, is_compiling=is_first)
        at = at._replace(batches=step)
        every = self.job.settings.patch_every
        if every is not None and step % every == 0 and at.is_selected:
            self.patch(state, step)
        return state, at

    def _is_due(self, count: int) -> bool:
        """Returns whether entries are chosen again after some number of updates."""
        every, made = self.job.settings.reselect_every, count - self.job.select_after
        return every is not None and made > 0 and made % every == 0

    def _put(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns a batch where it is used."""
        return self.job.base.placement.put(batch, self.job.settings.accumulate)

    def _key(self, number: int) -> jax.Array:
        """Returns the key of a batch."""
        return jax.random.fold_in(jax.random.key(self.job.settings.seed), number)

    def _after(self, number: int) -> Iterator[Batch]:
        """Yields the batches after the one of some number."""
        epoch, start = divmod(number + 1, self.job.feed.batches_per_epoch)
        while True:
            yield from self.job.feed.train(epoch, start=start)
            epoch, start = epoch + 1, 0

    def _to_select_by(self, number: int, batch: Batch) -> tuple[Inputs, jax.Array]:
        """Returns what a selection at some batch is by: that and later ones, or it."""
        several, first = self.job.settings.select_batches, self.runner.tuner.first
        if several == 1:
            return self._put(batch), self._key(number)
        batches = [batch, *itertools.islice(self._after(number), several - 1)]
        # Of each the first micro-batch, with the key that it has in an update.
        found = [first(one, self._key(number + i)) for i, one in enumerate(batches)]
        parts, keys = zip(*found, strict=True)
        put = self.job.base.placement.put
        return put(stack_batches(parts), several), jnp.stack(keys)

    def _select(
        self, state: CompactState, batch: Batch, at: Position
    ) -> tuple[CompactState, bool]:
        """Chooses the supports; also returns whether the gradient was finite."""
        by, avoid = self._to_select_by(at.batches, batch), self.job.avoid
        if self.before is None and not jax.tree.leaves(state.support):
            return self.runner.select(state, *by, avoid)
        self.progress.note("selecting the entries to train")
        began = time.perf_counter()
        if at.is_selected:
            known = self.checkpoints.earlier
            note_entries(known, self.runner.tuner, state, self.job.earlier)
        elif self.before is not None:
            state = self.runner.take_over(state, by[1])
        state, finite = self.runner.select(state, *by, avoid, is_again=at.is_selected)
        if self.before is not None and not (finite or at.is_selected):
            state = self.before.take_over(state, by[1])
        jax.block_until_ready(state.support)
        seconds = time.perf_counter() - began
        row = {"step": at.batches + 1, "is_selection": True, "seconds": seconds}
        self.directory.add_row(row)
        entries = _number_chosen(self.runner.tuner, state)
        self.progress.note(f"selected {entries:,} entries in {seconds:.1f} s")
        return state, finite

    def _skip(self, at: Position, what: str) -> Position:
        """Counts a batch that changed nothing.

        Raises:
          InputError: if there were too many of them in a row.
        """
        step = at.batches + 1
        self.directory.add_row({"step": step, "is_skipped": True})
        at = at._replace(batches=step, skipped=at.skipped + 1)
        in_a_row = skipped_at_end(self.directory.rows)
        if in_a_row == 1:
            _log.warning("batch %d is skipped: %s is not finite", step, what)
        if in_a_row >= _MOST_SKIPPED:
            self._give_up(at)
        return at

    def _give_up(self, at: Position) -> NoReturn:
        """Raises, because no update can be made."""
        raise InputError(
            "`loss` and its gradient must be finite, got "
            f"{skipped_at_end(self.directory.rows)} batches in a row where they are "
            f"not, after {at.batches - at.skipped} updates. Lower `learning_rate`, or "
            "pass `dtype=float32`; if there was no update at all, look at the model. "
            "No adapter is written, and the last checkpoint stays."
        )

    def _end_early(self, at: Position) -> NoReturn:
        """Raises, because the run ends before the selection."""
        made, after = at.batches - at.skipped, self.job.select_after
        if self._is_over:
            raise InputError(
                "`kl_stop` must not end a run before its selection, got a KL to the "
                f"base of {self._text['kl']:.4g} nats per token after {made} of the "
                f"{after} updates of `select_after`. Raise `kl_budget`, or lower "
                "`select_after` or `learning_rate`. No adapter is written."
            )
        why = (
            "stopped as it found no better model"
            if self._is_stopped
            else "the batches that were skipped left out"
        )
        raise InputError(
            "`select_after` must leave updates after the selection, got "
            f"{after} in a run that ended after {made}, {why}. Lower it, or train for "
            "longer. No adapter is written."
        )

    def _news(self, metrics: dict[str, jax.Array]) -> dict[str, Json]:
        """Returns metrics as numbers and lists, without lists that say nothing new."""
        shown = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        known, self._known = self._known, self._known | shown
        return {
            name: value
            for name, value in shown.items()
            if not isinstance(value, list)
            # Before the first probe its losses are not numbers.
            or (value != known.get(name) and np.isfinite(value).any())
        }

    def _is_first(self, batch: Batch, runner: MeshRunner) -> bool:
        """Returns whether a batch is a runner's first of its shape, which compiles."""
        shape = runner is self.before, np.shape(batch["input_ids"])
        is_first = shape not in self._shapes
        self._shapes.add(shape)
        return is_first

    def _evaluate(
        self, state: CompactState, at: Position, epoch: int, **more: float
    ) -> CompactState:
        """Evaluates every split, and compares with the base; adds `more` to rows."""
        self.progress.wait("evaluating")
        results, reports = self.evaluate(state)
        if self.budget is not None:
            state, self._text = self.budget.measure(state)
            results["text"] = self._text
        rows = self.directory.rows
        for split, metrics in results.items():
            row = {"step": at.batches, "epoch": epoch + 1, "split": split, **metrics}
            words = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            # Without entries there is no adapter; after batches that were skipped,
            # there is no checkpoint.
            is_compared = at.is_selected and not skipped_at_end(rows)
            if self.best is not None and split == self.best.split and is_compared:
                row["is_best"] = self.best.is_better(rows, metrics)
                words += "  (best so far)" if row["is_best"] else ""
            if split in reports:
                row["report"] = reports[split]
            self.directory.add_row({**row, **more})
            self.progress.note(f"epoch {epoch + 1}  {split}  {words}")
        self._pin()
        if self.best is not None and self.best.is_over(self.directory.rows):
            self.progress.note(self.best.reason)
        return state


def _number_chosen(tuner: Tuner, state: CompactState) -> int:
    """Returns how many entries the supports of a state hold."""
    size = lambda role, leaf: tuner.method.trained_size(role, leaf.shape)
    roles = tuner.roles(state.params)
    return sum(jax.tree.leaves(map_roles(size, roles, state.params, only=(SPARSE,))))

"""Fine-tuning, from settings to a run directory."""

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparse_jax.adapter.file import save_adapter
from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.compact.selection import before_selection
from sparse_jax.data.metrics import Metric
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.interchange.patches import save_patches
from sparse_jax.params.fields import Json
from sparse_jax.sharding.processes import (
    is_first_process,
    on_first_process,
    require_agreement,
)
from sparse_jax.sharding.runner import MeshRunner
from sparse_jax.supports.roles import FROZEN, is_role
from sparse_jax.training.best_model import BestModel, best_model_of
from sparse_jax.training.build import Job, make_job
from sparse_jax.training.checkpoint import Checkpoints
from sparse_jax.training.compilation_cache import (
    show_cache_folder,
    use_compilation_cache,
)
from sparse_jax.training.config_file import read_settings
from sparse_jax.training.feed import usage_text
from sparse_jax.training.kl_budget import KlBudget
from sparse_jax.training.loop import Loop
from sparse_jax.training.objective import Evaluated
from sparse_jax.training.optimizer import averaged
from sparse_jax.training.other_names import name_hint
from sparse_jax.training.output_folder import (
    CONFIG,
    NAMED,
    STREAM,
    require_run,
    require_same_files,
    require_unlocked,
    require_usable,
)
from sparse_jax.training.progress import (
    bytes_shown,
    peak_bytes,
    release_freed_memory,
    show_progress,
    warnings_kept,
)
from sparse_jax.training.recipe_options import SCHEDULE_FREE
from sparse_jax.training.results import (
    Counts,
    adapter_of,
    count_trained,
    draw_pictures,
    kl_of,
    metrics_of,
    optimizer_bytes,
    provenance,
    require_finite,
)
from sparse_jax.training.run_directory import RunDirectory
from sparse_jax.training.settings import Settings
from sparse_jax.training.stop_signals import stop_signals
from sparse_jax.training.trackers import Callbacks, require_trackers

__all__ = ["finetune"]

_log = logging.getLogger(__name__)


def finetune(
    settings: Settings | None = None,
    /,
    *,
    callbacks: Callbacks | None = None,
    metrics: Mapping[str, Metric] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fine-tunes a model on a task and writes a run directory.

        finetune(model="bert-base-uncased", task="mrpc", output="runs/mrpc",
                 method=Sparse(density=0.01), optimizer=optax.adamw(1e-3))

    Everything is checked before the directory is created. It then holds `config.json`,
    `metrics.jsonl`, `metrics.json`, `adapter.safetensors` and `curve.png`. SIGINT and
    SIGTERM let it finish the current update and save a checkpoint.

    Args:
      settings: what to do.
      callbacks: functions to call after updates, evaluations and checkpoints.
      metrics: functions of labels and predictions by name, reported in addition to
        the metrics of a task with labels; one may choose the best model. Arguments are
        class indices `[N]`, 0 or 1 `[N, C]` for sets of labels, or values `[N]`. Lower
        is better if the name has the word `loss`, `error`, `mae` or `mse`.
      **options: fields of `Settings`, instead of `settings` or overriding them. With
        `resume`, the rest are those of the run in `output`.

    Returns:
      What `metrics.json` holds: `eval` (metric -> value on the first evaluation
      split, those of other splits with the split's name), `trained_parameters`,
      `trained_parameters_without_head`, `optimizer_bytes`, `adapter_bytes`,
      `seconds_per_step` (median, without steps that compile), `steps`, `examples`
      (by split: used, of these truncated, and dropped), `warnings`, and more. A
      `dry_run` returns what is known before the first update.

    Raises:
      InputError: for anything wrong with the settings or the files they name, and if
        the loss is not finite for many batches in a row.
      KeyboardInterrupt: after SIGINT.
      SystemExit: after SIGTERM.
    """
    _require_names(options, callbacks)
    if settings is None and options.get("resume") and "model" not in options:
        config = Path(options.get("output", "")) / CONFIG
        require_run(config)
        options = {**read_settings(config, options), **options}
    run = Settings(**options) if settings is None else replace(settings, **options)
    with warnings_kept() as warnings:
        use_compilation_cache(not run.no_cache)
        return _finetune(run, warnings, callbacks or Callbacks(), metrics)


def _require_names(options: Mapping[str, object], callbacks: object) -> None:
    """Raises for an argument that `finetune` does not have."""
    known = [one.name for one in fields(Settings)]
    for name in options:
        if name not in known:
            raise InputError(
                f"`{name}` must be left out, got {brief(options[name])}."
                f"{name_hint(name, known)} The arguments are the fields of `Settings`."
            )
    if not isinstance(callbacks, Callbacks | None):
        raise InputError(
            f"`callbacks` must be `Callbacks`, got {brief(callbacks)}. Pass "
            "`Callbacks(on_step=function)`."
        )


def _finetune(
    settings: Settings,
    warnings: list[str],
    callbacks: Callbacks,
    metrics: Mapping[str, Metric] | None,
) -> dict[str, Json]:
    """Fine-tunes; `warnings` are those of the run so far."""
    require_usable(settings)
    require_trackers(settings.report_to or ())
    # Also waits until all have looked at the folder, before the first one writes.
    require_agreement("settings", settings.record())
    on_first_process(lambda: require_unlocked(Path(settings.output)))
    job = make_job(settings, metrics)
    best = best_model_of(job)
    about = provenance(job)
    same = [about[name] for name in (*NAMED, "base_config")]
    require_agreement("model, data and adapters", same)
    started = () if job.start is None else job.start.dense
    fresh = [leaf for leaf in job.base.new if leaf not in started]
    if fresh and is_first_process():
        folder, new = job.base.folder, listed(fresh)
        _log.warning(
            "newly initialized, as `%s` has none for this task: %s", folder, new
        )
        roles = jax.tree.leaves(job.method.roles(job.base.params), is_leaf=is_role)
        frozen = {role.name for role in roles if role.kind == FROZEN}
        if left := [leaf for leaf in fresh if leaf in frozen]:
            heads = sorted({f"'^{leaf.partition('/')[0]}/'" for leaf in left})
            _log.warning(
                "newly initialized, and not trained: %s. `dense` replaces the head, "
                "and has to match it too: add %s", listed(left), " and ".join(heads),
            )  # fmt: skip
    if settings.dry_run:
        if settings.resume:
            require_same_files(Path(settings.output), about)
        with job.base.placement.active():
            return {**_dry_run(job), "warnings": warnings}
    directory = RunDirectory.create(settings, about)
    with closing(directory):
        if settings.resume and (found := directory.finished()):
            _log.info("the run in %s is complete: nothing to resume", directory.path)
            return found
        show_cache_folder()
        directory.callbacks = callbacks
        with job.base.placement.active():
            return _run(job, directory, warnings, best)


def _run(
    job: Job, directory: RunDirectory, warnings: list[str], best: BestModel | None
) -> dict[str, Json]:
    """Trains, from the last checkpoint if there is one, and returns the metrics."""
    tuner, placement = job.tuner(), job.base.placement
    runner, key = MeshRunner(tuner, placement), jax.random.key(job.settings.seed)
    before = before_selection(tuner) if job.select_after else None
    checkpoints = Checkpoints(directory, tuner, placement, job.settings.keep, before)

    average = lambda state: state
    if job.settings.optimizer == SCHEDULE_FREE:
        of = [
            jax.jit(functools.partial(averaged, one or tuner))
            for one in (before, tuner)
        ]
        average = lambda state: of[bool(jax.tree.leaves(state.support))](state)

    def patch(state: CompactState, update: int) -> None:
        state = average(state)
        # All processes hold parts of it; the first one writes it.
        adapter = adapter_of(job, tuner, state, checkpoints.earlier)
        directory.patch(
            lambda folder: save_patches(folder, adapter, job.base.model, update=update)
        )

    state = runner.init(job.base.params, key)
    if job.start is not None and job.start.added:
        state = runner.start(state, job.start.added)
    budget = None if job.text is None else KlBudget(job, tuner, state)
    counts = count_trained(job.method, state.params, state.added, job.head, job.sampler)
    _announce(job, counts, optimizer_bytes(state))
    release_freed_memory()
    first = None if before is None else MeshRunner(before, placement)
    if first is not None:
        state = first.take_over(state, key)
    # A run that is stopped still writes the checkpoint it has begun.
    with closing(checkpoints), stop_signals() as signals:
        state, at = checkpoints.restore(state, budget and budget.begin)
        directory.rewind(at.batches)
        if (stream := job.feed.stream) is not None:
            index = directory.checkpoints / STREAM
            stream.keep_index(index, is_writer=is_first_process())
        directory.show(job.settings.report_to or (), at.batches)
        if job.settings.resume:
            _log.info("resuming after update %d of %d", at.batches, job.total)
        with show_progress(job.total, at.batches) as progress:
            of_average = _evaluate(job, tuner, state)
            evaluate = lambda state: of_average(average(state))
            loop = Loop(
                job, runner, evaluate, directory, checkpoints, progress, signals, patch,
                first, budget, best,
            )  # fmt: skip
            state, at = loop.run(state, at)
            step, best_step = at.batches, checkpoints.pinned
            if best_step is not None and best_step != step:
                found = checkpoints.at_pinned(state)
                best_step = None if found is None else best_step
                state, step = found or state, best_step or step
    if job.settings.patch_every is not None:
        patch(state, at.batches)
    state = average(state)
    # All processes hold parts of it; the first one writes it.
    adapter = adapter_of(job, tuner, state, checkpoints.earlier)
    held = {} if budget is None else kl_of(job, directory.rows)
    adapter = replace(adapter, settings={**adapter.settings, **held})
    require_finite(adapter)
    size = directory.add_adapter(lambda path: save_adapter(path, adapter))
    if is_first_process():
        draw_pictures(job, directory)
    metrics = {
        **metrics_of(job, directory.rows, step),
        "trained_parameters": counts.trained,
        "trained_parameters_without_head": counts.trained_without_head,
        "total_parameters": counts.total,
        "optimizer_bytes": optimizer_bytes(state),
        "adapter_bytes": size,
        "steps": at.batches - at.skipped,
        "best_step": best_step,
        "skipped_batches": at.skipped,
        "peak_memory_bytes": peak_bytes(),
        "learning_rate": job.settings.resolved_learning_rate,
        **held,
        "examples": {
            name: use._asdict()
            for name, use in job.feed.usage_after(at.batches).items()
        },
        "warnings": warnings,
    }
    directory.finish(metrics)
    return metrics


def _dry_run(job: Job) -> dict[str, Json]:
    """Logs what a run would train, from the shapes of its state; returns numbers."""
    runner = MeshRunner(job.tuner(), job.base.placement)
    state = CompactState(*runner.abstract(job.base.params, jax.random.key(0)))
    counts = count_trained(job.method, state.params, state.added, job.head, job.sampler)
    size = optimizer_bytes(state)
    _announce(job, counts, size)
    batch = next(iter(job.feed.train(0)))
    *rows, length = np.shape(batch["input_ids"])
    _log.info(
        "batch 1 of %s in an epoch: %d x %d tokens, %s without padding; a dry run ends "
        "here", f"{job.feed.batches_per_epoch:,}", np.prod(rows), length,
        f"{int(np.sum(batch['attention_mask'])):,}",
    )  # fmt: skip
    return {
        "trained_parameters": counts.trained,
        "trained_parameters_without_head": counts.trained_without_head,
        "total_parameters": counts.total,
        "optimizer_bytes": size,
        "steps": job.total,
        "examples": {name: use._asdict() for name, use in job.feed.usage.items()},
    }


def _announce(job: Job, counts: Counts, state_bytes: int) -> None:
    """Logs what is trained and on what; a warning if examples were too long."""
    settings, share = job.settings, counts.trained / counts.total
    rate, layers = settings.resolved_learning_rate, ""
    if job.sampler is not None:
        some, every = job.sampler.num_active, job.sampler.num_layers
        at_a_time = "" if job.sampler.is_constant else " at a time"
        layers = f", {some} of {every} layers{at_a_time} by {settings.sampler_word}"
    _log.info(
        "training %s%s: %s of %s parameters (%.3g %%), %s of state, %d updates %s",
        settings.method_word, layers, f"{counts.trained:,}", f"{counts.total:,}",
        100 * share, bytes_shown(state_bytes), job.total,
        "with the optimizer that was passed" if rate is None else
        f"at a learning rate of {rate:g}",
    )  # fmt: skip
    updates, period = job.total - job.select_after, job.sampler and job.sampler.period
    if period is not None and updates <= period:
        _log.warning(
            "%s draws the layers evenly in %d updates: its first probe comes after "
            "%d. Lower `probe_every`", settings.sampler_word, updates, period
        )  # fmt: skip
    if (stream := job.feed.stream) is not None:
        _log.info(
            "train: `%s` is read during the run, %s records at a time",
            stream.path, f"{stream.window:,}",
        )  # fmt: skip
    for split, usage in job.feed.usage.items():
        level = logging.WARNING if usage.truncated or usage.dropped else logging.INFO
        _log.log(level, usage_text(split, usage, job.feed.max_length))


def _evaluate(
    job: Job, tuner: Tuner, state: CompactState
) -> Callable[[CompactState], Evaluated]:
    """Returns the evaluation of states like this one."""
    evaluate = job.objective.make_evaluate(
        job.base.model, tuner.attach(state), job.feed, job.base.placement
    )
    return lambda state: evaluate(state.params, tuner.attach(state).trained)

"""From settings to a run that can start: its method, its sampler, its tuner."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import jax
import numpy as np
import optax

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.calculus import shared_leaves
from sparse_jax.adapter.use import require_base
from sparse_jax.compact.avoid import entries_to_avoid, is_own
from sparse_jax.compact.compact import Compact, Loss, Tuner
from sparse_jax.compact.in_backward import InBackward
from sparse_jax.compact.layerwise import Layerwise
from sparse_jax.compact.model_taps import in_stack
from sparse_jax.data.batches import Batches
from sparse_jax.data.metrics import Metric
from sparse_jax.data.read_rows import require_file
from sparse_jax.errors import InputError
from sparse_jax.interchange.open_adapter import open_adapter, open_one_of
from sparse_jax.methods.method import Method
from sparse_jax.methods.registry import METHODS
from sparse_jax.models.attachment import Recompute
from sparse_jax.models.functional import Params
from sparse_jax.models.hf.tensor_names import modules_called
from sparse_jax.params.names import leaf_names
from sparse_jax.samplers.registry import SamplerOptions, make_sampler, num_active
from sparse_jax.samplers.sampler import Sampler
from sparse_jax.samplers.simple import Static
from sparse_jax.sharding.placement import Placement
from sparse_jax.supports.roles import DENSE, SPARSE, is_role
from sparse_jax.training.feed import Feed
from sparse_jax.training.forgetting import text_batches
from sparse_jax.training.objective import Objective
from sparse_jax.training.optimizer import Schedule, make_optimizer, schedule_of
from sparse_jax.training.recipe_options import COOLDOWN, GLOBAL_NORM, PREVIOUS_NORM
from sparse_jax.training.settings import Settings
from sparse_jax.training.setup import Base, load_model_and_data
from sparse_jax.training.start import start_from
from sparse_jax.transforms.clipping import clip_by_previous_norm
from sparse_jax.transforms.selections import Selections

__all__ = ["Job", "head_rules", "make_job", "make_tuner", "method_of", "sampler_of"]

_CLIPS = {
    GLOBAL_NORM: optax.clip_by_global_norm,
    PREVIOUS_NORM: clip_by_previous_norm,
}


@dataclass(frozen=True, eq=False)
class Job:
    """A run that can start."""

    settings: Settings
    objective: Objective
    base: Base
    method: Method
    sampler: Sampler | None  # of the layers; None trains all
    head: tuple[str, ...]  # rules of the leaves that counts leave out
    feed: Feed
    earlier: tuple[Adapter, ...] = ()  # whose entries are left alone
    start: Adapter | None = None  # that the run goes on from; `base` has its entries
    text: Batches | None = None  # to compare with the base on

    @functools.cached_property
    def avoid(self) -> dict[str, jax.Array]:
        """Supports of the entries that must not be trained."""
        return entries_to_avoid(
            self.tuner(), self.base.params, self.earlier, new=self.base.new
        )

    @property
    def total(self) -> int:
        """Batches of the run."""
        batches = self.settings.epochs * self.feed.batches_per_epoch
        return min(batches, self.settings.max_steps or batches)

    @functools.cached_property
    def select_after(self) -> int:
        """Updates before entries are chosen, of all that is trained but these."""
        asked, roles = self.settings.select_after, self.method.roles(self.base.params)
        kinds = {role.kind for role in jax.tree.leaves(roles, is_leaf=is_role)}
        if asked and not {SPARSE, DENSE} <= kinds:
            lacks = "chooses no entries"
            if SPARSE in kinds:
                lacks = "trains no parameters in full"
            raise InputError(
                f"`select_after` must be left out with a method that {lacks}, got "
                f"{asked:g} with {self.settings.method_word!r}. It is the updates of "
                "what is trained in full before entries are chosen."
            )
        updates = round(asked * self.total) if asked < 1 else int(asked)
        if updates >= self.total:
            raise InputError(
                f"`select_after` must be less than {self.total}, the updates of the "
                f"run, got {updates}. A fraction, such as 0.1, fits every run."
            )
        return updates

    def schedule(self, is_selected: bool) -> Schedule | None:
        """Returns that of the learning rate; None if the optimizer has its own.

        The updates before the selection have a warm-up and a decay of their own.
        """
        settings, peak = self.settings, self.settings.resolved_learning_rate
        if peak is None:
            return None
        cooldown = COOLDOWN if settings.cooldown is None else settings.cooldown
        warmup, updates = settings.warmup, self.total - self.select_after
        if not is_selected:
            updates = max(1, self.select_after)
            warmup, cooldown = min(warmup, updates), min(cooldown, COOLDOWN)
        more = (settings.resolved_schedule, cooldown, settings.weight_decay)
        return schedule_of(peak, updates, warmup, *more)

    def tuner(self) -> Tuner:
        """Returns what makes the updates."""
        settings = self.settings
        loss = self.objective.make_loss(
            self.base.model,
            checkpointing=settings.checkpointing,
            label_smoothing=settings.label_smoothing,
            noise=settings.neftune_noise,
        )
        args = (self.method, self.sampler, self.base.placement)
        return make_tuner(settings, loss, *args)


def make_job(settings: Settings, metrics: Mapping[str, Metric] | None = None) -> Job:
    """Loads the data and the model of a run.

    Args:
      settings: of the run.
      metrics: functions of labels and predictions by name, beside those of the task.

    Raises:
      InputError: for anything wrong with the task, its files, the model's folder, the
        rules, or the length.
    """
    # Before a model, which may be large, is read.
    require_file("kl_text", settings.kl_text)
    objective, base, feed = load_model_and_data(settings, metrics=metrics)
    head = head_rules(objective.head, base.new)
    method = method_of(settings, head)
    # Rules are compared with the names of the leaves and of the sites.
    try:
        method.roles(base.params)
        jax.eval_shape(method.added, base.params, jax.random.key(0))
    except InputError as error:
        raise InputError(f"{error}{_translation(settings, base)}") from error
    # What the adapter file cannot hold is found before the training.
    method.to_settings()
    _require_selection(settings, method)
    start = None
    if settings.adapter is not None:
        start = open_adapter(settings.adapter, settings.model, settings.task)
        base, method, start = start_from(start, base, method, objective)
    sampler = sampler_of(settings, base.model.config.num_layers)
    if sampler is not None and sampler.measures:
        sampler = _measured(sampler, base, feed, method)
    earlier = tuple(
        open_one_of("avoid", path, settings.model, settings.task)
        for path in settings.avoid or ()
    )
    for adapter in earlier:
        require_base(adapter, base.hash, base.model, base.folder)
        if start is not None:
            _require_apart(start, adapter, base)
    # Now, while the files are there: the adapter that is written at the end names them.
    _ = base.leaves
    text = None
    if settings.kl_text is not None:
        text = text_batches(settings.kl_text, base, settings)
    job = Job(
        settings, objective, base, method, sampler, head, feed, earlier, start, text
    )
    _require_reselection(job)
    # Before the parameters are donated, and before anything is written.
    _ = job.select_after
    _ = job.schedule(is_selected=True)
    with base.placement.active():
        _ = job.avoid
    return job


def _require_selection(settings: Settings, method: Method) -> None:
    """Raises if settings are about a selection that the method does not make."""
    score = method.ranking
    if settings.select_batches > 1 and not (score and score.needs_gradient):
        raise InputError(
            "`select_batches` must be left out where no gradient chooses entries, got "
            f"{settings.select_batches} with method {settings.method_word!r}. It "
            "belongs to sift with a score of gradients."
        )


def _require_reselection(job: Job) -> None:
    """Raises if entries are to be chosen again where that cannot be done."""
    settings = job.settings
    if settings.reselect_every is None:
        return
    # A run, which reads ahead, could choose by more batches than lie between two
    # selections. `sift`, which sums what it is given, cannot: one rule for both.
    Selections(by=settings.select_batches, every=settings.reselect_every).require()
    has_entries = job.method.ranking is not None
    reasons = {
        "a method that chooses no entries: it belongs to sift": not has_entries,
        "a sampler: train all layers": job.sampler is not None,
        "sharded weights: take a mesh of data alone": bool(job.tuner().shards),
    }
    if reason := next((reason for reason, is_so in reasons.items() if is_so), None):
        raise InputError(
            f"`reselect_every` must be left out with {reason}, got "
            f"{settings.reselect_every}. Or choose entries once."
        )


def _require_apart(start: Adapter, earlier: Adapter, base: Base) -> None:
    """Raises if what a run goes on from has an entry that it is to leave alone."""
    for leaf in shared_leaves(start, earlier):
        if not is_own(leaf, base.new):
            raise InputError(
                f"`adapter` must train no entry of those to avoid, got some of "
                f"`{leaf}` in both. The new adapter would hold them too, and the two "
                "could not be used at once. Leave out one of the options."
            )


def _translation(settings: Settings, base: Base) -> str:
    """Returns our names of the modules that rules call as Hugging Face does."""
    ours = jax.tree.leaves(leaf_names(base.params))
    sentences = []
    for pattern in (*(settings.where or ()), *(settings.dense or ())):
        called = modules_called(base.model.family, pattern)
        modules = [module for module in called if any(module in name for name in ours)]
        if modules and not any(re.search(pattern, name) for name in ours):
            names = " and ".join(f"`{module}`" for module in modules)
            sentences.append(f" What Hugging Face calls {pattern!r} is {names} here.")
    return "".join(sentences)


def head_rules(head: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """Returns the rules of a head: that of the task, and whatever a checkpoint lacks.

    BERT's pooler is part of it only if the checkpoint comes without one, because it
    then starts at random.

    Args:
      head: subtrees of the task.
      new: names of the leaves that the checkpoint does not have.

    Example:
      >>> head_rules(["classifier"], ["classifier/bias", "pooler/bias"])
      ('^classifier/', '^pooler/')
    """
    roots = {*head, *(name.partition("/")[0] for name in new)}
    return tuple(f"^{root}/" for root in sorted(roots))


def method_of(settings: Settings, head: tuple[str, ...]) -> Method:
    """Returns the method that settings ask for.

    Args:
      settings: a run's settings; `dense` replaces the rules of the head.
      head: rules of the leaves that are trained in full, as from `head_rules`.

    Example:
      >>> settings = Settings(model="m", task="cola", output="o", method="bitfit")
      >>> method_of(settings, ("^classifier/",)).dense
      ('bias$', '^classifier/')
    """
    method = settings.method
    if isinstance(method, str):
        return METHODS[method].make(vars(settings), head)
    if method.dense is None:
        method = replace(method, dense=settings.dense or head)
    return method


def sampler_of(settings: Settings, num_layers: int) -> Sampler | None:
    """Returns the sampler that settings ask for, or None to train all layers.

    Raises:
      InputError: if its numbers do not fit a model of so many layers.

    Example:
      >>> settings = Settings(model="m", task="mrpc", output="o", sampler="ist")
      >>> sampler_of(settings, 12).num_active
      3
    """
    if settings.sampler is None:
        return None
    if isinstance(settings.sampler, Sampler):
        if settings.sampler.num_layers != num_layers:
            raise InputError(
                f"`num_layers` of the sampler must be {num_layers}, the layers of the "
                f"model, got {settings.sampler.num_layers}."
            )
        return settings.sampler
    names = [field.name for field in fields(SamplerOptions)]
    options = {name: getattr(settings, name) for name in names}
    number = num_active(options.pop("active"), num_layers)
    word = settings.sampler
    return make_sampler(word, num_layers=num_layers, num_active=number, **options)


def _measured(sampler: Sampler, base: Base, feed: Feed, method: Method) -> Static:
    """Returns the layers that a sampler finds in a model and its first batch."""

    @base.placement.compiled
    def scores(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        states_fn = lambda: (base.model.states(params, batch), batch["attention_mask"])
        return sampler.measure(in_stack(method, params), states_fn)

    batch = next(iter(feed.train(0)))
    if feed.settings.accumulate > 1:
        batch = {name: array[0] for name, array in batch.items()}
    found = np.asarray(scores(base.params, base.placement.put(batch)))
    # Equal scores go to the lower layer; one that is not finite comes last.
    order = np.argsort(-np.nan_to_num(found, nan=-np.inf), kind="stable")
    return Static.of(
        *sorted(order[: sampler.num_active].tolist()), num_layers=sampler.num_layers
    )


def make_tuner(
    settings: Settings,
    loss: Loss,
    method: Method,
    sampler: Sampler | None,
    placement: Placement,
) -> Tuner:
    """Returns what makes the updates of a run.

    Its steps take the `schedule`, unless the settings bring an optimizer.

    Args:
      settings: of the run.
      loss: what it minimizes.
      method: what it trains.
      sampler: of the layers; None trains all of them at every update.
      placement: of the parameters.
    """
    tx, max_norm = settings.optimizer, None
    if isinstance(tx, str):
        by_layer = sampler is not None or settings.update_in_backward
        tx = make_optimizer(settings, is_stacked=not by_layer)
        max_norm = settings.max_grad_norm or None
        if max_norm is not None and sampler is None:
            tx = optax.chain(_CLIPS[settings.clip_by](max_norm), tx)
    shards, axes = placement.shards(method.stack), placement.data_axes
    placed = (settings.accumulate, shards, axes, settings.split_masters)
    if settings.update_in_backward:
        return InBackward(loss, method, tx, *placed)
    if sampler is None:
        return Compact(loss, method, tx, *placed)
    return Layerwise(
        loss,
        method,
        tx,
        *placed,
        sampler=sampler,
        seed=settings.seed,
        max_norm=max_norm,
        restart=settings.restart_layers,
        recompute=cast(Recompute, settings.recompute),
    )

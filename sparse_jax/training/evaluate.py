"""Evaluation of a saved adapter."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.use import apply_adapter, base_folder
from sparse_jax.data.examples import Splits
from sparse_jax.data.files import load_one
from sparse_jax.data.glue import CAUSAL, TASKS, find_task
from sparse_jax.data.metrics import Metric
from sparse_jax.data.read_rows import require_file
from sparse_jax.data.sources import DataSource, one_part, place_of
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.interchange.open_adapter import open_adapter
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.functional import Params
from sparse_jax.models.hf.labels import are_numbers, label_leaves, use_of_head
from sparse_jax.training.feed import Feed
from sparse_jax.training.forgetting import distance_of
from sparse_jax.training.objective import Evaluated, Objective, flattened
from sparse_jax.training.output_folder import CONFIG
from sparse_jax.training.run_files import read_json
from sparse_jax.training.settings import Settings
from sparse_jax.training.setup import Base, load_model_and_data

__all__ = ["adapted", "evaluate_adapter", "opened"]

# What the evaluation of an adapter takes from the run that wrote it.
_log = logging.getLogger(__name__)
_KEPT = (
    "dtype", "seed", "max_length", "batch_size", "loss_on", "packing", "template",
    "held_out", "drop_unlabeled", "columns",
)  # fmt: skip


class Opened(NamedTuple):
    """An adapter, and the settings that it is evaluated by."""

    adapter: Adapter
    settings: Settings


class Adapted(NamedTuple):
    """A base with an adapter on it, and what it is evaluated on."""

    objective: Objective
    base: Base
    feed: Feed
    params: Params
    attachment: Attachment


def evaluate_adapter(
    adapter: str | Path,
    *,
    model: str | None = None,
    task: str | None = None,
    labels: Sequence[str] = (),
    data: "DataSource | None" = None,
    columns: "Mapping[str, str] | str | None" = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    max_eval_samples: int | None = None,
    drop_unlabeled: bool = False,
    mesh: str | None = None,
    text: str | Path | None = None,
    report: bool = False,
    metrics: Mapping[str, Metric] | None = None,
) -> dict[str, Any]:
    """Returns the metrics of an adapter, as its run reported them.

    Args:
      adapter: adapter file, run directory, or folder of PEFT.
      model: the base, folder or id; None is where the adapter was trained, if that is
        a folder or in the cache of the Hub: nothing is fetched that a file names.
      task: None is the task of the adapter.
      labels: of a classifier that does not name them, as is usual for PEFT, in the
        order of its outputs; none takes those that it names.
      data: a file, the folder of the task's files, rows, or what else a run takes; None
        is that of the run, of an adapter alone GLUE on the Hub. Of the file that it
        was trained on, the part held out; of others, all.
      columns: our names of columns -> those of the data; None is as in training.
      batch_size: examples at a time; None is as in training.
      max_length: most tokens of an example; None is as in training.
      max_eval_samples: most examples of every split, spread evenly; None is all.
      drop_unlabeled: whether to leave out rows without a label, as the adapter's run
        may have done.
      mesh: devices to share the work, such as "data=4"; None is one device.
      text: file of texts that the adapter was not trained on, to measure what it has
        changed there. The metrics of `make_comparison` bear the name of a split `text`;
        of a decoder without `data` they are all. A few thousand tokens are enough.
      report: whether to return, as `report`, what `metrics.report` says of every split
        with labels: scores of every class, a confusion matrix, a baseline.
      metrics: functions of labels and predictions by name, as `finetune` takes them.

    Raises:
      InputError: if the adapter cannot be read, the base is another one, or the data
        are wrong or have other labels.
    """
    require_file("text", text)
    passed: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    passed["columns"] = columns
    passed["max_eval_samples"] = max_eval_samples
    passed["drop_unlabeled"] = drop_unlabeled or None
    found = opened(adapter, model, task, labels, data, text, mesh=mesh, **passed)
    settings, splits = found.settings, None
    part = None if settings.is_causal else one_part(settings.data, seed=settings.seed)
    trained = found.adapter.settings.get("data_hash")
    # Of the rows that it was trained on, those that were held out.
    if part is not None and (part.digest is None or part.digest != trained):
        one = load_one(
            find_task(settings.task),
            settings.data,
            found.adapter.labels,
            columns=settings.columns,
            drop_unlabeled=settings.drop_unlabeled,
            seed=settings.seed,
        )
        splits = Splits(one.task, {"validation": one.examples})
    ready = adapted(found, splits, metrics)
    if not settings.is_causal:
        sizes = {n: size for n, size in ready.feed.sizes.items() if n != "train"}
        parts = [f"{size} examples in {name}" for name, size in sizes.items()]
        place = "GLUE of the Hub" if settings.data is None else place_of(settings.data)
        _log.warning("evaluating on %s of %s", " and ".join(parts), place)
    results, reports = Evaluated({"validation": {}}, {})
    if not (text is not None and data is None and settings.is_causal):
        evaluate = ready.objective.make_evaluate(
            ready.base.model, ready.attachment, ready.feed, ready.base.placement
        )
        results, reports = evaluate(ready.params, ready.attachment.trained)
    if text is not None:
        base, ready = ready.base, None
        results["text"] = distance_of(found.adapter, base, text, settings)
    scores: dict[str, Any] = {**flattened(results)}
    return {**scores, "report": reports} if report and reports else scores


def opened(
    adapter: str | Path,
    model: str | None,
    task: str | None,
    labels: Sequence[str],
    data: "DataSource | None",
    text: str | Path | None = None,
    **passed: Any,
) -> Opened:
    """Opens an adapter, and returns it with the settings that it is evaluated by.

    Args:
      adapter, model, task, labels, data, text: as of `evaluate_adapter`.
      **passed: other settings; None is as in training.

    Raises:
      InputError: if it cannot be read, or no task or data are named.
    """
    found = open_adapter(adapter, model, task, labels)
    if not (task or found.task):
        raise InputError(
            "`task` must be given for an adapter that names none, got none. Pass one "
            "of GLUE, or `classification` with the folder of your own data as `data`."
        )
    kept = {name: found.settings.get(name) for name in _KEPT}
    task = task or found.task
    if data is None and text is not None and task.lower() == CAUSAL:
        data = str(text)
    elif data is None and task == found.task:
        kept |= _own_data(Path(adapter))
    else:
        kept["data"] = data
    kept |= {name: value for name, value in passed.items() if value is not None}
    settings = Settings(
        model=str(base_folder(found, model)),
        task=task,
        output="",
        **{"data": data, **{k: v for k, v in kept.items() if v is not None}},
    )
    return Opened(found, settings)


def _own_data(run: Path) -> dict[str, Any]:
    """Returns the data that a run names, if they are on this machine.

    Raises:
      InputError: if they are not.
    """
    config = (run if run.is_dir() else run.parent) / CONFIG
    said = read_json(config).get("settings") if config.is_file() else None
    if not isinstance(said, dict) or said.get("data") is None:
        return {}
    more, data = said.get("eval_data") or (), said["data"]
    places = data if isinstance(data, Mapping) else [data]
    for place in (*places, *(one.partition("=")[2] or one for one in more)):
        # Nothing is fetched that a file names.
        if not isinstance(place, str) or not Path(place).exists():
            raise InputError(
                f"`data` must be given, as that of the run, {brief(place)}, is not "
                "here. Pass the file or folder."
            )
    return {"data": said["data"], "eval_data": tuple(more) or None}


def adapted(
    found: Opened,
    splits: Splits | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Adapted:
    """Returns a base with an adapter on it, and its data.

    Args:
      found: the adapter.
      splits: labeled examples, in place of those that the settings name.
      metrics: functions of labels and predictions by name.

    Raises:
      InputError: if the base is another one, or the data are wrong or have other
        labels.
    """
    adapter, settings = found
    objective, base, feed = load_model_and_data(
        settings, adapter=adapter, splits=splits, metrics=metrics
    )
    _require_labels(adapter, objective)
    _require_same_head(adapter, objective, base)
    params, attachment = apply_adapter(
        base.params, adapter, base_hash=base.hash, model=base.model, new=base.new
    )
    return Adapted(objective, base, feed, params, attachment)


def _require_labels(adapter: Adapter, objective: Objective) -> None:
    """Raises unless the data have the labels that the adapter was trained on."""
    ours, theirs = objective.labels, adapter.labels
    if ours != theirs:
        remedy = "Pass the task it was trained on."
        if are_numbers(theirs) and len(ours) == len(theirs) > 0:
            remedy = (
                "Pass them as `labels`, in the order of its outputs, which the adapter "
                "does not say."
            )
        raise InputError(
            f"`data` must have the labels of the adapter, {listed(theirs) or 'numbers'}"
            f", got {listed(ours) or 'numbers'}. {remedy}"
        )
    # Of one output for each label, one is the largest; or any number are above zero.
    tasks = [TASKS.get(name) for name in (adapter.task, objective.name)]
    are_sets = [task is not None and task.is_multilabel for task in tasks]
    if are_sets[0] != are_sets[1]:
        kinds = ["any number of labels" if one else "one label" for one in are_sets]
        raise InputError(
            f"`data` must have {kinds[0]} for every example, as those that the adapter "
            f"was trained on, got {kinds[1]}. Pass data of its task, {adapter.task}."
        )


def _require_same_head(adapter: Adapter, objective: Objective, base: Base) -> None:
    """Raises if outputs of a head that is in the base belong to other labels since.

    The names of the outputs say which of them is taken for which label.
    """
    before = adapter.settings.get("base_labels")
    now = objective.settings.get("base_labels")
    # Earlier versions did not record them; a head in the adapter needs no names.
    if before is None or now is None:
        return
    if {*label_leaves(base.model)} <= adapter.dense.keys():
        return

    def order(names: Sequence[str]) -> tuple[int, ...] | None:
        config = base.model.config
        size = {"num_labels": len(names) or config.num_labels}
        config = replace(config, **size, label_names=tuple(names) or None)
        return use_of_head(config, adapter.labels).order

    if order(before) != order(now):
        raise InputError(
            "`model` must be the base of the adapter, whose `config.json` has the "
            f"labels {brief(before)}, got {brief(now)} with the same weights. Pass the "
            "`config.json` that the adapter was trained with."
        )

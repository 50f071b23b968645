"""Predictions of a classifier, as JSON lines."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparse_jax.adapter.file import adapter_digest
from sparse_jax.data.batches import eval_batches
from sparse_jax.data.examples import Splits
from sparse_jax.data.files import OneSplit, load_one
from sparse_jax.data.glue import CAUSAL, Task, find_task
from sparse_jax.data.json_lines import JsonLines
from sparse_jax.data.metrics import predicted
from sparse_jax.data.sources import DataSource, one_part
from sparse_jax.errors import InputError
from sparse_jax.params.fields import Json
from sparse_jax.training.evaluate import adapted, opened
from sparse_jax.training.objective import make_outputs

__all__ = ["predict"]


def predict(
    run: str | Path,
    *,
    output: str | Path | None = None,
    data: "DataSource | None" = None,
    columns: "Mapping[str, str] | str | None" = None,
    split: str | None = None,
    model: str | None = None,
    task: str | None = None,
    labels: Sequence[str] = (),
    batch_size: int | None = None,
    max_length: int | None = None,
    mesh: str | None = None,
    overwrite: bool = False,
) -> int:
    """Writes what a classifier predicts, a JSON line for every example.

    A line has the `id` of the example (what it has in a column of that name, `idx`,
    `index` or `guid`, or its number from 0), its `label` if it has one, the
    `prediction` (a label, a list of labels, or a number; label and prediction are equal
    if it is right) and, of labels, their `scores`, which are probabilities. After an
    interruption it continues where it stopped.

    Args:
      run: run directory, adapter file, or folder of PEFT.
      output: file to write; None is standard output.
      data: file, folder, data set or rows to predict, with or without labels; None is
        that of the run, of a single file the part that it held out, unless the file
        has changed.
      columns: our names of columns -> those of the data; None is as in training.
      split: of a folder or a data set; None is the first to evaluate on.
      model, task, labels, batch_size, max_length, mesh: as of `evaluate_adapter`.
      overwrite: whether to replace the file.

    Returns:
      How many lines were written.

    Raises:
      InputError: as of `evaluate_adapter`, or if the file exists or has begun with
        another adapter or other data.
    """
    passed: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    passed["columns"] = columns
    found = opened(run, model, task, labels, data, mesh=mesh, **passed)
    adapter, settings = found.adapter, found.settings
    if settings.is_causal:
        raise InputError(
            f"`run` must have been trained on a task with labels, got {CAUSAL}. Use "
            "`sparse-jax generate`, which writes JSON lines too."
        )
    place, part = settings.data, one_part(settings.data, seed=settings.seed)
    held_out, digest = None, adapter.settings.get("data_hash")
    if data is None and part is not None and settings.eval_data:
        place = [*settings.eval_files.values()][0]
    elif data is None and part is not None and digest and digest == part.digest:
        # The rows of a single file that were not trained on; of a changed one all.
        held_out = settings.resolved_held_out
    one = load_one(
        find_task(settings.task),
        place,
        adapter.labels,
        columns=settings.columns,
        split=split,
        needs_labels=False,
        drop_unlabeled=held_out is not None and settings.drop_unlabeled,
        held_out=held_out,
        seed=settings.seed,
    )
    ready = adapted(found, Splits(one.task, {one.name: one.examples}))
    base, feed = ready.base, ready.feed
    identity: dict[str, Json] = {
        "adapter": adapter_digest(adapter), "data": feed.digest,
        "max_length": feed.max_length,
    }  # fmt: skip
    outputs_of = make_outputs(base.model, ready.attachment, base.placement)
    size, trained = settings.batch_size, ready.attachment.trained
    batches = eval_batches(feed.examples[one.name], size)
    with JsonLines(output, identity, overwrite) as lines:
        # Whole batches, so that the rounding is that of a run that was not interrupted.
        first = lines.done // size
        rest = replace(batches, plan=batches.plan[first:])
        for number, batch in enumerate(rest, first):
            said = [*_predictions(one.task, outputs_of(ready.params, trained, batch))]
            begin = number * size
            rows = range(max(begin, lines.done), begin + len(said))
            lines.add([_line(one, row, said[row - begin]) for row in rows])
        return len(one.ids) - lines.done


def _line(one: OneSplit, row: int, said: Mapping[str, object]) -> dict[str, object]:
    """Returns the line of an example."""
    label = {} if one.labels[row] is None else {"label": one.labels[row]}
    return {"id": one.ids[row], **label, **said}


def _predictions(task: Task, outputs: np.ndarray) -> Iterator[dict[str, object]]:
    """Yields what is predicted for every example."""
    from scipy.special import expit, softmax  # half of the time of this library

    is_finite = [bool(np.isfinite(row).all()) for row in outputs]
    predictions, names = predicted(task, outputs), task.labels or ()
    wide = outputs.astype(np.float64)
    scores = expit(wide) if task.is_multilabel else softmax(wide, axis=-1)
    for row, prediction in enumerate(predictions):
        # JSON has no other numbers.
        if not is_finite[row]:
            yield {"prediction": None}
        elif task.is_regression:
            yield {"prediction": float(prediction)}
        else:
            shares = (float(f"{score:.6g}") for score in scores[row])
            answer: object = (
                names[int(prediction)]
                if not task.is_multilabel
                else [
                    name for name, fits in zip(names, prediction, strict=True) if fits
                ]
            )
            shown = dict(zip(names, shares, strict=True))
            yield {"prediction": answer, "scores": shown}

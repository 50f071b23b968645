"""The command `sparse-jax evaluate`."""

import json
import re

from typer import Argument

from sparse_jax.cli.options import (
    ADAPTER,
    AGAIN,
    BASE,
    BATCH_SIZE,
    DEVICES,
    LABELS,
    MAX_LENGTH,
    option,
    take_devices,
    takes_settings,
)
from sparse_jax.errors import InputError, brief

__all__ = ["evaluate"]


@takes_settings("columns", "max_eval_samples", "drop_unlabeled", "mesh")
def evaluate(
    *,
    run: str | None = Argument(None, help=ADAPTER, show_default=False),
    adapter: str | None = AGAIN,
    model: str | None = BASE,
    task: str | None = option(
        None, "Task to evaluate on.", "the one it was trained on"
    ),
    labels: list[str] | None = LABELS,
    columns: str | None,
    data: str | None = option(
        None,
        "File to evaluate on, or folder of the task's files.",
        "the data of the run; for an adapter file, GLUE from the Hub",
    ),
    batch_size: int | None = BATCH_SIZE,
    max_length: int | None = MAX_LENGTH,
    max_eval_samples: int | None,
    drop_unlabeled: bool,
    mesh: str | None,
    devices: int | None = DEVICES,
    text: str | None = option(
        None,
        "File of texts that the adapter was not trained on, to measure how much the "
        "model changed: for a decoder, KL to the base (nats per token) and perplexity.",
        "none",
    ),
) -> None:
    """Evaluate a saved adapter, and print its metrics as JSON.

    For classification, `report` has per-class scores, a confusion matrix (rows are true
    classes) and the score of always predicting the most frequent class.
    """
    if (run is None) == (adapter is None):
        found = "none" if run is None else f"{brief(run)} and {brief(adapter)}"
        raise InputError(
            f"`run` must be given once, as the argument or by --adapter, got {found}. "
            "Pass the folder of a run, as in `sparse-jax evaluate runs/mrpc`."
        )
    take_devices(devices, mesh=mesh)
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.training.evaluate import evaluate_adapter

    metrics = evaluate_adapter(
        run or adapter or "",
        model=model,
        task=task,
        labels=labels or (),
        data=data,
        columns=columns,
        batch_size=batch_size,
        max_length=max_length,
        max_eval_samples=max_eval_samples,
        drop_unlabeled=drop_unlabeled,
        mesh=mesh,
        text=text,
        report=True,
    )
    lines = json.dumps(metrics, indent=2, ensure_ascii=False)
    # A class is a line, and so is a row of a confusion matrix.
    joined = lambda found: re.sub(r"\s*\n\s*", " ", found[0]).strip()
    print(re.sub(r"(?<=[\[{])\n {4,}[^][{}]+(?=[\]}])", joined, lines))

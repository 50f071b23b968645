"""The command `sparse-jax evaluate`."""

import json
import re

from sparse_jax.cli.options import (
    ADAPTER,
    BASE,
    BATCH_SIZE,
    DEVICES,
    LABELS,
    MAX_LENGTH,
    option,
    take_devices,
    takes_settings,
)

__all__ = ["evaluate"]


@takes_settings("columns", "max_eval_samples", "drop_unlabeled", "mesh")
def evaluate(
    *,
    adapter: str = option(..., ADAPTER),
    model: str | None = BASE,
    task: str | None = option(
        None, "Task to evaluate on.", "the one it was trained on"
    ),
    labels: list[str] | None = LABELS,
    columns: str | None,
    data: str | None = option(
        None,
        "File to evaluate on, or folder of the task's files.",
        "that of the run; of an adapter alone GLUE from the Hub",
    ),
    batch_size: int | None = BATCH_SIZE,
    max_length: int | None = MAX_LENGTH,
    max_eval_samples: int | None,
    drop_unlabeled: bool,
    mesh: str | None,
    devices: int | None = DEVICES,
    text: str | None = option(
        None,
        "File of texts that the adapter was not trained on: the change of the model "
        "there, for a decoder KL to the base and perplexity, in nats per token.",
        "none",
    ),
) -> None:
    """Evaluate a saved adapter, and print its metrics as JSON.

    Of labels, `report` has scores of every class, a confusion matrix (rows are true
    classes) and the score of always predicting the most frequent one.
    """
    take_devices(devices, mesh=mesh)
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.training.evaluate import evaluate_adapter

    metrics = evaluate_adapter(
        adapter,
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

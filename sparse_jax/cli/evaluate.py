"""The command `sparse-jax evaluate`."""

import json

from sparse_jax.cli.options import (
    ADAPTER,
    BASE,
    DEVICES,
    option,
    take_devices,
    takes_settings,
)

__all__ = ["evaluate"]


@takes_settings("data", "drop_unlabeled", "mesh")
def evaluate(
    *,
    adapter: str = option(..., ADAPTER),
    model: str | None = BASE,
    task: str | None = option(
        None, "Task to evaluate on.", "the one it was trained on"
    ),
    labels: list[str] | None = option(
        None,
        "Label of a classifier whose adapter has only numbers for them, as those of "
        "PEFT mostly do; repeated, in the order of its outputs.",
        "those that it names",
        metavar="<str>",
    ),
    data: str | None,
    batch_size: int | None = option(None, "Examples per batch.", "as in training"),
    max_length: int | None = option(
        None,
        "Maximum number of tokens per example; longer ones are truncated.",
        "as in training",
    ),
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
    """Evaluate a saved adapter, and print its metrics as JSON."""
    take_devices(devices, mesh=mesh)
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.training.evaluate import evaluate_adapter

    metrics = evaluate_adapter(
        adapter,
        model=model,
        task=task,
        labels=labels or (),
        data=data,
        batch_size=batch_size,
        max_length=max_length,
        drop_unlabeled=drop_unlabeled,
        mesh=mesh,
        text=text,
    )
    print(json.dumps(metrics, indent=2))

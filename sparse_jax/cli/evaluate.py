"""The command `sparse-jax evaluate`."""

import json
from typing import Annotated

from sparse_jax.cli.options import (
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
    adapter: Annotated[str, option("Adapter file, or the folder of a run.")],
    model: Annotated[str | None, BASE] = None,
    task: Annotated[
        str | None, option("Task to evaluate on.", "the one it was trained on")
    ] = None,
    data: str | None,
    batch_size: Annotated[
        int | None, option("Examples at a time.", "as in training")
    ] = None,
    max_length: Annotated[
        int | None,
        option(
            "Most tokens of an example; longer ones are truncated.", "as in training"
        ),
    ] = None,
    drop_unlabeled: bool,
    mesh: str | None,
    devices: Annotated[int | None, DEVICES] = None,
) -> None:
    """Evaluate a saved adapter, and print its metrics as JSON."""
    take_devices(devices, mesh=mesh)
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.training.evaluate import evaluate_adapter

    metrics = evaluate_adapter(
        adapter,
        model=model,
        task=task,
        data=data,
        batch_size=batch_size,
        max_length=max_length,
        drop_unlabeled=drop_unlabeled,
        mesh=mesh,
    )
    print(json.dumps(metrics, indent=2))

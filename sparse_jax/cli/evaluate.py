"""The command `sparse-jax evaluate`."""

import json
from typing import Annotated

from sparse_jax.cli import options
from sparse_jax.cli.options import take_devices

__all__ = ["evaluate"]


def evaluate(
    adapter: Annotated[str, options.ADAPTER],
    model: Annotated[str | None, options.BASE] = None,
    task: Annotated[str | None, options.ADAPTER_TASK] = None,
    data: Annotated[str | None, options.DATA] = None,
    batch_size: Annotated[int | None, options.BATCH] = None,
    max_length: Annotated[int | None, options.ADAPTER_LENGTH] = None,
    drop_unlabeled: Annotated[bool, options.DROP_UNLABELED] = False,
    mesh: Annotated[str | None, options.MESH] = None,
    devices: Annotated[int | None, options.DEVICES] = None,
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

"""The command `sparse-jax predict`."""

import sys

from typer import Argument

from sparse_jax.cli.options import (
    ADAPTER,
    BASE,
    BATCH_SIZE,
    DEVICES,
    LABELS,
    MAX_LENGTH,
    OVERWRITE,
    option,
    take_devices,
    takes_settings,
)
from sparse_jax.errors import printable

__all__ = ["predict"]


@takes_settings("columns", "mesh")
def predict(
    *,
    run: str = Argument(..., help=ADAPTER),
    output: str | None = option(
        None, "File of JSON lines to write.", "standard output"
    ),
    columns: str | None,
    data: str | None = option(
        None,
        "File or folder to predict, with or without labels.",
        "the evaluation data of the run",
    ),
    split: str | None = option(
        None, "Split of a folder, such as test.", "the first evaluation split"
    ),
    model: str | None = BASE,
    task: str | None = option(
        None, "Task to read the data for.", "the one it was trained on"
    ),
    labels: list[str] | None = LABELS,
    batch_size: int | None = BATCH_SIZE,
    max_length: int | None = MAX_LENGTH,
    mesh: str | None,
    devices: int | None = DEVICES,
    overwrite: bool = OVERWRITE,
) -> None:
    """Predict labels or values, and write them as JSON lines.

    Each line has the id, the prediction, the scores of the labels, and the label if the
    data has one. After an interruption, the same command continues where it stopped.
    """
    take_devices(devices, mesh=mesh)
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.training.predict import predict

    count = predict(
        run,
        output=output,
        data=data,
        columns=columns,
        split=split,
        model=model,
        task=task,
        labels=labels or (),
        batch_size=batch_size,
        max_length=max_length,
        mesh=mesh,
        overwrite=overwrite,
    )
    if output is not None:
        noun = "line" if count == 1 else "lines"
        print(f"{count:,} {noun} in {printable(output)}", file=sys.stderr)

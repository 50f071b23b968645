"""The command `sparse-jax export`."""

import typer

from sparse_jax.cli.options import BASE, option
from sparse_jax.interchange.targets import TARGETS

__all__ = ["export"]


def export(
    run: str = typer.Argument(help="Folder of a run or of PEFT, or an adapter file."),
    to: str = option(
        ..., "; ".join(f"{word}: {one.help}" for word, one in TARGETS.items()) + "."
    ),
    output: str = option(..., "New or empty folder to write."),
    model: str | None = BASE,
    dtype: str | None = option(
        None,
        "Dtype of a merged model or a patch: float32, bfloat16 or float16.",
        "that of the training",
    ),
    shard_size: str | None = option(
        None, "Maximum size of a file of a merged model, such as 500MB.", "5GB"
    ),
    peft_type: str | None = option(
        None, "PEFT type of a sparse adapter: shira or supertuning.", "shira"
    ),
    license: str | None = option(
        None, "License of the adapter, by its name on the Hub, such as mit.", "none"
    ),
    push: str | None = option(
        None,
        "Repository on the Hub to upload the folder to; created as private if it does "
        "not exist. Uses the login of `hf auth login`, or HF_TOKEN.",
        "none",
    ),
) -> None:
    """Write what a run trained for other libraries, with a model card."""
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.training.export import export as write

    options = {"dtype": dtype, "shard_size": shard_size, "peft_type": peft_type}
    folder = write(
        run, to=to, output=output, model=model, license=license, push=push, **options
    )
    print(folder)

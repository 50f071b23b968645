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
    output: str = option(..., "Folder to write, a new or an empty one."),
    model: str | None = BASE,
    dtype: str | None = option(
        None,
        "Of a merged model or a patch: float32, bfloat16 or float16.",
        "that of the training",
    ),
    shard_size: str | None = option(
        None, "Most bytes of a file of a merged model, such as 500MB.", "5GB"
    ),
    peft_type: str | None = option(
        None, "Of a sparse adapter for PEFT: shira or supertuning.", "shira"
    ),
    license: str | None = option(
        None, "License of what was trained, as the Hub names it, such as mit.", "none"
    ),
    push: str | None = option(
        None,
        "Repository on the Hub to upload the folder to, made private if there is "
        "none. The login is that of `hf auth login`, or HF_TOKEN.",
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

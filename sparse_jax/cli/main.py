"""The command `sparse-jax`."""

import logging
import sys
from typing import Annotated, Any

import typer

from sparse_jax.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Fine-tune pre-trained Transformers by training only what matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# JAX and everything on it is imported in the commands: `--help` has to be quick.


@app.command()
def finetune(
    model: Annotated[str, typer.Option(help="Folder of a pre-trained model, or its id on the Hugging Face Hub.")],
    task: Annotated[str, typer.Option(help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, or classification.")],
    output: Annotated[str, typer.Option(help="Folder to create for config, metrics, adapter and curve.")],
    data: Annotated[str | None, typer.Option(help="Folder with train and dev files (TSV, CSV, JSON, JSON lines). [default: from the Hub]", show_default=False)] = None,
    method: Annotated[str, typer.Option(help="full, head, bitfit, lora, sift, random or magnitude.")] = "sift",
    density: Annotated[float, typer.Option(help="Fraction of entries trained; sift, random, magnitude.")] = 0.008,
    rank: Annotated[int, typer.Option(help="Rank of the added matrices; lora.")] = 8,
    where: Annotated[list[str] | None, typer.Option(help="Regular expression of the parameters (lora: sites) trained by the method; may be repeated. [default: attention]", show_default=False)] = None,
    dense: Annotated[list[str] | None, typer.Option(help="Regular expression of the parameters trained in full; may be repeated. [default: the head]", show_default=False)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak. [default: full 3e-5, sift, random, magnitude 7e-4, others 1e-3]", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per update.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Parts that a batch is computed in, to save memory.")] = 1,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 3,
    max_steps: Annotated[int | None, typer.Option(help="Updates after which to stop. [default: no limit]", show_default=False)] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of an example. [default: 128]", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="Of the parameters: float32 or bfloat16.")] = "float32",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute layers twice to save memory.")] = False,
    seed: Annotated[int, typer.Option(help="Of the new head, the order of the data, and dropout.")] = 0,
    save_every: Annotated[int, typer.Option(help="Updates between two checkpoints, beside every epoch's.")] = 500,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
) -> None:  # fmt: skip
    """Fine-tune a model on a task and save what was trained."""
    options: dict[str, Any] = {**locals()}
    for name in ("where", "dense"):
        options[name] = tuple(options[name]) if options[name] else None
    _show_log()
    from sparse_jax.cli.summary import print_summary
    from sparse_jax.training.finetune import finetune
    from sparse_jax.training.settings import Settings

    settings = Settings(**options)
    try:
        metrics = finetune(settings)
    except KeyboardInterrupt:
        remedy = "Continue with the same command and --resume."
        print(f"stopped. {remedy}", file=sys.stderr)
        raise typer.Exit(130) from None
    print_summary(settings, metrics)


@app.command()
def evaluate(
    adapter: Annotated[str, typer.Option(help="Adapter file, or the folder of a run.")],
    model: Annotated[str | None, typer.Option(help="Folder or id of the base. [default: the adapter's]", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="Name of the task. [default: the adapter's]", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Folder with train and dev files. [default: from the Hub]", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.")] = 32,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of an example. [default: as in training]", show_default=False)] = None,
) -> None:  # fmt: skip
    """Print the metrics of a saved adapter as JSON."""
    import json

    from sparse_jax.training.evaluate import evaluate_adapter

    metrics = evaluate_adapter(
        adapter, model=model, task=task, data=data,
        batch_size=batch_size, max_length=max_length,
    )  # fmt: skip
    print(json.dumps(metrics, indent=2))


def main() -> None:
    """Runs the command; wrong input is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _show_log() -> None:
    """Sends the lines of the progress to standard error."""
    log = logging.getLogger("sparse_jax")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    # absl, which comes with Orbax, gives the root logger a handler of its own.
    log.propagate = False

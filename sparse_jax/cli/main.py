"""The command `sparse-jax`."""

import sys

import typer

from sparse_jax.cli.evaluate import evaluate
from sparse_jax.cli.finetune import finetune
from sparse_jax.cli.generate import generate
from sparse_jax.cli.plan import plan
from sparse_jax.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Fine-tune pre-trained Transformers by training only what matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(finetune)
app.command()(evaluate)
app.command()(generate)
app.command()(plan)


def main() -> None:
    """Runs the command; wrong input is one line on standard error and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

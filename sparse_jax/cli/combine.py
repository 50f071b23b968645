"""The commands `sparse-jax combine` and `sparse-jax compare`."""

from typing import Annotated

import typer

from sparse_jax.cli.options import BASE, option
from sparse_jax.errors import InputError

__all__ = ["combine", "compare"]


def combine(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter files or folders of runs, on one base.")
    ],
    output: str = option(..., "Adapter file to write."),
    weights: list[float] | None = option(
        None,
        "Weight of an adapter; repeat it once for each. -1 subtracts.",
        "1 for each",
        metavar="<float>",
    ),
    head: int = option(
        1, "Number of the adapter whose head, task and labels are used, counted from 1."
    ),
    model: str | None = BASE,
) -> None:
    """Write the weighted sum of adapters as one."""
    if not 1 <= head <= len(adapters):
        raise InputError(
            f"`head` must be in [1, {len(adapters)}], got {head}. It is the number "
            "of the adapter whose head is kept."
        )
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.interchange.source import combine_files

    entries = combine_files(adapters, output, weights, head=head - 1, model=model)
    print(f"{output}: {entries:,} entries")


def compare(
    first: str = typer.Argument(help="Adapter file, or folder of a run or of PEFT."),
    second: str = typer.Argument(help="The other one."),
    model: str | None = BASE,
) -> None:
    """Print how many entries two adapters have in common."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from sparse_jax.adapter.calculus import LeafOverlap, compare_supports
    from sparse_jax.interchange.open_adapter import open_one_of

    paths = {"first": first, "second": second}
    opened = [open_one_of(name, path, model) for name, path in paths.items()]
    found = compare_supports(*opened)
    counts = np.array([*found.values()]).reshape(-1, 3).sum(axis=0)
    total = LeafOverlap(*counts.tolist())
    table = Table("leaf", title="Entries that two adapters train")
    for name in ("first", "second", "shared", "% of union"):
        table.add_column(name, justify="right")
    for leaf, overlap in {**found, "all": total}.items():
        counts = (f"{count:,}" for count in overlap)
        table.add_row(leaf, *counts, f"{100 * overlap.fraction:.3g}")
    Console().print(table)
    for name, one in zip(paths, opened, strict=True):
        if one.added:
            print(f"The arrays that {one.word} adds in {name.upper()} are not counted.")

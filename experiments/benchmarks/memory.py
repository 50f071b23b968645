"""Where are the bytes of a step, and are those of full fine-tuning really gone?

    python -m experiments.benchmarks.memory [--dtype float32] [--checkpointing]

Compiles one step of each method, layers in a loop as on accelerators, and prints what
the compiler reserves: arguments (weights and state), temporaries, and the total. The
state that a trained entry costs is counted from the arrays. Nothing is run; half a
minute on two CPU cores.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.step_time import MODELS, methods
from sparse_jax import Compact, Method

MIB = 2**20
COLUMNS = (
    "method",
    "weights",
    "state",
    "temporary",
    "total",
    "below full",
    "not aliased",
    "state per entry",
)


def nbytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def row(stack: Any, method: Method) -> dict[str, float]:
    """Returns the bytes of one compiled step."""
    tuner = Compact(stack.loss, method, optax.adamw(1e-4))
    key = jax.random.key(0)
    state = jax.eval_shape(tuner.init, stack.params, key)
    state, _ = jax.eval_shape(tuner.select, state, stack.batch, key)
    step = jax.jit(tuner.step, donate_argnums=0)
    memory: Any = step.lower(state, stack.batch, key).compile().memory_analysis()
    held = nbytes(state._replace(params=()))
    moments = nbytes(state.opt_state)
    return {
        "weights": nbytes(state.params),
        "state": held,
        "temporary": memory.temp_size_in_bytes,
        "total": nbytes(state) + memory.temp_size_in_bytes,
        "not aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        # Adam keeps two float32 moments of each trained value.
        "per entry": held / (moments // 8),
    }


def main() -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    for name in args.model:
        dtype = jnp.dtype(args.dtype)
        stack = MODELS[name](dtype, 4, 128, args.checkpointing, unroll=1)
        rows = {
            title: row(stack, method)
            for title, method in methods(args.density, stack.where).items()
        }
        full = rows["full AdamW"]
        dense = nbytes(stack.params) + full["state"]
        table = Table(
            title=f"{name}, {args.dtype}, density {args.density}, MiB",
            caption=f"dense gradients + dense optimizer state: {dense / MIB:.0f} MiB",
        )
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "method" else "right")
        for title, sizes in rows.items():
            parts = ("weights", "state", "temporary", "total")
            cells = [f"{sizes[part] / MIB:.0f}" for part in parts]
            below = f"{(full['total'] - sizes['total']) / MIB:.0f}"
            alias = f"{sizes['not aliased']} B"
            table.add_row(title, *cells, below, alias, f"{sizes['per entry']:.2f} B")
        Console(width=100).print(table)


if __name__ == "__main__":
    main()

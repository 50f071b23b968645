"""Where are the bytes of a step, and are those of full fine-tuning really gone?

    python -m experiments.tables memory [--dtype float32] [--checkpointing]
    python -m experiments.tables memory --scale paper [--plan v5p:2x2x1]

Compiles one step of each method, layers in a loop as on accelerators, and prints what
the compiler reserves: arguments (weights and state), temporaries, and the total. The
state that a trained entry costs is counted from the arrays, also for each choice of how
a run with bfloat16 weights keeps it. Nothing is run; half a minute on two CPU cores. At
the scale of the paper it is Llama-7B at 5 % for a TPU, one row of 2048 tokens, beside
Table 1 of Song et al., 2024; only libtpu has to be there.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.benchmarks.step_time import MODELS, methods
from experiments.command import run_command
from experiments.papers import network_of, print_plan
from experiments.report import SCALES
from sparse_jax import Compact, Method, Settings
from sparse_jax.planning.abstract import abstract_run, held_bytes
from sparse_jax.sharding.mesh import MeshShape

MIB = 2**20
# Table 1: params, gradients, optimizer state, activations.
PARTS = ("params", "gradients", "state", "activations")
PUBLISHED = (
    ("full", "no", 12.55, 12.55, 50.21, 35.72),
    ("full", "yes", 12.55, 12.55, 50.21, 0.81),
    ("SIFT", "no", 12.55, 0.626, 2.51, 35.72),
    ("SIFT", "yes", 12.55, 0.626, 2.51, 0.81),
)
BASE = Settings(model="", task="causal", output="", batch_size=1, dtype="bfloat16")
SIFT = replace(BASE, density=0.05)
SHORT = replace(SIFT, granularity="entry16")
LANES = replace(SIFT, granularity="lane")
LEAST = {"split_masters": True, "moment_dtype": "int8"}
BACKWARD = {"update_in_backward": True, "clip_by": "previous-norm"}
# What a trained entry of a bfloat16 weight is kept in.
CHOICES = {
    "entries": SIFT,
    "entries, bfloat16 first moment": replace(SIFT, moment_dtype="bfloat16"),
    "entries, split masters": replace(SIFT, split_masters=True),
    "entries, both": replace(SIFT, split_masters=True, moment_dtype="bfloat16"),
    "entries, 8-bit moments": replace(SIFT, moment_dtype="int8"),
    "entries, split masters, 8-bit moments": replace(SIFT, **LEAST),
    "entry16, split masters": replace(SHORT, split_masters=True),
    "entry16, both": replace(SHORT, split_masters=True, moment_dtype="bfloat16"),
    "entry16, split masters, 8-bit moments": replace(SHORT, **LEAST),
    "the same, updated in the backward pass": replace(SHORT, **LEAST, **BACKWARD),
    "lanes": LANES,
    "lanes, split masters": replace(LANES, split_masters=True),
    "lanes, both": replace(LANES, split_masters=True, moment_dtype="bfloat16"),
    "lanes, split masters, 8-bit moments": replace(LANES, **LEAST),
    "these too, in the backward pass": replace(LANES, **LEAST, **BACKWARD),
}
KEPT = ("supports", "masters", "optimizer", "gradients")
PARTS_HERE = ("weights", "state", "temporary", "total")


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
        "not_aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        # Adam keeps two float32 moments of each trained value.
        "per_entry": held / (moments // 8),
    }


def choices() -> Result:
    """Returns the bytes of an entry for each of the choices."""
    place = (16, MeshShape(), jax.devices("cpu")[:1])
    rows = []
    for name, settings in CHOICES.items():
        run = abstract_run(network_of("llama-7b"), settings, *place)
        held = held_bytes(run)
        entries = sum(leaf.size for leaf in jax.tree.leaves(run.state.masters))
        sizes = {part: held[part] / entries for part in KEPT}
        rows.append({"choice": name, **sizes, "total": sum(sizes.values())})
    parts = {part: f"{{{part}:.2f}}" for part in (*KEPT, "total")}
    return Result(
        title="bytes of a trained entry of Llama-7B, bfloat16 weights, AdamW",
        rows=rows,
        columns={"choice": "{choice}", **parts},
        panels=(Panel("total", "bytes of an entry"),),
    )


def paper(target: str) -> None:
    """Prints the paper's Table 1 and what the compiler says of the same update."""
    table = Table(title="Llama-7B, 5 %, bfloat16, 1 x 2048 tokens (paper), GB")
    for column in ("method", "checkpointing", *PARTS, "total"):
        table.add_column(column, justify="right" if column in PARTS else "left")
    for name, checkpointing, *sizes in PUBLISHED:
        cells = (f"{size:.2f}" for size in (*sizes, sum(sizes)))
        table.add_row(name, checkpointing, *cells)
    Console(width=100).print(table)
    rows = {
        "full": replace(BASE, method="full"),
        "lora": replace(BASE, method="lora", rank=128),
        "sift": SIFT,
        "sift, lanes": LANES,
        "sift, split masters": replace(SIFT, split_masters=True),
    }
    rows = {name: replace(row, checkpointing=True) for name, row in rows.items()}
    print_plan("llama-7b", rows, length=2048, target=target)


def compare(stack: Any, density: float, title: str) -> Result:
    """Returns the bytes of each method for a model."""
    rows: dict[str, Any] = {
        name: row(stack, method)
        for name, method in methods(density, stack.where).items()
    }
    full = rows["full AdamW"]
    dense = nbytes(stack.params) + full["state"]
    below = {name: full["total"] - sizes["total"] for name, sizes in rows.items()}
    in_mib = lambda sizes: {part: sizes[part] / MIB for part in PARTS_HERE}
    return Result(
        title=title,
        caption=f"dense gradients + dense optimizer state: {dense / MIB:.0f} MiB",
        rows=[
            {"method": name, **sizes, **in_mib(sizes), "below": below[name] / MIB}
            for name, sizes in rows.items()
        ],
        columns={
            "method": "{method}",
            **{part: f"{{{part}:.0f}}" for part in PARTS_HERE},
            "below full": "{below:.0f}",
            "not aliased": "{not_aliased} B",
            "state per entry": "{per_entry:.2f} B",
        },
        panels=(Panel("total", "weights, state and temporaries, MiB"),),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table of the choices, and one for each model."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--scale", choices=SCALES, default=SCALES[0])
    parser.add_argument("--plan", metavar="TARGET", default="v5p:2x2x1")
    parser.add_argument("--model", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args(argv)
    results = [choices()]
    for name in args.model if args.scale != "paper" else ():
        dtype = jnp.dtype(args.dtype)
        stack = MODELS[name](dtype, 4, 128, args.checkpointing, unroll=1)
        title = f"{name}, {args.dtype}, density {args.density}, MiB"
        results.append(compare(stack, args.density, title))
    finish(args.output, *results)
    if args.scale == "paper":
        paper(args.plan)


if __name__ == "__main__":
    run_command(main)

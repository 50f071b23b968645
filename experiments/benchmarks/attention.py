"""What does attention cost on a TPU, by XLA's softmax and by the kernel?

    python -m experiments.benchmarks.attention [--lengths 512 2048] [--heads 32]

Forward and backward of one layer of Llama-7B, one row in bfloat16, compiled ahead of
time for a TPU v5e that need not be there. A time is that of the compiler's schedule,
instructions times the rounds of their loops, or that of its bytes at full bandwidth if
that is longer. The schedule of the kernel counts the blocks that causal attention
leaves out, too: with many blocks it is nearly twice what runs. XLA has all scores at
once here; models, which take some queries at a time, make them once more.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks.lane import (
    BANDWIDTH,
    CLOCK,
    PEAK,
    scheduled_cycles,
    take_compiler,
)
from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from sparse_jax.models.attend_tpu import Reach, attend_in_blocks

WIDTH = 128


class Cost(NamedTuple):
    """What a program needs."""

    seconds: float
    temporaries: int  # bytes


def by_xla(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attends as models do where there is no kernel."""
    seen = jnp.tri(q.shape[1], dtype=bool)[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen)


def by_kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attends as models do on TPUs."""
    segments = jnp.zeros(q.shape[:2], jnp.int32)
    reaches = (Reach(ahead=0),)
    return attend_in_blocks(q, k, v, segments, jnp.int32(0), reaches=reaches)


XLA, KERNEL = "XLA", "kernel"
WAYS = {XLA: by_xla, KERNEL: by_kernel}


def costs(lengths: list[int], heads: int) -> Iterator[tuple[int, dict[str, Cost]]]:
    """Yields the cost of forward and backward in both ways, for each length."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = f"--xla_jf_dump_to={name} --xla_jf_dump_llo_text=true"
        place = take_compiler(options)
        for length in lengths:
            shape = (1, length, heads, WIDTH)
            x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
            yield (
                length,
                {way: _cost(function, x, folder) for way, function in WAYS.items()},
            )


def _cost(
    function: Callable[..., jax.Array], x: jax.ShapeDtypeStruct, folder: Path
) -> Cost:
    """Returns the cost of a function of queries, keys and values, and its gradients."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> object:
        y, back = jax.vjp(function, q, k, v)
        return y, back(dy)

    compiled: Any = jax.jit(both).lower(x, x, x, x).compile()
    cycles = 0
    for path in folder.iterdir():
        if path.name.endswith("-final_bundles.txt") and "TLP" not in path.name:
            text = path.read_text(encoding="utf-8", errors="replace")
            cycles += scheduled_cycles(text)
        path.unlink()
    moved = compiled.cost_analysis()["bytes accessed"]
    seconds = max(cycles / CLOCK, moved / BANDWIDTH)
    return Cost(seconds, compiled.memory_analysis().temp_size_in_bytes)


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--heads", type=int, default=32)
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: the compiler of TPUs is missing; `pip install libtpu` adds it.")
        return
    rows = []
    for length, found in costs(args.lengths, args.heads):
        # Two products forward, and five backward, of which causal attention needs half.
        flops = 7 * 2 * length**2 * args.heads * WIDTH / 2
        row: dict[str, float] = {"tokens": length, "peak_ms": 1e3 * flops / PEAK}
        for way, one in found.items():
            row[f"{way}_ms"] = 1e3 * one.seconds
            row[f"{way}_mib"] = one.temporaries / 2**20
        rows.append(row | {"ratio": found[KERNEL].seconds / found[XLA].seconds})
    result = Result(
        title=f"forward and backward of one row, {args.heads} heads of {WIDTH}, "
        "bfloat16, TPU v5e",
        rows=rows,
        columns={
            "tokens": "{tokens:,}",
            "XLA (ms)": "{XLA_ms:.2f}",
            "temporaries (MiB)": "{XLA_mib:,.0f}",
            "kernel (ms)": "{kernel_ms:.2f}",
            "temporaries of it (MiB)": "{kernel_mib:,.0f}",
            "at the peak (ms)": "{peak_ms:.2f}",
            "kernel / XLA": "{ratio:.2f}",
        },
        panels=(Panel("ratio", "time, kernel / XLA", floor=1),),
    )
    finish(args.output, result)


if __name__ == "__main__":
    main()

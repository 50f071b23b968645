"""What does attention cost on a TPU, by XLA's softmax and by the kernel?

    python -m experiments.benchmarks.attention [--lengths 512 2048] [--heads 32]

Forward and backward of one layer of Llama-7B, one row in bfloat16, compiled ahead of
time for a TPU v5e that need not be there; a minute or two for each length. The time of
XLA is the cycles that the compiler notes beside its parts, that of the kernel its
schedule, instructions times the rounds of their loops; or that of their bytes at full
bandwidth if that is longer. The schedule of the kernel counts the blocks that causal
attention leaves out, too: with many blocks it is nearly twice what runs. XLA has all
scores at once here; models, which take some queries at a time, make them once more.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
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
from experiments.command import run_command
from sparse_jax.models.attend_tpu import Reach, attend_in_blocks
from sparse_jax.planning.cycles import seconds_of
from sparse_jax.planning.target import find_target

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


def compiled(
    function: Callable[..., jax.Array],
    length: int,
    heads: int,
    place: jax.sharding.Sharding,
) -> Any:
    """Returns a function of queries, keys and values, and its gradients, for a TPU."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> object:
        y, back = jax.vjp(function, q, k, v)
        return y, back(dy)

    shape = (1, length, heads, WIDTH)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    return jax.jit(both).lower(x, x, x, x).compile()


def cost_of(program: Any, seconds: float) -> Cost:
    """Returns the cost of a compiled program whose instructions take some time."""
    moved = program.cost_analysis()["bytes accessed"] / BANDWIDTH
    return Cost(max(seconds, moved), program.memory_analysis().temp_size_in_bytes)


def xla_costs(lengths: list[int], heads: int) -> Iterator[Cost]:
    """Yields the cost of XLA's attention for each length."""
    place, chip = take_compiler(), find_target("v5e:2x2").chip
    assert chip is not None
    for length in lengths:
        program = compiled(by_xla, length, heads, place)
        found = seconds_of(program.as_text(), chip, {})
        assert found is not None
        yield cost_of(program, found.cycles)


def scheduled_costs(lengths: list[int], heads: int) -> Iterator[Cost]:
    """Yields the cost of the kernel for each length, by its schedule."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = take_compiler(f"--xla_jf_dump_to={name} --xla_jf_dump_llo_text=true")
        for length in lengths:
            program, cycles = compiled(by_kernel, length, heads, place), 0
            for path in folder.iterdir():
                if path.name.endswith("-final_bundles.txt") and "TLP" not in path.name:
                    text = path.read_text(encoding="utf-8", errors="replace")
                    cycles += scheduled_cycles(text)
                path.unlink()
            yield cost_of(program, cycles / CLOCK)


def kernel_costs(lengths: list[int], heads: int) -> list[Cost]:
    """Returns `scheduled_costs` from a process that writes its schedules to files."""
    words = [sys.executable, "-m", "experiments.benchmarks.attention", "--kernels"]
    words += ["--heads", str(heads), "--lengths", *map(str, lengths)]
    run = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    return [Cost(*found) for found in json.loads(run.stdout.splitlines()[-1])]


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: the compiler of TPUs is missing; `pip install libtpu` adds it.")
        return
    sizes = (args.lengths, args.heads)
    if args.kernels:
        print(json.dumps(list(scheduled_costs(*sizes))))
        return
    rows = []
    ways = {XLA: list(xla_costs(*sizes)), KERNEL: kernel_costs(*sizes)}
    for at, length in enumerate(args.lengths):
        found = {way: costs[at] for way, costs in ways.items()}
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
    run_command(main)

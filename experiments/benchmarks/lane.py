"""What does reaching trained entries cost on a TPU: one by one, by lanes, by rows?

    python -m experiments.benchmarks.lane [--density 0.05]

One layer of Llama-7B, bfloat16, 2048 tokens, compiled ahead of time for a TPU v5e that
need not be there: forward and backward with dense gradients of the seven matrices, and
what packing these gradients and writing the trained entries adds. Of rows and columns
no dense gradient is made: what is packed are the inputs or outputs that their products
need, and these products are as much smaller. A minute or two.

The compiler's numbers have to be chosen with care. For matrix products its cycles agree
with its schedule and with the peak of the machine, but for comparing and selecting they
are several times those of its schedule; so the layer is given as its operations at peak
speed, which no program undercuts. Gathers and scatters have no cycles, and only
`optimal_seconds` counts them; kernels have neither. So lanes are given as the schedule
itself, instructions times the rounds of their loops, or as their bytes at full
bandwidth if that takes longer. A TPU was not at hand to confirm any of this.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.command import run_command
from sparse_jax import ENTRY, LANE, Blocks, Layout
from sparse_jax.supports.channels import taken_channels

PEAK, BANDWIDTH = 197e12, 819e9  # of a TPU v5e, in bfloat16
CLOCK = PEAK / (4 * 128 * 128 * 2)  # four units of 128 x 128 products and sums
TOKENS, WIDTH, INNER, HEADS = 2048, 4096, 11008, 32
ATTENTION, UP, DOWN = (WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH)
COUNTS = {ATTENTION: 4, UP: 2, DOWN: 1}  # matrices of each shape
CHANNELS = {
    "row": Blocks(rows=1, columns=None),
    "column": Blocks(rows=None, columns=1),
}
MATRICES = dict(zip("qkvogud", 4 * [ATTENTION] + 2 * [UP] + [DOWN], strict=True))
# Bundles of instructions, nested in as many loops as there are signs.
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder \S+ (\d+) /\* loop exit test \*/")

Shape = tuple[int, int]


class Program(NamedTuple):
    """A function of arrays, of which the first may be given away."""

    function: Callable[..., Any]
    args: tuple
    donated: tuple[int, ...] = ()

    def compile(self) -> Any:
        """Returns it for a TPU, if the arrays lie on one."""
        jitted = jax.jit(self.function, donate_argnums=self.donated)
        return jitted.lower(*self.args).compile()


def take_compiler(options: str = "") -> jax.sharding.Sharding:
    """Returns where arrays lie on a TPU that is not there."""
    from jax.experimental import topologies

    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": options,
    }
    jax.config.update("jax_platforms", "cpu")
    # A compiled program that is read again has no schedule.
    jax.config.update("jax_enable_compilation_cache", False)
    machine = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return jax.sharding.SingleDeviceSharding(machine.devices[0])


def layer(place: jax.sharding.Sharding) -> Program:
    """Returns forward and backward, with all gradients."""
    at = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    def norm(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
        return (wide * scale).astype(x.dtype)

    def forward(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        h = norm(x)
        q, k, v = ((h @ w[name]).reshape(1, TOKENS, HEADS, -1) for name in "qkv")
        heads = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + heads.reshape(x.shape) @ w["o"]
        h = norm(x)
        return x + (jax.nn.silu(h @ w["g"]) * (h @ w["u"])) @ w["d"]

    def both(w: dict[str, jax.Array], x: jax.Array, dy: jax.Array) -> Any:
        y, back = jax.vjp(forward, w, x)
        return y, back(dy)

    weights = {name: at(*shape) for name, shape in MATRICES.items()}
    x = at(1, TOKENS, WIDTH)
    return Program(both, (weights, x, x))


def reaching(
    layout: Layout, shape: Shape, density: float, place: jax.sharding.Sharding
) -> tuple[Program, Program]:
    """Returns packing the gradient of a matrix, and writing its trained entries."""
    k = layout.size(density, shape)
    empty = jax.eval_shape(lambda: layout.empty(shape, k))
    on_tpu = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    support = on_tpu(empty)
    matrix = on_tpu(jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    packed_shape = layout.packed_shape(support.shape, shape)
    packed = on_tpu(jax.ShapeDtypeStruct(packed_shape, jnp.float32))

    def pack(gradient: jax.Array, support: jax.Array) -> jax.Array:
        return layout.gather(gradient, support).astype(jnp.float32)

    first = Program(pack, (matrix, support))
    if isinstance(layout, Blocks):
        side = shape[0] if layout.columns is None else shape[1]
        x = on_tpu(jax.ShapeDtypeStruct((1, TOKENS, side), jnp.bfloat16))
        first = Program(functools.partial(taken_channels, layout), (x, support))
    return (
        first,
        Program(layout.scatter, (matrix, support, packed), (0,)),
    )


def scheduled_cycles(text: str) -> int:
    """Returns the instructions of a program times the rounds of their loops.

    Example:
      >>> lines = [" 0   :  { a }", "0x1 LB: > { b }", "0x2 :  {}",
      ...          "0x3   : > { scmp.ge.s32.totalorder %s1, 5 /* loop exit test */ }"]
      >>> scheduled_cycles("\\n".join(lines))
      16
    """
    rounds: list[int] = []
    loops: list[int] = []
    bundles: list[tuple[int, ...]] = []
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            # Bundles that only wait do not say where they are.
            is_empty = line[bundle.end() :].startswith("}")
            depth = len(loops) if is_empty else len(bundle[2])
            del loops[depth - (bundle[1] == "LB") :]
            while len(loops) < depth:
                loops.append(len(rounds))
                rounds.append(1)
            bundles.append(tuple(loops))
        if loops and (test := _EXIT.search(line)):
            rounds[loops[-1]] = int(test[1])
    return sum(math.prod(rounds[loop] for loop in bundle) for bundle in bundles)


def kernel_seconds(density: float) -> Iterator[float]:
    """Yields the time of each program of lanes, from the schedule or the bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = take_compiler(f"--xla_jf_dump_to={name} --xla_jf_dump_llo_text=true")
        for shape in COUNTS:
            for program in reaching(LANE, shape, density, place):
                memory = program.compile().memory_analysis()
                moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
                texts = [
                    path.read_text(encoding="utf-8", errors="replace")
                    for path in folder.glob("*-final_bundles.txt")
                    if "TLP" not in path.name
                ]
                for path in folder.iterdir():
                    path.unlink()
                cycles = sum(map(scheduled_cycles, texts))
                yield max(cycles / CLOCK, moved / BANDWIDTH)


def lane_seconds(density: float) -> list[float]:
    """Returns `kernel_seconds` from a process that writes its schedules to files."""
    words = [sys.executable, "-m", "experiments.benchmarks.lane", "--kernels"]
    run = subprocess.run(
        [*words, "--density", str(density)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def layout_seconds(
    layout: Layout, density: float, place: jax.sharding.Sharding
) -> list[float]:
    """Returns the compiler's time of each program of a layout."""
    programs = [p for shape in COUNTS for p in reaching(layout, shape, density, place)]
    return [p.compile().cost_analysis()["optimal_seconds"] for p in programs]


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: the compiler of TPUs is missing; `pip install libtpu` adds it.")
        return
    if args.kernels:
        print(json.dumps(list(kernel_seconds(args.density))))
        return
    place = take_compiler()
    compiled = layer(place).compile()
    floor = compiled.cost_analysis()["flops"] / PEAK
    found = re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())
    times = {
        "entry": layout_seconds(ENTRY, args.density, place),
        "lane": lane_seconds(args.density),
        **{
            word: layout_seconds(layout, args.density, place)
            for word, layout in CHANNELS.items()
        },
    }
    weights = sum(n * math.prod(shape) for shape, n in COUNTS.items())
    dense = 2 * TOKENS * weights / PEAK
    rows = []
    for name, seconds in times.items():
        pack, unpack = (
            sum(n * s for n, s in zip(COUNTS.values(), seconds[i::2], strict=True))
            for i in (0, 1)
        )
        products = dense * (args.density if name in CHANNELS else 1)
        added = (products - dense + pack + unpack) / floor
        ms = {"products": products, "pack": pack, "unpack": unpack}
        ms = {f"{part}_ms": 1e3 * time for part, time in ms.items()}
        rows.append({"layout": name, **ms, "added": added})
    result = Result(
        title=f"one layer of Llama-7B, {TOKENS} tokens, {args.density:.1%}, TPU v5e",
        caption="forward and backward by the compiler's cycles: "
        f"{1e3 * sum(map(int, found)) / CLOCK:.1f} ms, at the peak: {1e3 * floor:.1f}",
        rows=rows,
        columns={
            "": "{layout}",
            "gradients at the peak (ms)": "{products_ms:.2f}",
            "packing (ms)": "{pack_ms:.2f}",
            "unpacking (ms)": "{unpack_ms:.2f}",
            "adds to the peak": "{added:.1%}",
        },
        panels=(Panel("added", "time added, ratio to the layer at the peak"),),
    )
    finish(args.output, result)


if __name__ == "__main__":
    run_command(main)

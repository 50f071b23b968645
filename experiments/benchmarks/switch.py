"""Does switching adapters cost more than copying what it touches?

    python -m experiments.benchmarks.switch [--entries 100e6] [--density 0.05]

Switches between two sparse adapters of 24 arrays, and prints the time beside two
floors, in turn within a round: NumPy writing the same values to the same places twice,
once to take the old adapter off and once to put the new one on, and one copy of all.
Also the programs that were compiled, and the memory that was added. About a minute.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.command import run_command
from sparse_jax import Adapter, AdapterSwitch

NAMES = ("a", "b")
LEAVES = tuple(f"layer {number}" for number in range(24))


def timed(run: Callable[[], object]) -> float:
    """Returns the seconds of a call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def compare(dtype: str, size: int, density: float, rounds: int) -> dict[str, Any]:
    """Returns the row of a dtype."""
    kind, size = jnp.dtype(dtype), size // len(LEAVES)
    random = np.random.default_rng(0)
    places = lambda: random.choice(size, int(size * density), replace=False)
    draw = lambda: {leaf: np.sort(places()).astype(np.int32) for leaf in LEAVES}
    ones = lambda support: {leaf: np.ones(x.size, kind) for leaf, x in support.items()}
    supports = {name: draw() for name in NAMES}
    adapters = {n: Adapter(support, ones(support)) for n, support in supports.items()}
    host, copy = ({leaf: np.zeros(size, kind) for leaf in LEAVES} for _ in range(2))
    switch = AdapterSwitch({leaf: jnp.zeros(size, kind) for leaf in LEAVES}, adapters)

    def write(old: str, new: str) -> None:
        for adapter in (adapters[old], adapters[new]):
            for leaf, support in adapter.support.items():
                host[leaf][support] = adapter.values[leaf]

    def copy_all() -> None:
        for leaf, array in host.items():
            np.copyto(copy[leaf], array)

    compiled = []
    for name in NAMES:
        switch.to(name)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    times: dict[str, list[float]] = {"switch": [], "numpy": [], "copy": []}
    for number in range(rounds):
        old, new = NAMES[number % 2 - 1], NAMES[number % 2]
        times["switch"].append(timed(lambda name=new: switch.to(name)))
        times["numpy"].append(timed(lambda pair=(old, new): write(*pair)))
        times["copy"].append(timed(copy_all))
    jax.monitoring.clear_event_listeners()
    took = np.array(times["switch"])
    entry = 4 + 2 * kind.itemsize
    found = {
        "dtype": dtype,
        "ms": 1e3 * float(np.median(took)),
        "compiled": len(compiled),
        "mib": adapters[NAMES[0]].entries * entry / 2**20,
        "bytes": entry,
    }
    for floor in ("numpy", "copy"):
        ratio = np.quantile(took / np.array(times[floor]), (0.5, 0.25, 0.75))
        keys = (floor, f"{floor}_low", f"{floor}_high")
        found |= dict(zip(keys, map(float, ratio), strict=True))
    return found


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--entries", type=float, default=100e6, help="of all arrays")
    parser.add_argument("--density", type=float, default=0.05, help="of an adapter")
    parser.add_argument("--rounds", type=int, default=20, help="switches")
    args = parser.parse_args()
    rows = [
        compare(dtype, int(args.entries), args.density, args.rounds)
        for dtype in ("float32", "bfloat16")
    ]
    result = Result(
        title=f"a switch between two adapters, {args.density:.0%} of "
        f"{args.entries / 1e6:.0f} M entries",
        rows=rows,
        columns={
            "dtype": "{dtype}",
            "switch, ms": "{ms:.0f}",
            "to NumPy's writes": "{numpy:.2f} ({numpy_low:.2f} to {numpy_high:.2f})",
            "to a copy of all": "{copy:.2f} ({copy_low:.2f} to {copy_high:.2f})",
            "compiled": "{compiled}",
            "memory of an adapter": "{mib:.0f} MiB, {bytes} B/entry",
        },
        panels=(
            Panel(
                "numpy", "time, ratio to NumPy's writes", ("numpy_low", "numpy_high"), 1
            ),
            Panel("copy", "ratio to a copy of all", ("copy_low", "copy_high"), 1),
        ),
    )
    finish(args.output, result)


if __name__ == "__main__":
    run_command(main)

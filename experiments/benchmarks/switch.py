"""Does switching adapters cost more than copying what it touches?

    python -m experiments.benchmarks.switch [--entries 100e6] [--density 0.05]

Switches between two sparse adapters of 24 arrays, and prints the time beside two
floors, in turn within a round: NumPy writing the same values to the same places twice,
once to take the old adapter off and once to put the new one on, and one copy of all.
Also the programs that were compiled, and the memory that was added. About a minute.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from sparse_jax import Adapter, AdapterSwitch

NAMES = ("a", "b")
LEAVES = tuple(f"layer {number}" for number in range(24))


def timed(run: Callable[[], object]) -> float:
    """Returns the seconds of a call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def compare(dtype: str, size: int, density: float, rounds: int) -> dict[str, str]:
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
    ratio = lambda floor: np.percentile(took / np.array(times[floor]), (25, 50, 75))
    spread = lambda three: f"{three[1]:.2f} ({three[0]:.2f} to {three[2]:.2f})"
    entry = 4 + 2 * kind.itemsize
    added = adapters[NAMES[0]].entries * entry / 2**20
    return {
        "dtype": dtype,
        "switch, ms": f"{1e3 * np.median(took):.0f}",
        "to NumPy's writes": spread(ratio("numpy")),
        "to a copy of all": spread(ratio("copy")),
        "compiled": str(len(compiled)),
        "memory of an adapter": f"{added:.0f} MiB, {entry} B/entry",
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=float, default=100e6, help="of all arrays")
    parser.add_argument("--density", type=float, default=0.05, help="of an adapter")
    parser.add_argument("--rounds", type=int, default=20, help="switches")
    options = parser.parse_args()
    rows = [
        compare(dtype, int(options.entries), options.density, options.rounds)
        for dtype in ("float32", "bfloat16")
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

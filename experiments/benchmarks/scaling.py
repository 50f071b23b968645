"""How do time and memory of an update grow with density, length, depth and devices?

    python -m experiments.benchmarks.scaling [--rounds 3]

A Llama 256 wide with random weights, in float32, by SIFT and, but for the density, by
LoRA. One axis is changed at a time, from a density of 1 %, 4 rows of 128 tokens and 4
layers. Times are CPU seconds, medians of updates that are taken in turn; memory is what
the compiler reserves beside arguments. Devices are simulated, with parameters sharded
over "fsdp", and nothing is run there: bytes on one of them, and bytes that one of them
sends or receives in an update. Four minutes on two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.command import run_command
from experiments.papers import llama, network_from
from sparse_jax import Settings
from sparse_jax.planning.abstract import AbstractRun, abstract_run, held_bytes
from sparse_jax.planning.hlo import collectives_of
from sparse_jax.sharding.mesh import MeshShape
from sparse_jax.training.optimizer import schedule_of

MIB = 2**20
ROWS, LENGTH, LAYERS, DENSITY, WORDS = 4, 128, 4, 0.01, 4096
DEVICES = (1, 2, 4, 8)
BASE = Settings(model="", task="causal", output="", batch_size=ROWS)
METHODS = {
    "LoRA": replace(BASE, method="lora"),
    "SIFT": replace(BASE, density=DENSITY),
}
# axis -> its points, and who is measured along it.
AXES: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {
    "density": ((0.001, 0.01, 0.05, 0.2), ("SIFT",)),
    "length": ((64, 128, 256), ("LoRA", "SIFT")),
    "layers": ((2, 4, 8), ("LoRA", "SIFT")),
}
HELD = ("parameters", "masters", "supports", "optimizer")


def run_of(
    method: str, point: Mapping[str, Any], devices: int = 1, rows: int = ROWS
) -> AbstractRun:
    """Returns the shapes of a run at a point of the axes."""
    settings = replace(METHODS[method], batch_size=rows)
    if "density" in point:
        settings = replace(settings, density=point["density"])
    config = llama(256, point.get("layers", LAYERS), 4, 768)
    network = network_from(config | {"vocab_size": WORDS})
    shape = MeshShape(fsdp=devices)
    length = point.get("length", LENGTH)
    return abstract_run(network, settings, length, shape, jax.devices()[:devices])


class Measured:
    """A compiled update with its state."""

    def __init__(self, method: str, point: Mapping[str, Any]):
        run = run_of(method, point)
        self.key, self.seconds = jax.random.key(1), []
        random = np.random.default_rng(0)
        ids = run.batch["input_ids"]
        tokens = random.integers(3, 1000, ids.shape).astype(np.int32)
        ones = lambda leaf: np.ones(leaf.shape, leaf.dtype)
        batch = jax.tree.map(ones, dict(run.batch)) | {"input_ids": tokens}
        self.batch = run.placement.put(batch)
        draw = lambda leaf: 0.02 * jax.random.normal(self.key, leaf.shape, leaf.dtype)
        params = jax.jit(lambda: jax.tree.map(draw, run.state.params))()
        self.state = run.runner.init(params, self.key)
        if jax.tree.leaves(self.state.support):
            self.state, _ = run.runner.select(self.state, self.batch, self.key)
        schedule = schedule_of(1e-4, 1000)
        args = (self.batch, self.key)
        lowered = run.runner.lower(self.state, *args, schedule=schedule)
        compiled: Any = lowered.compile()
        more = {"schedule": schedule}
        self.update = lambda state: compiled(state, *args, more)
        self.temporaries = compiled.memory_analysis().temp_size_in_bytes / MIB

    def step(self) -> None:
        """Makes an update, and notes what it took."""
        began = time.process_time()
        self.state, _ = jax.block_until_ready(self.update(self.state))
        self.seconds.append(time.process_time() - began)


def along(axis: str, rounds: int) -> Result:
    """Returns what updates take along an axis."""
    points, methods = AXES[axis]
    measured = {
        (method, point): Measured(method, {axis: point})
        for method in methods
        for point in points
    }
    for _ in range(rounds + 1):
        for one in measured.values():
            one.step()
    rows = [
        {
            "method": method,
            axis: point,
            "ms": 1e3 * float(np.median(one.seconds[1:])),
            "temporaries": one.temporaries,
        }
        for (method, point), one in measured.items()
    ]
    shown = "{density:.1%}" if axis == "density" else f"{{{axis}}}"
    return Result(
        title=f"an update by {axis}, a Llama 256 wide",
        rows=rows,
        columns={
            "method": "{method}",
            axis: shown,
            "ms": "{ms:.0f}",
            "temporaries, MiB": "{temporaries:.1f}",
        },
        panels=(
            Panel("ms", "CPU ms of an update", along=axis),
            Panel("temporaries", "temporaries, MiB", along=axis),
        ),
    )


def on_devices(count: int) -> dict[str, Any]:
    """Returns the bytes of one of some devices, and what it sends in an update."""
    run = run_of("SIFT", {}, count, rows=max(DEVICES))
    lowered = run.runner.lower(run.state, run.batch, run.key, schedule=run.schedule)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    sent = collectives_of(compiled.as_text() or "").values()
    held = held_bytes(run)
    return {
        "method": "SIFT",
        "devices": count,
        "state": sum(held[part] for part in HELD) / MIB,
        "temporaries": memory.temp_size_in_bytes / MIB,
        "sent": sum(one.bytes for one in sent) / MIB,
        "collectives": sum(one.count for one in sent),
    }


def by_devices() -> Result:
    """Returns what an update needs on more and more devices."""
    flag = f"--xla_force_host_platform_device_count={max(DEVICES)}"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    words = [sys.executable, "-m", __spec__.name, "--on-devices"]
    found = subprocess.run(
        words, stdout=subprocess.PIPE, check=True, env={**os.environ, **settings}
    )
    return Result(
        title=f"an update of {max(DEVICES)} x {LENGTH} tokens by devices, sharded over "
        "fsdp, compiled only",
        rows=json.loads(found.stdout.splitlines()[-1]),
        columns={
            "method": "{method}",
            "devices": "{devices}",
            "state of one, MiB": "{state:.1f}",
            "temporaries of one, MiB": "{temporaries:.1f}",
            "sent, MiB": "{sent:.1f}",
            "collectives": "{collectives}",
        },
        panels=(
            Panel("state", "state of one device, MiB", along="devices"),
            Panel("temporaries", "temporaries of one, MiB", along="devices"),
        ),
    )


def main() -> None:
    """Prints a table for every axis."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--on-devices", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.on_devices:
        print(json.dumps([on_devices(count) for count in DEVICES]))
        return
    results = [along(axis, args.rounds) for axis in AXES]
    finish(args.output, *results, by_devices())


if __name__ == "__main__":
    run_command(main)

"""How fast are updates on the accelerator at hand, and how much memory do they take?

    python -m experiments.accelerator [--shapes llama-1b llama-7b] [--batch-size 4]
        [--length 2048] [--steps 10] [--output runs/accelerator]

About ten minutes on one GPU or TPU. Full fine-tuning, LoRA, SIFT, SIFT + IST and SIFT
by lanes in bfloat16 with random weights and tokens: time of an update, tokens a second,
peak memory, and the share of the peak FLOPs (MFU) that the matrix products of the
update take, without those that are computed again. What does not fit says so. Then the
supports of a small model in float32 are compared with those of the CPU. On a machine
without an accelerator a tiny shape shows that it runs. Writes a JSON file with the name
of the device.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.command import run_command
from experiments.papers import MODELS, network_of
from sparse_jax import Settings
from sparse_jax.params.names import map_named
from sparse_jax.planning.abstract import AbstractRun, abstract_run
from sparse_jax.planning.operations import count_flops
from sparse_jax.planning.target import CHIPS, chip_of_gpu
from sparse_jax.sharding.mesh import MeshShape
from sparse_jax.supports.scores import leaf_key
from sparse_jax.training.optimizer import schedule_of

T = TypeVar("T")
BASE = Settings(
    model="", task="causal", output="", dtype="bfloat16", checkpointing=True,
    where=("^layers/.*/kernel$",), density=0.05,
)  # fmt: skip
ROWS = {
    "SIFT": BASE,
    "SIFT, lanes": replace(BASE, granularity="lane"),
    "SIFT + IST": replace(BASE, sampler="ist"),
    "LoRA r 64": replace(
        BASE, method="lora", rank=64, density=None, where=("attention|mlp",)
    ),
    "full": replace(BASE, method="full", density=None, where=None),
}
# What the drivers of TPUs call them.
TPUS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p",
    "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}  # fmt: skip
COLUMNS = (
    "update, ms",
    "fastest to slowest",
    "tokens/s",
    "MFU",
    "peak GiB",
    "first, s",
)


def peak_flops(device: Any) -> float | None:
    """Returns the bfloat16 operations a second of the data sheet, if it is known."""
    kind = device.device_kind
    if kind in TPUS:
        return CHIPS[TPUS[kind]].flops
    chip = chip_of_gpu(kind, 0.0)
    return None if chip is None else chip.flops


def filled(tree: Any, shardings: Any, key: jax.Array) -> Any:
    """Returns random values for the shapes of a tree."""

    def fill() -> Any:
        def one(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            values = jax.random.normal(leaf_key(key, name), leaf.shape, leaf.dtype)
            return 0.02 * values + (1 if name.endswith("scale") else 0)

        return map_named(one, tree)

    return jax.jit(fill, out_shardings=shardings)()


def batch_of(run: AbstractRun, words: int) -> dict[str, jax.Array]:
    """Returns random tokens, all of which are predicted."""
    random = np.random.default_rng(0)
    shape = run.batch["input_ids"].shape
    batch = {
        "input_ids": random.integers(0, words, shape).astype(np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }
    return run.placement.put(batch)


def measure(shape: str, settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one row; of one that does not fit, only that."""
    network, device = network_of(shape), jax.devices()[0]
    settings = replace(settings, batch_size=args.batch_size)
    run = abstract_run(network, settings, args.length, MeshShape(), [device])
    schedule = schedule_of(1e-4, 1000)
    step = lambda *args: run.tuner.step(*args[:3], schedule=args[3])
    with jax.set_mesh(run.placement.mesh):
        flops = count_flops(step, run.state, run.batch, run.key, run.schedule)
    key = jax.random.key(0)
    start = time.perf_counter()
    try:
        params = network.abstract(jnp.dtype(settings.dtype))
        params = filled(params, run.placement.params, key)
        batch = batch_of(run, network.config.vocab_size)
        state = run.runner.init(params, key)
        state, _ = run.runner.select(state, batch, key)
        state, metrics = run.runner.step(state, batch, key, schedule=schedule)
        jax.block_until_ready((state, metrics))
        first = time.perf_counter() - start
        seconds = []
        for _ in range(args.steps):
            start = time.perf_counter()
            state, metrics = run.runner.step(state, batch, key, schedule=schedule)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False}
    peak, median = peak_flops(device), float(np.median(seconds))
    return {
        "fits": True,
        "loss": float(metrics["loss"]),
        "seconds": seconds,
        "first_update_seconds": first,
        "tokens_per_second": args.batch_size * args.length / median,
        "flops": flops,
        "mfu": None if peak is None else flops / median / peak,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def supports_of(device: Any) -> dict[str, np.ndarray]:
    """Returns the entries that a small model chooses on a device, by leaf."""
    network = network_of("llama-tiny")
    settings = replace(BASE, dtype="float32", batch_size=2)
    with jax.default_matmul_precision("highest"):
        run = abstract_run(network, settings, 64, MeshShape(), [device])
        # The same values everywhere: drawn on the CPU.
        with jax.default_device(jax.devices("cpu")[0]):
            params = filled(network.abstract(jnp.float32), None, jax.random.key(0))
        params = jax.device_put(params, run.placement.params)
        state = run.runner.init(params, jax.random.key(0))
        batch = batch_of(run, network.config.vocab_size)
        state, _ = run.runner.select(state, batch, jax.random.key(1))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.support)
    }


def shared_entries() -> float:
    """Returns the share of the entries that device and CPU both choose."""
    here, there = supports_of(jax.devices()[0]), supports_of(jax.devices("cpu")[0])
    shared = total = 0
    for name, positions in here.items():
        rows = positions.reshape(-1, positions.shape[-1])
        others = there[name].reshape(rows.shape)
        shared += sum(
            np.intersect1d(*pair).size for pair in zip(rows, others, strict=True)
        )
        total += positions.size
    return shared / total


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    """Returns the cells of a row."""
    if not found["fits"]:
        return ("does not fit", *[""] * (len(COLUMNS) - 1))
    seconds, mfu, peak = found["seconds"], found["mfu"], found["peak_bytes"]
    return (
        f"{1e3 * np.median(seconds):.1f}",
        f"{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}",
        f"{found['tokens_per_second']:,.0f}",
        "not known" if mfu is None else f"{mfu:.1%}",
        "not known" if peak is None else f"{peak / 2**30:.2f}",
        f"{found['first_update_seconds']:.1f}",
    )


def device_here() -> tuple[str, str]:
    """Returns the platform of the device and what its driver calls it."""
    device = jax.devices()[0]
    return device.platform, device.device_kind


def alone(function: Callable[..., T], *args: object) -> T:
    """Returns what a function returns in a process of its own.

    The peak of a device's memory is that of a process, and some drivers let no second
    process use a device.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    """Measures the shapes asked for, and writes what it finds."""
    platform, kind = alone(device_here)
    is_cpu = platform == "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shapes = ["llama-tiny"] if is_cpu else ["llama-1b", "llama-7b"]
    parser.add_argument("--shapes", choices=MODELS, nargs="+", default=shapes)
    parser.add_argument("--batch-size", type=int, default=2 if is_cpu else 4)
    parser.add_argument("--length", type=int, default=128 if is_cpu else 2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/accelerator"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "device": kind,
        "jax": jax.__version__,
        "date": date.today().isoformat(),
        "tokens": [args.batch_size, args.length],
        "shapes": {},
    }
    for shape in args.shapes:
        title = f"{shape}, {args.batch_size} x {args.length} tokens, bfloat16, {kind}"
        table = Table(title=title)
        for column in ("", *COLUMNS):
            table.add_column(column, justify="right" if column else "left")
        record["shapes"][shape] = {}
        for name, settings in ROWS.items():
            print(f"{shape}: {name}", flush=True)
            found = alone(measure, shape, settings, args)
            record["shapes"][shape][name] = found
            table.add_row(name, *cells(found))
        Console(width=110).print(table)
    record["shared_entries"] = alone(shared_entries)
    print(f"Of the entries chosen, the CPU chooses {record['shared_entries']:.4%} too.")
    path = args.output / f"{kind.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(record, indent=2))
    print(f"The figures are in {path}.")


if __name__ == "__main__":
    run_command(main)

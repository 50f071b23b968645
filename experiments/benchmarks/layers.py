"""What does a step cost when a quarter of the layers is active?

    python -m experiments.benchmarks.layers [--rounds 3] [--batch-size 8] [--length 256]

On the decoder-shaped stack of 30 M parameters (8 layers, attention recomputed as with a
flash kernel): bytes that the compiler reserves, and time of a step, with all layers and
with two of them, for each choice of what the backward pass computes again. Steps are
taken in turn, and times are ratios to LoRA on all layers. What a probe costs is between
IST with and without: both draw nearly the same layers. Ten minutes on two CPU cores.
"""

import platform
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import stacks
from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.command import run_command
from sparse_jax import (
    Compact,
    Dense,
    Importance,
    Layerwise,
    LoRA,
    Method,
    Sampler,
    Sparse,
    Static,
    Uniform,
)
from sparse_jax.models.attachment import Recompute

MIB = 2**20
LAYERS, ACTIVE = stacks.LAYERS, stacks.LAYERS // 4
SIZES: dict[str, Any] = {"num_layers": LAYERS, "num_active": ACTIVE}
BASELINE = "LoRA, all layers, in a loop"
LORA = LoRA(rank=16, where="query|key|value|up|down")
# As many trained entries a layer as LoRA: 16 times the widths of q, k, v, up and down.
_WIDTHS = 3 * 2 * stacks.WIDTH + 2 * (stacks.WIDTH + 1408)
_ENTRIES = 3 * stacks.WIDTH**2 + 2 * stacks.WIDTH * 1408
SIFT = Sparse(
    density=16 * _WIDTHS / _ENTRIES, where="layers/.*(query|key|value|up|down)"
)
FULL = Dense(dense="^layers/.*(query|key|value|up|down)")


class Case(NamedTuple):
    """One line of the table."""

    tuner: Compact | Layerwise
    stack: stacks.Stack


def cases(batch: int, length: int) -> dict[str, Case]:
    """Returns what is measured."""
    tx, few = optax.adamw(1e-4), Uniform(**SIZES)
    make = lambda checkpoint, unroll: stacks.decoder(
        jnp.float32, batch, length, checkpoint, unroll, recompute_attention=True
    )
    unrolled, plain, again = make(False, None), make(False, 1), make(True, 1)
    top = Static.of(*range(LAYERS - ACTIVE, LAYERS), num_layers=LAYERS)
    probing, silent = Importance(**SIZES), Importance(**SIZES, probe_every=10**9)

    def layerwise(
        method: Method, sampler: Sampler = few, recompute: Recompute = "none"
    ) -> Case:
        options = {"sampler": sampler, "recompute": recompute}
        return Case(Layerwise(plain.loss, method, tx, **options), plain)

    return {
        BASELINE: Case(Compact(plain.loss, LORA, tx), plain),
        "LoRA, all layers, unrolled": Case(Compact(unrolled.loss, LORA, tx), unrolled),
        "LoRA, all layers, checkpointing": Case(Compact(again.loss, LORA, tx), again),
        "LoRA, 2 of 8, recompute none": layerwise(LORA),
        "LoRA, 2 of 8, recompute frozen": layerwise(LORA, recompute="frozen"),
        "LoRA, 2 of 8, recompute all": layerwise(LORA, recompute="all"),
        "LoRA, top 2 of 8": layerwise(LORA, top),
        "LoRA + IST, 2 of 8": layerwise(LORA, probing),
        "LoRA + IST, 2 of 8, no probes": layerwise(LORA, silent),
        "SIFT, all layers": Case(Compact(unrolled.loss, SIFT, tx), unrolled),
        "SIFT, 2 of 8": layerwise(SIFT),
        "full, all layers": Case(Compact(unrolled.loss, FULL, tx), unrolled),
        "full, 2 of 8": layerwise(FULL),
    }


def compile_step(case: Case) -> tuple[Any, Any]:
    """Returns the compiled step and its state."""
    key = jax.random.key(0)
    state = jax.jit(case.tuner.init)(case.stack.params, key)
    state, _ = jax.jit(case.tuner.select)(state, case.stack.batch, key)
    state = jax.tree.map(jnp.copy, state)
    step = jax.jit(case.tuner.step, donate_argnums=0)
    return step.lower(state, case.stack.batch, key).compile(), state


def measure(
    steps: Mapping[str, tuple[Any, Any]], batch: Any, rounds: int
) -> dict[str, list[float]]:
    """Returns seconds per update: means over ten of each step, taken in turn."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    states = {name: state for name, (_, state) in steps.items()}
    key = jax.random.key(1)
    # The first update has no probe; after it, every ten updates have one.
    for name, (step, _) in steps.items():
        states[name], _ = step(states[name], batch, key)
    # Updates that still run would count as the first that is timed.
    jax.block_until_ready(states)
    for _ in range(rounds):
        total = dict.fromkeys(steps, 0.0)
        for _ in range(10):
            for name, (step, _) in steps.items():
                start = clock()
                states[name], _ = step(states[name], batch, key)
                jax.block_until_ready(states[name])
                total[name] += clock() - start
        for name, sum_of_ten in total.items():
            seconds[name].append(sum_of_ten / 10)
    return seconds


def main() -> None:
    """Measures and prints the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="of ten updates each")
    args = parser.parse_args()
    built = cases(args.batch_size, args.length)
    steps = {name: compile_step(case) for name, case in built.items()}
    batch = built[BASELINE].stack.batch
    seconds = measure(steps, batch, args.rounds)
    machine = f"{jax.default_backend()}, {platform.machine()}, jax {jax.__version__}"
    base = _temporary(steps[BASELINE][0])
    rows = []
    for name, (compiled, _) in steps.items():
        memory = _temporary(compiled)
        ratio = np.array(seconds[name]) / np.array(seconds[BASELINE])
        rows.append(
            {
                "step": name,
                "temporary_mib": memory / MIB,
                "below": 1 - memory / base,
                "ms": 1e3 * float(np.median(seconds[name])),
                "ratio": float(np.median(ratio)),
                "low": float(ratio.min()),
                "high": float(ratio.max()),
            }
        )
    result = Result(
        title=f"{args.batch_size} x {args.length} tokens, float32 ({machine})",
        caption="ten updates a round, so that a round of IST has one probe",
        rows=rows,
        columns={
            "step": "{step}",
            "temporary MiB": "{temporary_mib:.0f}",
            "below LoRA": "{below:.0%}",
            "ms": "{ms:.0f}",
            "ratio": "{ratio:.2f}",
            "range": "{low:.2f} to {high:.2f}",
        },
        panels=(
            Panel("ratio", "time, ratio to LoRA", ("low", "high"), floor=1),
            Panel("temporary_mib", "temporaries, MiB"),
        ),
    )
    finish(args.output, result)


def _temporary(compiled: Any) -> float:
    """Returns the bytes that a compiled step reserves beside its arguments."""
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    run_command(main)

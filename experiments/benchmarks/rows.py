"""What does an update by rows cost beside one by LoRA?

    python -m experiments.benchmarks.rows [--density 0.05] [--rounds 15]

A Llama of 30 M random parameters, 8 layers, its linear maps trained by AdamW: all of
them, by LoRA, and by SIFT with single entries, rows and columns, which are about as
many numbers as LoRA has. Operations are the compiler's for one update. Times are CPU
seconds of one process that makes the updates in turn, round by round, and ratios those
of a round. Three minutes on two CPU cores.
"""

import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import stacks
from experiments.benchmarks.result import (
    Panel,
    Result,
    benchmark_parser,
    finish,
    quartiles,
)
from experiments.benchmarks.step_time import measure
from sparse_jax import Compact, Dense, LoRA, Method, Sparse
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import DecoderConfig
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model
from sparse_jax.training.objective import make_token_loss

KERNELS = "^layers/.*/kernel$"
BESIDE = "LoRA r 16"


def methods(density: float) -> dict[str, Method]:
    """Returns what is compared."""
    sift = lambda granularity: Sparse(
        density=density, where=KERNELS, granularity=granularity
    )
    return {
        "full": Dense(dense=KERNELS),
        BESIDE: LoRA(rank=16, alpha=16, where="attention|mlp"),
        "SIFT, entries": sift("entry"),
        "SIFT, rows": sift("row"),
        "SIFT, columns": sift("column"),
    }


def llama() -> Model:
    """Returns the decoder of the other benchmarks, as a model of the library."""
    config = DecoderConfig(
        vocab_size=stacks.VOCABULARY,
        hidden_size=stacks.WIDTH,
        num_layers=stacks.LAYERS,
        num_heads=stacks.HEADS,
        num_kv_heads=stacks.HEADS,
        head_size=stacks.WIDTH // stacks.HEADS,
        intermediate_size=1408,
        tied=True,
    )
    return Model(CausalLM, LLAMA, config)


def build(
    density: float, batch_size: int, length: int
) -> tuple[dict[str, tuple[Any, Any]], dict[str, jax.Array]]:
    """Returns (compiled update, state) for every method, and the batch."""
    model, key = llama(), jax.random.key(0)
    params, loss = model.init(key), make_token_loss(model)
    shape = (batch_size, length)
    ids = jax.random.randint(jax.random.key(1), shape, 1, stacks.VOCABULARY)
    batch = {
        "input_ids": ids,
        "attention_mask": jnp.ones_like(ids),
        "weights": jnp.ones(shape, jnp.float32),
    }
    steps = {}
    for name, method in methods(density).items():
        tuner = Compact(loss, method, optax.adamw(1e-4))
        state = jax.jit(tuner.init)(params, key)
        if jax.tree.leaves(state.support):
            state, _ = jax.jit(tuner.select)(state, batch, key)
        update = jax.jit(tuner.step, donate_argnums=0).lower(state, batch, key)
        steps[name] = (update.compile(), jax.tree.map(jnp.copy, state))
    return steps, batch


def report(
    steps: dict[str, tuple[Any, Any]], seconds: dict[str, list[float]], title: str
) -> Result:
    """Returns the table."""
    flops = {name: step.cost_analysis()["flops"] for name, (step, _) in steps.items()}
    rows = [
        {
            "method": name,
            "gflop": flops[name] / 1e9,
            "flops": flops[name] / flops[BESIDE],
            "ms": 1e3 * float(np.median(seconds[name])),
            **quartiles(np.array(seconds[name]) / np.array(seconds[BESIDE])),
            "temporary_mib": step.memory_analysis().temp_size_in_bytes / 2**20,
        }
        for name, (step, _) in steps.items()
    ]
    return Result(
        title=title,
        caption=f"ratios are those to {BESIDE}",
        rows=rows,
        columns={
            "method": "{method}",
            "GFLOP": "{gflop:.0f}",
            "ratio": "{flops:.2f}",
            "ms": "{ms:.0f}",
            "ratio of times": "{ratio:.3f}",
            "quartiles": "{low:.3f} to {high:.3f}",
            "temporary MiB": "{temporary_mib:.0f}",
        },
        panels=(
            Panel("flops", "operations, ratio to LoRA", floor=1),
            Panel("ratio", "time, ratio to LoRA", ("low", "high"), floor=1),
        ),
    )


def main() -> None:
    """Measures the updates."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    steps, batch = build(args.density, args.batch_size, args.length)
    seconds = measure(steps, batch, args.rounds)
    machine = f"{jax.default_backend()}, {platform.machine()}, jax {jax.__version__}"
    shape = f"{args.batch_size} x {args.length} tokens"
    title = f"Llama of 30 M, {shape}, density {args.density} ({machine})"
    finish(args.output, report(steps, seconds, title))


if __name__ == "__main__":
    main()

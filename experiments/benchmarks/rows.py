"""What does an update by rows cost beside one by LoRA?

    python -m experiments.benchmarks.rows [--density 0.05] [--rounds 15]
        [--methods 'SIFT, rows' ...]

A Llama of 30 M random parameters, 8 layers, its linear maps trained by AdamW: all of
them, by LoRA, and by SIFT with single entries, rows and columns, which are about as
many numbers as LoRA has. Operations are those that the compiler counts in one update
before it compiles it. Times are CPU seconds of one process that makes the updates in
turn, round by round, and ratios those of a round; `--rounds 0` takes none. Three
minutes on two CPU cores.
"""

import platform
from collections.abc import Sequence
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
from experiments.command import run_command
from sparse_jax import Compact, CompactState, Dense, LoRA, Method, Sparse
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
    density: float, batch_size: int, length: int, names: Sequence[str], is_timed: bool
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]], dict[str, jax.Array]]:
    """Returns updates that are not compiled yet, (compiled, state), and the batch."""
    model, key = llama(), jax.random.key(0)
    params = model.init(key) if is_timed else model.abstract()
    loss, shape = make_token_loss(model), (batch_size, length)
    ids = jax.random.randint(jax.random.key(1), shape, 1, stacks.VOCABULARY)
    batch = {
        "input_ids": ids,
        "attention_mask": jnp.ones_like(ids),
        "weights": jnp.ones(shape, jnp.float32),
    }
    updates, steps = {}, {}
    for name in dict.fromkeys((BESIDE, *names)):
        tuner = Compact(loss, methods(density)[name], optax.adamw(1e-4))
        # As after a selection, whose supports have the same shapes.
        state = CompactState(*jax.eval_shape(tuner.init, params, key))
        update = jax.jit(tuner.step, donate_argnums=0).lower(state, batch, key)
        updates[name] = update
        if not is_timed:
            continue
        state = jax.jit(tuner.init)(params, key)
        if jax.tree.leaves(state.support):
            state, _ = jax.jit(tuner.select)(state, batch, key)
        steps[name] = (update.compile(), jax.tree.map(jnp.copy, state))
    return updates, steps, batch


def report(
    updates: dict[str, Any],
    steps: dict[str, tuple[Any, Any]],
    seconds: dict[str, list[float]],
    title: str,
) -> Result:
    """Returns the table; without seconds, of operations alone."""
    flops = {name: update.cost_analysis()["flops"] for name, update in updates.items()}
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "gflop": flops[name] / 1e9,
            "flops": flops[name] / flops[BESIDE],
        }
        for name in updates
    ]
    columns = {"method": "{method}", "GFLOP": "{gflop:.1f}", "ratio": "{flops:.3f}"}
    panels = [Panel("flops", "operations, ratio to LoRA", floor=1)]
    if seconds:
        for row in rows:
            times, (step, _) = np.array(seconds[row["method"]]), steps[row["method"]]
            memory = step.memory_analysis().temp_size_in_bytes
            ratios = quartiles(times / np.array(seconds[BESIDE]))
            ms = 1e3 * float(np.median(times))
            row |= {"ms": ms, **ratios, "temporary_mib": memory / 2**20}
        columns |= {
            "ms": "{ms:.0f}",
            "ratio of times": "{ratio:.3f}",
            "quartiles": "{low:.3f} to {high:.3f}",
            "temporary MiB": "{temporary_mib:.0f}",
        }
        panels.append(Panel("ratio", "time, ratio to LoRA", ("low", "high"), floor=1))
    caption = f"ratios are those to {BESIDE}"
    return Result(
        title=title, caption=caption, rows=rows, columns=columns, panels=panels
    )


def main() -> None:
    """Measures the updates."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    names = list(methods(0.5))
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    options = (args.density, args.batch_size, args.length, args.methods)
    updates, steps, batch = build(*options, is_timed=args.rounds > 0)
    seconds = measure(steps, batch, args.rounds) if steps else {}
    machine = f"{jax.default_backend()}, {platform.machine()}, jax {jax.__version__}"
    shape = f"{args.batch_size} x {args.length} tokens"
    title = f"Llama of 30 M, {shape}, density {args.density} ({machine})"
    finish(args.output, report(updates, steps, seconds, title))


if __name__ == "__main__":
    run_command(main)

"""Does a SIFT step cost more than the gradients it needs?

    python -m experiments.benchmarks.step_time [--model encoder|decoder] [--rounds 15]

Times one step of each method on 30 to 34 M parameters, the methods in turn within a
round, and prints the ratio to the floor round by round: the forward pass, the
gradients of the inputs and the dense gradients of the target matrices, with no
optimizer. About three minutes on two CPU cores.
"""

import platform
import time
from collections.abc import Callable
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
from experiments.command import run_command
from sparse_jax import Attachment, Compact, Dense, LoRA, Method, Sparse
from sparse_jax.supports.packing import pack
from sparse_jax.supports.roles import roles_of

MODELS = {"encoder": stacks.encoder, "decoder": stacks.decoder}
FLOOR = "floor"


def methods(density: float, where: str) -> dict[str, Method]:
    """Returns what is compared, LoRA at about the same number of trained entries."""
    return {
        "full AdamW": Dense(dense=".*"),
        "SIFT": Sparse(density=density, where=where),
        "LoRA r 16": LoRA(rank=16, where="attention|mlp"),
    }


def floor_step(stack: stacks.Stack) -> Callable[..., Any]:
    """Returns a step that computes the dense gradients of the targets, and no more."""
    roles = roles_of(stack.params, where=(), dense=stack.where)
    nothing = jax.tree.map(lambda leaf: optax.MaskedNode(), stack.params)

    def step(state: Any, batch: Any, key: jax.Array) -> Any:
        params, _ = state
        targets = pack(roles, nothing, params)

        def loss(targets: Any) -> jax.Array:
            full = jax.tree.map(
                lambda leaf, target: (
                    leaf if isinstance(target, optax.MaskedNode) else target
                ),
                params,
                targets,
            )
            total, weight = stack.loss(full, batch, key, Attachment())
            return total / weight

        value, grads = jax.value_and_grad(loss)(targets)
        return (params, grads), {"loss": value}

    return step


def build(stack: stacks.Stack, density: float) -> dict[str, tuple[Any, Any]]:
    """Returns (compiled step, state) for every method."""
    key = jax.random.key(0)
    steps: dict[str, tuple[Any, Any]] = {}
    roles = roles_of(stack.params, where=(), dense=stack.where)
    nothing = jax.tree.map(lambda leaf: optax.MaskedNode(), stack.params)
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    state = (copy(stack.params), copy(pack(roles, nothing, stack.params)))
    steps[FLOOR] = _compile(floor_step(stack), state, stack.batch, key)
    for name, method in methods(density, stack.where).items():
        tuner = Compact(stack.loss, method, optax.adamw(1e-4))
        state = jax.jit(tuner.init)(stack.params, key)
        state, _ = jax.jit(tuner.select)(state, stack.batch, key)
        steps[name] = _compile(tuner.step, copy(state), stack.batch, key)
    return steps


def _compile(step: Any, state: Any, batch: Any, key: jax.Array) -> tuple[Any, Any]:
    """Compiles a step that reuses the memory of its state."""
    return jax.jit(step, donate_argnums=0).lower(state, batch, key).compile(), state


def measure(
    steps: dict[str, tuple[Any, Any]], batch: Any, rounds: int
) -> dict[str, list[float]]:
    """Returns seconds per step: methods in turn, after two rounds of warm-up.

    On CPU the seconds are those the process had the cores, which other programs on
    the machine disturb less; elsewhere those that passed.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    key = jax.random.key(1)
    states = {name: state for name, (_, state) in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, (step, _) in steps.items():
            start = clock()
            states[name], metrics = step(states[name], batch, key)
            jax.block_until_ready((states[name], metrics))
            seconds[name].append(clock() - start)
    return {name: times[2:] for name, times in seconds.items()}


def report(
    steps: dict[str, tuple[Any, Any]], seconds: dict[str, list[float]], title: str
) -> Result:
    """Returns the table of a model."""
    rows = []
    for name, (compiled, _) in steps.items():
        ratio = np.array(seconds[name]) / np.array(seconds[FLOOR])
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        median = float(np.median(seconds[name]) * 1e3)
        rows.append(
            {"method": name, "ms": median, **quartiles(ratio), "temporary_mib": memory}
        )
    return Result(
        title=title,
        caption="floor: forward, input gradients, dense target gradients, no optimizer",
        rows=rows,
        columns={
            "method": "{method}",
            "ms": "{ms:.0f}",
            "ratio to the floor": "{ratio:.3f}",
            "quartiles": "{low:.3f} to {high:.3f}",
            "temporary MiB": "{temporary_mib:.0f}",
        },
        panels=(
            Panel("ratio", "time, ratio to the floor", ("low", "high"), floor=1),
            Panel("temporary_mib", "temporaries, MiB"),
        ),
    )


def main() -> None:
    """Measures the models asked for."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    machine = f"{jax.default_backend()}, {platform.machine()}, jax {jax.__version__}"
    results = []
    for name in args.model:
        stack = MODELS[name](
            jnp.dtype(args.dtype), args.batch_size, args.length, args.checkpointing
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(stack.params)) / 1e6
        steps = build(stack, args.density)
        seconds = measure(steps, stack.batch, args.rounds)
        title = f"{name}, {size:.1f} M parameters, density {args.density} ({machine})"
        results.append(report(steps, seconds, title))
    finish(args.output, *results)


if __name__ == "__main__":
    run_command(main)

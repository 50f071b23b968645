"""Is the exact selection faster than a sort, and does it give the same?

    python -m experiments.benchmarks.selection [--side 4096] [--density 0.01 0.05]

Selects from one 4096 x 4096 gradient in turn with `lax.top_k` and prints the ratio,
after checking that both choose the same entries. About a minute on two CPU cores.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.result import (
    Panel,
    Result,
    benchmark_parser,
    finish,
    quartiles,
)
from experiments.command import run_command
from sparse_jax import top_k_support


def sorted_top_k(x: jax.Array, k: int) -> jax.Array:
    """Returns the support by the library's sort."""
    return jnp.sort(lax.top_k(jnp.abs(x).reshape(-1), k)[1])


def seconds(function: Callable[[Any], Any], x: jax.Array) -> float:
    """Returns the time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function(x))
    return time.perf_counter() - start


def main() -> None:
    """Measures both, in turn."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--density", type=float, nargs="*", default=[0.01, 0.05])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    shape = (args.side, args.side)
    # Rows of different scale, as in a real gradient.
    rows = jnp.exp(jax.random.normal(jax.random.key(1), (args.side, 1)))
    x = jax.random.normal(jax.random.key(0), shape) * jnp.broadcast_to(rows, shape)
    rows = []
    for density in args.density:
        k = int(density * x.size)
        ours = jax.jit(lambda x, k=k: top_k_support(x, k))
        theirs = jax.jit(lambda x, k=k: sorted_top_k(x, k))
        same = bool(jnp.array_equal(ours(x), theirs(x)))
        times = np.array(
            [(seconds(ours, x), seconds(theirs, x)) for _ in range(args.rounds)]
        )
        ours_s, theirs_s = np.median(times, axis=0)
        ratio = quartiles(times[:, 0] / times[:, 1])
        found = {"ours_s": float(ours_s), "top_k_s": float(theirs_s), **ratio}
        rows.append({"density": density, **found, "same": same})
    result = Result(
        title=f"selection from {x.size / 1e6:.1f} M entries",
        rows=rows,
        columns={
            "density": "{density:.1%}",
            "this (s)": "{ours_s:.3f}",
            "lax.top_k (s)": "{top_k_s:.3f}",
            "ratio": "{ratio:.2f}",
            "quartiles": "{low:.2f} to {high:.2f}",
            "same support": "{same}",
        },
        panels=(Panel("ratio", "time, ratio to lax.top_k", ("low", "high"), floor=1),),
    )
    finish(args.output, result)


if __name__ == "__main__":
    run_command(main)

"""How long do a selection and an update take to compile, and what does a cache save?

    python -m experiments.benchmarks.compile [--shape smollm2-135m] [--batch-size 2]
        [--length 256]

The shapes of a model of 30 layers, without its weights. Every method is started twice,
each time in a new process: with an empty cache of programs, and with the one that the
first start has filled. Tracing turns Python into a program for the compiler and cannot
be cached; "compiled" counts the programs that the cache did not have. Times are CPU
seconds. The peak is that of the process of the first start, which holds no weights.
About three minutes on two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import jax

from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.command import run_command
from experiments.papers import MODELS, network_of
from sparse_jax import Settings
from sparse_jax.planning.abstract import abstract_run
from sparse_jax.sharding.mesh import MeshShape
from sparse_jax.training.progress import peak_bytes

BASE = Settings(model="", task="causal", output="")
METHODS = {
    "full": replace(BASE, method="full"),
    "LoRA": replace(BASE, method="lora"),
    "SIFT": replace(BASE, density=0.01),
    "SIFT + IST": replace(BASE, density=0.01, sampler="ist"),
}
_MISSED = "/jax/compilation_cache/cache_misses"


def start(method: str, args: argparse.Namespace) -> dict[str, float]:
    """Compiles the programs of a method, and returns what that took."""
    missed = []
    jax.monitoring.register_event_listener(
        lambda event, **_: missed.append(event) if event == _MISSED else None
    )
    settings = replace(METHODS[method], batch_size=args.batch_size)
    network, place = network_of(args.shape), (MeshShape(), jax.devices()[:1])
    began = time.process_time()
    run = abstract_run(network, settings, args.length, *place)
    given = (run.state, run.batch, run.key)
    programs = [run.runner.lower(*given, schedule=run.schedule)]
    if jax.tree.leaves(run.state.support):
        programs.append(run.runner.lower_choice(*given))
    traced = time.process_time()
    for program in programs:
        program.compile()
    ended = time.process_time()
    return {
        "tracing": traced - began,
        "compiling": ended - traced,
        "programs": len(programs),
        "compiled": len(missed),
        "peak": peak_bytes(),
    }


def started(method: str, cache: str, args: argparse.Namespace) -> dict[str, float]:
    """Returns what `start` does in a process of its own, with a cache."""
    words = [sys.executable, "-m", __spec__.name, "--method", method]
    for name in ("shape", "batch_size", "length"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = subprocess.run(
        words, stdout=subprocess.PIPE, check=True, env={**os.environ, **settings}
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shape", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        print(json.dumps(start(args.method, args)))
        return
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        with tempfile.TemporaryDirectory() as cache:
            first, second = (started(method, cache, args) for _ in range(2))
        both = {f"{name}_again": second[name] for name in ("compiling", "compiled")}
        mib = first.pop("peak") / 2**20
        rows.append({"method": method, **first, **both, "peak_mib": mib})
    result = Result(
        title=f"compiling for {args.shape}, {args.batch_size} x {args.length} tokens, "
        f"on a CPU, jax {jax.__version__}",
        rows=rows,
        columns={
            "method": "{method}",
            "programs": "{programs}",
            "tracing, s": "{tracing:.1f}",
            "compiling, s": "{compiling:.1f}",
            "with a cache, s": "{compiling_again:.1f}",
            "compiled then": "{compiled_again}",
            "peak MiB": "{peak_mib:,.0f}",
        },
        panels=(
            Panel("compiling", "compiling, CPU s"),
            Panel("compiling_again", "with a cache, CPU s"),
        ),
    )
    finish(args.output, result)


if __name__ == "__main__":
    run_command(main)

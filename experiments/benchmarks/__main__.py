"""The benchmarks, one by one or all of them.

    python -m experiments.benchmarks all [--vs torch qwix] [--only NAME ...]
        [--output runs/benchmarks]
    python -m experiments.benchmarks NAME [options]

NAME: one of the list that `--help` prints; each has the options of its module. `all`
runs every one in a process of its own, at sizes for two CPU cores: the ones that only
compile first, then those that take times, and those beside other libraries last, if
they are asked for. Each prints its table and writes it as JSON and as a picture; a
table of them all is at the end. What a benchmark needs and is not there, such as torch
or the compiler of TPUs, is named and the benchmark skipped.
"""

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.command import run_command

TORCH, QWIX = "torch", "qwix"


class Benchmark(NamedTuple):
    """A module of this folder, and its options within `all`."""

    name: str
    question: str
    options: tuple[str, ...] = ()
    beside: str | None = None  # a library that it is measured against


BENCHMARKS = (
    Benchmark("memory", "where the bytes of an update are", ("--checkpointing",)),
    Benchmark(
        "attention",
        "attention on TPUs, by XLA and by the kernel",
        ("--lengths", "2048"),
    ),
    Benchmark("lane", "reaching trained entries on TPUs"),
    Benchmark("estimates", "updates on TPUs, by the cycles of their compiler"),
    Benchmark("compile", "how long programs take to compile, and what a cache saves"),
    Benchmark("selection", "selecting entries beside lax.top_k"),
    Benchmark("switch", "switching adapters beside NumPy's writes"),
    Benchmark("step_time", "an update beside its gradients", ("--rounds", "4")),
    Benchmark("rows", "an update by rows beside LoRA", ("--rounds", "4")),
    Benchmark(
        "layers",
        "a few layers at a time",
        ("--batch-size", "1", "--length", "128", "--rounds", "2"),
    ),
    Benchmark("scaling", "by density, length, layers and devices"),
    Benchmark("data", "tokenizing, and reading batches"),
    Benchmark(
        "against_torch", "updates beside PyTorch and PEFT", ("--rounds", "8"), TORCH
    ),
    Benchmark(
        "generation",
        "texts and ranked answers beside transformers",
        ("--questions", "4", "--rounds", "3"),
        TORCH,
    ),
    Benchmark("against_qwix", "updates beside qwix and tunix", ("--rounds", "8"), QWIX),
)


def run_all(beside: Sequence[str], only: Sequence[str], output: Path) -> int:
    """Runs benchmarks one after the other, and returns how many failed."""
    table = Table(title=f"benchmarks, in {output}")
    for header in ("benchmark", "what is measured", "seconds", "written"):
        table.add_column(header, justify="right" if header == "seconds" else "left")
    chosen = [
        one
        for one in BENCHMARKS
        if (one.name in only if only else one.beside in (None, *beside))
    ]
    failed = 0
    for one in chosen:
        print(f"\n{one.name}: {one.question}", flush=True)
        stem = output / one.name
        before = {path: path.stat().st_mtime_ns for path in _files(stem)}
        words = [sys.executable, "-m", f"{__package__}.{one.name}", *one.options]
        began = time.perf_counter()
        code = subprocess.run([*words, "--output", str(stem)]).returncode
        seconds = time.perf_counter() - began
        written = [
            path.name
            for path in _files(stem)
            if before.get(path) != path.stat().st_mtime_ns
        ]
        failed += code != 0
        outcome = ", ".join(written) or "skipped"
        outcome = f"failed, exit code {code}" if code else outcome
        table.add_row(one.name, one.question, f"{seconds:.0f}", outcome)
    print()
    Console(width=120).print(table)
    return failed


def _files(stem: Path) -> list[Path]:
    """Returns what a benchmark has written."""
    found = sorted(stem.parent.glob(f"{stem.name}*"))
    own = (stem.name, *(f"{stem.name}-{number}" for number in range(1, 10)))
    return [path for path in found if path.stem in own]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one benchmark, or all."""
    names = [one.name for one in BENCHMARKS]
    listed = "\n".join(f"  {one.name:<14} {one.question}" for one in BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"names:\n  {'all':<14} every one, in turn\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=("all", *names))
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in names:
        sys.argv = [f"{parser.prog} {words[0]}", *words[1:]]
        importlib.import_module(f"{__package__}.{words[0]}").main()
        return
    parser.add_argument(
        "--vs", nargs="+", choices=(TORCH, QWIX), default=(), metavar="LIBRARY",
        help="also those beside libraries: torch, qwix",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", choices=names, default=(), metavar="NAME", help="these"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks"), help="folder"
    )
    args = parser.parse_args(words)
    if run_all(args.vs, args.only, args.output):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)

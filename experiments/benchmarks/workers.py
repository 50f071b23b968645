"""Programs in processes of their own, that make a step each in turn, round by round.

Whatever else the machine does meets all of them. A program is a module with options,
which calls `serve`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "OURS", "THEIRS", "Program", "Row", "add_options", "are_there", "circumstances",
    "measure", "memory", "model_of", "ratios", "seconds_of", "serve", "texts_of",
    "write_llama",
]  # fmt: skip

OURS, THEIRS = "sparse_jax", "PyTorch"
# Threads that wait do not spin, and warnings of others are not of interest here.
_QUIET = {
    "OMP_WAIT_POLICY": "passive",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}

# What brings a package of another name.
_INSTALLED_BY = {"tunix": "google-tunix"}

Row = dict[str, Any]  # what a step reported, with its costs
Step = Callable[[], Row]
Program = tuple[str, str]
# Steps that do not count: the first compiles.
WARM_UP = 2


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Adds the options that programs and their rounds have everywhere."""
    parser.add_argument("--model", help="folder of a Llama in safetensors")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--threads", type=int, default=1, help="of every program; 0 is all cores"
    )
    parser.add_argument("--program", nargs=2, help=argparse.SUPPRESS)


def are_there(*packages: str) -> bool:
    """Returns whether packages are installed on Linux, and says what is missing."""
    if not Path("/proc/self/status").exists():
        print("skipped: needs Linux, which reports the memory of a process.")
        return False
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        needed = " ".join(_INSTALLED_BY.get(name, name) for name in packages)
        print(f"skipped: needs {', '.join(missing)}; `pip install {needed}`.")
    return not missing


def circumstances(args: argparse.Namespace, *packages: str) -> str:
    """Returns the machine, the options and the versions for the title of a table."""
    threads = "one thread" if args.threads == 1 else f"{args.threads or 'all'} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", *packages))
    return f"{platform.machine()}, {threads}, {args.rounds} rounds; {versions}"


def serve(build: Callable[[], Step], threads: int) -> None:
    """Makes a step for every line that comes in, and reports it in one line.

    Beside what the step returns that are its CPU `seconds`, those `since_start`, and
    the `peak` of the process, in bytes: of all so far in the steps to warm up, then of
    the steps after these.

    Args:
      build: loads libraries and models, and returns the step.
      threads: of the process; 0 is one for each core.
    """
    if threads:
        # The pools of both libraries have a thread for each core they may use.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-threads:])
    began = time.process_time()
    step = build()
    for number, _ in enumerate(sys.stdin):
        if number == WARM_UP:
            # Compiling and the selection are over.
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = time.process_time()
        found = step()
        now = time.process_time()
        costs = {"seconds": now - before, "since_start": now - began}
        costs["peak"] = memory("VmHWM")
        print(json.dumps(found | costs), flush=True)


def memory(name: str = "VmRSS") -> int:
    """Returns a size of this process, in bytes, by its name in Linux."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    sizes = dict(line.split(":", 1) for line in text.splitlines())
    return int(sizes[name].split()[0]) * 1024


class Worker:
    """A program in a process of its own."""

    def __init__(self, module: str, words: Sequence[str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **_QUIET, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    def step(self) -> Row:
        """Makes a step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("error: a program ended early; what it said is above")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *args: object) -> None:
        self.process.kill()
        self.process.wait()


def measure(
    module: str,
    programs: Sequence[Program],
    options: dict[str, object],
    rounds: int,
    check: Callable[[dict[Program, Row]], None],
) -> dict[Program, list[Row]]:
    """Returns what the steps of every program reported, those to warm up included.

    Args:
      module: that has the programs, and takes `--program` with two words.
      programs: their words.
      options: of all, by name.
      rounds: steps of each that count.
      check: is given the first steps; raises SystemExit if they cannot be compared.
    """
    given = [
        word for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]  # fmt: skip
    rows: dict[Program, list[Row]] = {program: [] for program in programs}
    with ExitStack() as stack:
        workers = {}
        for program in programs:
            # One after the other: starting takes more memory than what stays.
            worker = Worker(module, ["--program", *program, *given])
            workers[program] = stack.enter_context(worker)
            rows[program] += [worker.step() for _ in range(WARM_UP)]
        check({program: steps[0] for program, steps in rows.items()})
        for _ in range(rounds):
            for program, worker in workers.items():
                rows[program].append(worker.step())
    return rows


def seconds_of(steps: Sequence[Row]) -> np.ndarray:
    """Returns the CPU seconds of the steps that count."""
    return np.array([one["seconds"] for one in steps[WARM_UP:]])


def ratios(steps: Sequence[Row], peer: Sequence[Row]) -> dict[str, Any]:
    """Returns the costs of a program, and their ratios to those of another.

    Quartiles are those of the ratios within a round. The peak is that after the steps
    to warm up, since what the machine does to a process later is not of the program.
    """
    mine, other = seconds_of(steps), seconds_of(peer)
    peak, peer_peak = (rows[WARM_UP - 1]["peak"] for rows in (steps, peer))
    return {
        "seconds": float(mine.mean()),
        "ratio": float(mine.mean() / other.mean()),
        "quartiles": np.quantile(mine / other, (0.25, 0.75)).tolist(),
        "peak": peak,
        "peak_ratio": peak / peer_peak,
    }


def texts_of(costs: Row, is_peer: bool) -> Row:
    """Returns the costs of a program for a table and its picture.

    Args:
      costs: as of `ratios`.
      is_peer: whether it is the program that the ratios are to.
    """
    low, high = costs["quartiles"]
    return {
        "low": low,
        "high": high,
        "mib": costs["peak"] / 2**20,
        "time": "1" if is_peer else f"{costs['ratio']:.2f}",
        "spread": "" if is_peer else f"{low:.2f} to {high:.2f}",
        "memory": "1" if is_peer else f"{costs['peak_ratio']:.2f}",
    }


@contextmanager
def model_of(args: argparse.Namespace, **options: float) -> Iterator[str]:
    """Yields the name of the model of `args`, which is made if none is given."""
    with tempfile.TemporaryDirectory() as folder:
        name = Path(args.model).resolve().name if args.model else "a Llama of 30 M"
        args.model = args.model or write_llama(folder, **options)
        yield name


def write_llama(folder: str, *, rope_theta: float = 10_000.0) -> str:
    """Writes a Llama of 30 M random parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder

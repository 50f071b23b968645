"""Is an update here as fast and as small as with PyTorch and PEFT?

    python -m experiments.benchmarks.against_torch [--model FOLDER] [--threads 1]

Every program is a process of its own that reads the same weights, has the same first
loss (or the run ends), and makes an update when it is asked to: all in turn, round by
round, so that whatever else the machine does meets all of them. Times are CPU seconds,
the peak is that of the process after two updates, weights and libraries included. LoRA,
SIFT and SHiRA train equally many entries of the linear maps of the layers; SHiRA
chooses them at random. Plain AdamW, float32, no dropout. Without a model it is a Llama
of 30 M random parameters. Ten minutes on two CPU cores; needs torch and peft.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from experiments.benchmarks.result import (
    Panel,
    Result,
    benchmark_parser,
    finish,
)

RANK, RATE = 16, 1e-4
OURS, THEIRS = "sparse_jax", "PyTorch"
LAYERS = "^layers/.*/kernel$"
SITES = ("attention/(query|key|value|output)$", "mlp/")
# (what is trained, by which library); ratios are to the last of the same row.
PROGRAMS = (
    ("full", OURS), ("full", THEIRS),
    ("LoRA", OURS), ("LoRA", THEIRS),
    ("SIFT", OURS), ("SHiRA", THEIRS),
    ("SIFT + IST", OURS),
)  # fmt: skip
# What a program is compared with.
PEERS = {"full": "full", "LoRA": "LoRA", "SIFT": "SHiRA", "SIFT + IST": "LoRA"}
# Threads that wait do not spin, and warnings of others are not of interest here.
_QUIET = {
    "OMP_WAIT_POLICY": "passive",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}
# Losses of one model and batch differ by rounding.
_TOLERANCE = 1e-4

Rows = dict[tuple[str, str], list[dict[str, float]]]
Step = Callable[[], float]  # makes an update and returns the loss before it


def our_step(method: str, model: str, ids: np.ndarray) -> tuple[Step, int]:
    """Returns an update of this library, and how many entries it trains."""
    import jax
    import optax

    from sparse_jax import (
        CausalLM,
        Compact,
        Dense,
        Importance,
        Layerwise,
        LoRA,
        Sparse,
        from_pretrained,
    )
    from sparse_jax.training.objective import make_token_loss
    from sparse_jax.training.progress import release_freed_memory
    from sparse_jax.training.results import count_trained

    network, params = from_pretrained(model, head=CausalLM)
    release_freed_memory()  # as runs do
    kernels = [
        leaf for group in params["layers"].values() for one in group.values()
        for leaf in one.values() if leaf.ndim == 3
    ]  # fmt: skip
    entries = sum(len(leaf) * RANK * sum(leaf.shape[1:]) for leaf in kernels)
    density = entries / sum(leaf.size for leaf in kernels)
    chosen = {
        "full": lambda: Dense(dense=".*"),
        "LoRA": lambda: LoRA(rank=RANK, alpha=RANK, where=SITES),
        "SIFT": lambda: Sparse(density=density, where=LAYERS),
    }[method.removesuffix(" + IST")]()
    loss, tx = make_token_loss(network), optax.adamw(RATE, weight_decay=0.0)
    if method.endswith("IST"):
        layers = network.config.num_layers
        sampler = Importance(num_layers=layers, num_active=max(1, layers // 4))
        tuner: Any = Layerwise(loss, chosen, tx, sampler=sampler)
    else:
        tuner = Compact(loss, chosen, tx)
    key = jax.random.key(0)
    batch = {
        "input_ids": ids, "attention_mask": np.ones_like(ids),
        "weights": np.ones(ids.shape, np.float32),
    }  # fmt: skip
    state = jax.jit(tuner.init, donate_argnums=0)(params, key)
    if jax.tree.leaves(state.support):
        state, _ = jax.jit(tuner.select, donate_argnums=0)(state, batch, key)
    update = jax.jit(tuner.step, donate_argnums=0)

    def step() -> float:
        nonlocal state
        state, metrics = update(state, batch, key)
        return float(metrics["loss"])

    trained = count_trained(chosen, state.params, state.added, ()).trained
    return step, trained


def their_step(method: str, model: str, ids: np.ndarray) -> tuple[Step, int]:
    """Returns an update of PyTorch and PEFT, and how many entries it trains."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj"]
    linear += ["gate_proj", "up_proj", "down_proj"]
    configs: dict[str, Any] = {
        "LoRA": lambda: peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=linear, lora_dropout=0.0
        ),
        "SHiRA": lambda: peft.ShiraConfig(r=RANK, target_modules=linear),
    }
    if method in configs:
        network = peft.get_peft_model(network, configs[method]())
    network.train()
    trained = [one for one in network.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    tokens = torch.from_numpy(ids).long()

    def step() -> float:
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(one.numel() for one in trained)


def work(args: argparse.Namespace) -> None:
    """Makes an update for every line that comes in, and reports it in one line."""
    import resource

    if args.threads:
        # The pools of both libraries have a thread for each core they may use.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-args.threads :])
    method, library = args.program
    ids = np.random.default_rng(0).integers(3, 1000, (args.batch_size, args.length))
    build = {OURS: our_step, THEIRS: their_step}[library]
    began = time.process_time()
    step, trained = build(method, args.model, ids.astype(np.int32))
    for _ in sys.stdin:
        before = time.process_time()
        loss = step()
        now = time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"loss": loss, "seconds": now - before, "since_start": now - began}
        print(json.dumps(found | {"peak": peak, "trained": trained}), flush=True)


class Worker:
    """A program in a process of its own."""

    def __init__(self, program: tuple[str, str], args: argparse.Namespace):
        words = [sys.executable, "-m", __spec__.name, "--program", *program]
        for name in ("model", "batch_size", "length", "threads"):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **_QUIET, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    def step(self) -> dict[str, float]:
        """Makes an update."""
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


def measure(args: argparse.Namespace) -> Rows:
    """Returns what the updates of every program reported, the first two included."""
    rows: Rows = {program: [] for program in PROGRAMS}
    with ExitStack() as stack:
        workers = {}
        for program in PROGRAMS:
            # One after the other: starting takes more memory than what stays.
            workers[program] = stack.enter_context(Worker(program, args))
            rows[program] += [workers[program].step(), workers[program].step()]
        losses = {program: updates[0]["loss"] for program, updates in rows.items()}
        if max(losses.values()) - min(losses.values()) > _TOLERANCE:
            raise SystemExit(f"error: the first losses differ: {losses}")
        for _ in range(args.rounds):
            for program, worker in workers.items():
                rows[program].append(worker.step())
    return rows


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Returns one row for every program, with its ratio to its peer of each round."""
    seconds = {
        program: np.array([one["seconds"] for one in updates[2:]])
        for program, updates in rows.items()
    }
    found = []
    for program, updates in rows.items():
        peer = (PEERS.get(program[0], program[0]), THEIRS)
        ratio = seconds[program] / seconds[peer]
        found.append(
            {
                "method": program[0],
                "library": program[1],
                "trained": updates[0]["trained"],
                "seconds": float(seconds[program].mean()),
                "peer": peer[0],
                "ratio": float(seconds[program].mean() / seconds[peer].mean()),
                "quartiles": np.quantile(ratio, (0.25, 0.75)).tolist(),
                "peak": updates[1]["peak"],
                "peak_ratio": updates[1]["peak"] / rows[peer][1]["peak"],
                "first_update": updates[0]["since_start"],
                "first_loss": updates[0]["loss"],
            }
        )
    return found


def result_of(found: list[dict[str, Any]], title: str) -> Result:
    """Returns the table of the rows."""

    def told(one: dict[str, Any]) -> dict[str, str]:
        low, high = one["quartiles"]
        if one["library"] == THEIRS:
            return {"time": "1", "spread": "", "memory": "1"}
        return {
            "time": f"{one['ratio']:.2f} of {one['peer']}",
            "spread": f"{low:.2f} to {high:.2f}",
            "memory": f"{one['peak_ratio']:.2f}",
        }

    def numbers(one: dict[str, Any]) -> dict[str, Any]:
        low, high = one["quartiles"]
        return {"low": low, "high": high, "mib": one["peak"] / 2**20}

    return Result(
        title=title,
        caption="Means over the rounds; quartiles are those of the ratios within a "
        "round. The first update includes reading the model and compiling.",
        rows=[one | numbers(one) | told(one) for one in found],
        columns={
            "program": "{method}, {library}",
            "trained": "{trained:,}",
            "CPU s": "{seconds:.2f}",
            "ratio": "{time}",
            "quartiles": "{spread}",
            "peak MiB": "{mib:,.0f}",
            "ratio of it": "{memory}",
            "first update, CPU s": "{first_update:.1f}",
            "first loss": "{first_loss:.4f}",
        },
        panels=(
            Panel("ratio", "CPU time, ratio to PyTorch", ("low", "high"), floor=1),
            Panel("peak_ratio", "peak memory, ratio to PyTorch", floor=1),
        ),
    )


def write_llama(folder: str) -> str:
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
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", help="folder of a Llama in safetensors")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--threads", type=int, default=1, help="of every program; 0 is all cores"
    )
    parser.add_argument("--program", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        work(args)
        return
    missing = [name for name in ("torch", "peft") if find_spec(name) is None]
    if missing:
        print(f"skipped: needs {', '.join(missing)}; `pip install torch peft`.")
        return
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or write_llama(folder)
        found = summary(measure(args))
    size = f"{args.batch_size} x {args.length} tokens"
    threads = f"{args.threads or 'all'} threads" if args.threads != 1 else "one thread"
    where = f"{platform.machine()}, {threads}, {args.rounds} rounds"
    versions = {name: version(name) for name in ("jax", "torch", "peft")}
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    title = f"one update of {size} ({where}; {told})"
    finish(args.output, result_of(found, title))


if __name__ == "__main__":
    main()

"""Is an update here as fast and as small as with PyTorch and PEFT?

    python -m experiments.benchmarks.against_torch [--model FOLDER] [--threads 1]
        [--methods LoRA SIFT "SIFT + IST" ...]

Every program is a process of its own that reads the same weights, has the same first
loss (or the run ends), and makes an update when it is asked to: all in turn, round by
round, so that whatever else the machine does meets all of them. Times are CPU seconds,
the peak is that of the process up to the second update, weights and libraries included;
what an update adds is the peak of those after, less what was there when the model was
read. LoRA, SIFT, SHiRA and Super-Tuning train equally many entries of the linear maps
of the layers; SHiRA chooses at random, Super-Tuning the largest. Plain AdamW, float32,
no dropout. Without a model it is a Llama of 30 M random parameters. Ten minutes on two
CPU cores; needs torch and peft.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.benchmarks.workers import (
    OURS,
    THEIRS,
    WARM_UP,
    Program,
    Row,
    add_options,
    are_there,
    circumstances,
    measure,
    memory,
    model_of,
    ratios,
    serve,
)
from experiments.command import run_command

RANK, RATE = 16, 1e-4
LAYERS = "^layers/.*/kernel$"
SITES = ("attention/(query|key|value|output)$", "mlp/")
# (what is trained, by which library)
PROGRAMS = (
    ("full", OURS), ("full", THEIRS),
    ("LoRA", OURS), ("LoRA", THEIRS),
    ("SIFT", OURS), ("SHiRA", THEIRS), ("Super-Tuning", THEIRS),
    ("SIFT + IST", OURS),
)  # fmt: skip
# What a program is compared with.
PEERS = {"SIFT": "SHiRA", "Super-Tuning": "SHiRA", "SIFT + IST": "LoRA"}
# Losses of one model and batch differ by rounding.
_TOLERANCE = 1e-4

Rows = dict[Program, list[Row]]
Step = Callable[[], float]  # makes an update and returns the loss before it


def our_step(method: str, model: str, ids: np.ndarray) -> tuple[Step, Row]:
    """Returns an update of this library, what it trains, and the memory before."""
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
    read = memory()
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
    return step, {"trained": trained, "read": read}


def their_step(method: str, model: str, ids: np.ndarray) -> tuple[Step, Row]:
    """Returns an update of PyTorch and PEFT, and the same numbers."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    read = memory()
    linear = ["q_proj", "k_proj", "v_proj", "o_proj"]
    linear += ["gate_proj", "up_proj", "down_proj"]
    maps = [
        one.weight for name, one in network.named_modules()
        if name.rpartition(".")[2] in linear
    ]  # fmt: skip
    entries = sum(RANK * sum(one.shape) for one in maps)
    sparsity = 1 - entries / sum(one.numel() for one in maps)
    configs: dict[str, Any] = {
        "LoRA": lambda: peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=linear, lora_dropout=0.0
        ),
        "SHiRA": lambda: peft.ShiraConfig(r=RANK, target_modules=linear),
        "Super-Tuning": lambda: peft.SupertuningConfig(
            sparsity=sparsity, target_modules=linear
        ),
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

    return step, {"trained": sum(one.numel() for one in trained), "read": read}


def work(args: argparse.Namespace) -> None:
    """Makes updates as they are asked for."""
    method, library = args.program
    ids = np.random.default_rng(0).integers(3, 1000, (args.batch_size, args.length))
    build = {OURS: our_step, THEIRS: their_step}[library]

    def built() -> Callable[[], Row]:
        step, numbers = build(method, args.model, ids.astype(np.int32))
        return lambda: {"loss": step()} | numbers

    serve(built, args.threads)


def programs_of(methods: Sequence[str]) -> tuple[Program, ...]:
    """Returns the programs of some methods and those that they are compared with."""
    peers = {PEERS.get(method, method) for method in methods}
    return tuple(
        (method, library) for method, library in PROGRAMS
        if method in methods or (library == THEIRS and method in peers)
    )  # fmt: skip


def check(firsts: dict[Program, Row]) -> None:
    """Ends the run if the first losses are not those of one model and batch."""
    losses = {program: one["loss"] for program, one in firsts.items()}
    if max(losses.values()) - min(losses.values()) > _TOLERANCE:
        raise SystemExit(f"error: the first losses differ: {losses}")


def added_by(updates: list[Row]) -> int:
    """Returns the bytes that updates need beside the model and the libraries."""
    return max(one["peak"] for one in updates[WARM_UP:]) - updates[0]["read"]


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Returns one row for every program, with its ratio to its peer of each round."""
    found = []
    for program, updates in rows.items():
        peer = (PEERS.get(program[0], program[0]), THEIRS)
        mine, other = (added_by(rows[one]) for one in (program, peer))
        found.append(
            {
                "method": program[0],
                "library": program[1],
                "trained": updates[0]["trained"],
                "peer": peer[0],
                **ratios(updates, rows[peer]),
                "added": mine,
                "added_ratio": mine / other,
                "first_update": updates[0]["since_start"],
                "first_loss": updates[0]["loss"],
            }
        )
    return found


def result_of(found: list[dict[str, Any]], title: str) -> Result:
    """Returns the table of the rows."""

    def told(one: dict[str, Any]) -> dict[str, str]:
        low, high = one["quartiles"]
        mib = {name: f"{one[name] / 2**20:,.0f}" for name in ("peak", "added")}
        if one["method"] == one["peer"] and one["library"] == THEIRS:
            return {"time": "1", **mib}
        return {
            "time": f"{one['ratio']:.2f} of {one['peer']} ({low:.2f} to {high:.2f})",
            **{name: f"{mib[name]} ({one[f'{name}_ratio']:.2f})" for name in mib},
        }

    def row(one: dict[str, Any]) -> dict[str, Any]:
        low, high = one["quartiles"]
        told_sizes = {f"{name}_told": text for name, text in told(one).items()}
        return one | {"low": low, "high": high} | told_sizes

    return Result(
        title=title,
        caption="Means over the rounds, quartiles of the ratios within a round and, in "
        "brackets, ratios to PyTorch. The first update includes reading the model and "
        f"compiling. The first loss of all is {found[0]['first_loss']:.4f}.",
        rows=[row(one) for one in found],
        columns={
            "program": "{method}, {library}",
            "trained": "{trained:,}",
            "CPU s": "{seconds:.2f}",
            "ratio": "{time_told}",
            "peak MiB": "{peak_told}",
            "an update adds MiB": "{added_told}",
            "first update, CPU s": "{first_update:.1f}",
        },
        panels=(
            Panel("ratio", "CPU time, ratio to PyTorch", ("low", "high"), floor=1),
            Panel("peak_ratio", "peak memory, ratio to PyTorch", floor=1),
            Panel("added_ratio", "memory of an update, ratio to PyTorch", floor=1),
        ),
    )


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    add_options(parser, rounds=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    methods = [*dict.fromkeys(method for method, _ in PROGRAMS)]
    parser.add_argument(
        "--methods", nargs="+", choices=methods, default=methods,
        help="the programs they are compared with run as well",
    )  # fmt: skip
    args = parser.parse_args()
    if args.program:
        work(args)
        return
    if not are_there("torch", "peft"):
        return
    with model_of(args) as name:
        shared = ("model", "batch_size", "length", "threads")
        options = {option: getattr(args, option) for option in shared}
        module, programs = __spec__.name, programs_of(args.methods)
        found = summary(measure(module, programs, options, args.rounds, check))
    where = circumstances(args, "torch", "peft")
    size = f"one update of {args.batch_size} x {args.length} tokens"
    title = f"{name}, {size} ({where})"
    finish(args.output, result_of(found, title))


if __name__ == "__main__":
    run_command(main)

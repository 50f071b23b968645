"""Is an update here as fast and as small as with qwix and google-tunix?

    pip install qwix google-tunix
    python -m experiments.benchmarks.against_qwix [--model FOLDER] [--threads 1]

Every program is a process of its own that reads the same weights, has the same first
loss (or the run ends), and makes an update when it is asked to, all in turn, round by
round. Programs of qwix and tunix train tunix's Llama 3 in Flax NNX, since qwix adds
LoRA where a module multiplies by a weight of its own, which layers that run in a scan,
as those of this library, do not. LoRA by qwix is a plain loop with a function that JAX
compiles; with tunix the step is that of its `PeftTrainer`, which trains what qwix adds,
or takes `sift` as the optimizer. All train as many entries of the linear maps of the
layers, with plain AdamW, in float32, without dropout. Without a model it is a Llama of
30 M random parameters. Five minutes on two CPU cores; needs torch, too, which writes
this model.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks.against_torch import (
    RANK,
    RATE,
    Rows,
    Step,
    added_by,
    check,
    our_step,
)
from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.benchmarks.workers import (
    OURS,
    WARM_UP,
    Row,
    add_options,
    are_there,
    circumstances,
    measure,
    memory,
    model_of,
    ratios,
    serve,
    texts_of,
)
from experiments.command import run_command

QWIX, TUNIX = "qwix", "tunix"
PEER = ("LoRA", QWIX)
# (what is trained, by which library)
PROGRAMS = (
    ("LoRA", OURS), ("SIFT", OURS), PEER, ("LoRA", TUNIX), ("SIFT", TUNIX),
)  # fmt: skip
# Llama 3 of tunix 0.1.7 turns by it, whatever its configuration says.
ROPE_THETA = 1_000_000
# Names of the linear maps in tunix, and of their weights for `sift`.
MAPS = ".*(q|k|v|o|gate|up|down)_proj"
WEIGHTS = r"^layers/\d+/(attn|mlp)/"


def read_llama(folder: str) -> Any:
    """Returns the Llama 3 of tunix with the weights of a folder, in float32."""
    import jax.numpy as jnp
    from transformers import AutoConfig
    from tunix.models.llama3 import model, params  # pyright: ignore

    config: Any = AutoConfig.from_pretrained(folder)
    theta = config.rope_parameters["rope_theta"]
    if theta != ROPE_THETA:
        raise SystemExit(
            f"error: `--model` must have a rope_theta of {ROPE_THETA:,}, got "
            f"{theta:,}. Llama 3 of tunix does not read it."
        )
    ours = model.ModelConfig(
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_key_value_heads,
        rope_theta=theta,
        norm_eps=config.rms_norm_eps,
        weight_tying=config.tie_word_embeddings,
    )
    return params.create_model_from_safe_tensors(folder, ours, dtype=jnp.float32)


def batch_of(ids: np.ndarray) -> dict[str, Any]:
    """Returns what tunix calls its models with."""
    import jax.numpy as jnp
    from tunix.sft import utils  # pyright: ignore

    mask = jnp.ones(ids.shape, bool)
    return {
        "input_tokens": jnp.asarray(ids),
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def with_lora(network: Any) -> Any:
    """Returns the model with LoRA by qwix at all linear maps of the layers."""
    import qwix  # pyright: ignore
    from flax import nnx

    provider = qwix.LoraProvider(module_path=MAPS, rank=RANK, alpha=RANK)
    inputs = network.get_model_input()
    return qwix.apply_lora_to_model(network, provider, **inputs, rngs=nnx.Rngs(0))


def qwix_step(method: str, model: str, ids: np.ndarray) -> tuple[Step, Row]:
    """Returns an update by LoRA of qwix, what it trains, and the memory before."""
    import jax
    import optax
    from flax import nnx

    del method
    network, batch = read_llama(model), batch_of(ids)
    read = memory()
    graph, lora, frozen = nnx.split(with_lora(network), nnx.LoRAParam, ...)
    tx = optax.adamw(RATE, weight_decay=0.0)
    # Where the frozen weights are: else the second update is compiled again.
    lora, state = jax.device_put((lora, tx.init(lora)), jax.devices()[0])

    def loss_of(lora: Any, frozen: Any, batch: Any) -> jax.Array:
        tokens, positions = batch["input_tokens"], batch["positions"]
        network = nnx.merge(graph, lora, frozen)
        logits, _ = network(tokens, positions, None, batch["attention_mask"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], tokens[:, 1:]
        ).mean()

    def updated(lora: Any, state: Any, frozen: Any, batch: Any) -> tuple[Any, ...]:
        loss, grads = jax.value_and_grad(loss_of)(lora, frozen, batch)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    update = jax.jit(updated, donate_argnums=(0, 1))

    def step() -> float:
        nonlocal lora, state
        lora, state, loss = update(lora, state, frozen, batch)
        return float(loss)

    return step, {"trained": size_of(lora), "read": read}


def tunix_step(method: str, model: str, ids: np.ndarray) -> tuple[Step, Row]:
    """Returns an update of the `PeftTrainer` of tunix, and the same numbers."""
    import jax
    import optax
    from flax import nnx
    from tunix.sft import peft_trainer  # pyright: ignore

    from sparse_jax import sift

    network, batch = read_llama(model), batch_of(ids)
    read = memory()
    tx: Any = optax.adamw(RATE, weight_decay=0.0)
    if method == "LoRA":
        network = with_lora(network)
        trained = size_of(nnx.state(network, nnx.LoRAParam))
    else:
        tx = sift(tx, density=density_of(network), where=WEIGHTS)
        state: Any = jax.eval_shape(tx.init, nnx.state(network, nnx.Param))
        trained = size_of(state.support)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1)
    trainer = peft_trainer.PeftTrainer(network, tx, config)
    # As its method `train` calls it.
    update, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    return lambda: float(update(batch)[0]), {"trained": trained, "read": read}


def size_of(tree: Any) -> int:
    """Returns the number of entries of arrays."""
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def density_of(network: Any) -> float:
    """Returns the density at which as many entries are trained as by LoRA."""
    maps = [
        one.kernel if hasattr(one, "kernel") else one.w
        for layer in network.layers
        for group in (layer.attn, layer.mlp)
        for name, one in vars(group).items() if name.endswith("_proj")
    ]  # fmt: skip
    # Heads are axes of their own: in front of the last axis, or behind the first.
    width = network.config.embed_dim
    sides = sum(RANK * (width + math.prod(one.shape) // width) for one in maps)
    return sides / sum(math.prod(one.shape) for one in maps)


def work(args: argparse.Namespace) -> None:
    """Makes updates as they are asked for."""
    method, library = args.program
    ids = np.random.default_rng(0).integers(3, 1000, (args.batch_size, args.length))
    build = {OURS: our_step, QWIX: qwix_step, TUNIX: tunix_step}[library]

    def built() -> Callable[[], Row]:
        step, numbers = build(method, args.model, ids.astype(np.int32))
        return lambda: {"loss": step()} | numbers

    serve(built, args.threads)


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Returns one row for every program, with its ratios to LoRA by qwix."""
    found = []
    for program, updates in rows.items():
        costs = ratios(updates, rows[PEER])
        added = added_by(updates)
        found.append(
            {
                "method": program[0],
                "library": program[1],
                "trained": updates[0]["trained"],
                **costs,
                **texts_of(costs, program == PEER),
                "added": added,
                "added_mib": added / 2**20,
                "added_ratio": added / added_by(rows[PEER]),
                "start": updates[WARM_UP - 1]["since_start"],
                "first_loss": updates[0]["loss"],
            }
        )
    return found


def result_of(found: list[dict[str, Any]], title: str) -> Result:
    """Returns the table of the rows."""
    return Result(
        title=title,
        caption="Means over the rounds, quartiles of the ratios within a round, all to "
        f"LoRA by qwix. The first {WARM_UP} updates, which compile, do not count, and "
        "include reading the model. The first loss of all is "
        f"{found[0]['first_loss']:.4f}.",
        rows=found,
        columns={
            "program": "{method}, {library}",
            "trained": "{trained:,}",
            "CPU s": "{seconds:.2f}",
            "ratio": "{time}",
            "quartiles": "{spread}",
            "peak MiB": "{mib:,.0f}",
            "ratio of it": "{memory}",
            "an update adds MiB": "{added_mib:,.0f}",
            f"first {WARM_UP}, CPU s": "{start:.1f}",
        },
        panels=(
            Panel("ratio", "CPU time, ratio to qwix", ("low", "high"), floor=1),
            Panel("peak_ratio", "peak memory, ratio to qwix", floor=1),
            Panel("added_ratio", "memory of an update, ratio to qwix", floor=1),
        ),
    )


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    add_options(parser, rounds=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    if args.program:
        work(args)
        return
    if not are_there("qwix", "tunix", "torch"):
        return
    with model_of(args, rope_theta=ROPE_THETA) as name:
        shared = ("model", "batch_size", "length", "threads")
        options = {option: getattr(args, option) for option in shared}
        found = summary(measure(__spec__.name, PROGRAMS, options, args.rounds, check))
    where = circumstances(args, "flax", "qwix", "google-tunix")
    size = f"one update of {args.batch_size} x {args.length} tokens"
    finish(args.output, result_of(found, f"{name}, {size} ({where})"))


if __name__ == "__main__":
    run_command(main)

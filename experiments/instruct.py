"""Instruction tuning as the SIFT paper does it: SIFT, LoRA and full fine-tuning.

    python -m experiments.instruct --model FOLDER --data FILE --text FILE
        [--scale tiny|small|paper] [--size 7b|13b|33b] [--methods sift lora full]
        [--mesh fsdp=4] [--plan v5p:2x2x1] [--output runs/instruct]

FOLDER is a Llama, FILE a list of instructions such as Alpaca, or of chats. Density,
learning rates, batch size, warm-up and dtype are those that the paper has for a model
of that size (its scripts; weight decay, which acts on nothing there, is left out).
Every row has the loss on examples held out, and perplexity and KL to the base on
the text, which no run trains on, at the end and at equal loss. `small` and `tiny` make
fewer updates of fewer and shorter examples; `--plan`
reports what the paper's runs need on devices that need not be here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.command import run_command
from experiments.forgetting import KERNELS, MAPS, cut_texts, show_ways, way_of
from experiments.papers import print_plan
from experiments.report import fill_in, table_parser
from experiments.trials import run_folder
from sparse_jax import Settings


@dataclass(frozen=True)
class Size:
    """What the paper does with a model of a size.

    Attributes:
      density: of SIFT.
      rates: peak learning rates, by method.
      accumulate: micro-batches of an update of 128 examples.
      checkpointing: whether layers run again in the backward pass.
    """

    density: float
    rates: dict[str, float]
    accumulate: int = 32
    checkpointing: bool = False


SIZES = {
    "7b": Size(0.05, {"sift": 2e-4, "lora": 2e-4, "full": 2e-5}),
    "13b": Size(0.04, {"sift": 9e-5, "lora": 2e-4, "full": 2e-5}),
    "33b": Size(0.03, {"sift": 8e-5, "lora": 1e-4}, 64, checkpointing=True),
}
METHODS: dict[str, dict[str, Any]] = {
    "sift": {"method": "sift", "where": KERNELS},
    "lora": {"method": "lora", "where": MAPS, "rank": 128, "alpha": 256.0},
    "full": {"method": "full"},
}
# What differs from the paper, and examples held out and characters of the text.
SCALES: dict[str, dict[str, Any]] = {
    "tiny": {"batch_size": 8, "accumulate": 2, "max_length": 256, "dtype": "float32"},
    "small": {"batch_size": 8, "accumulate": 2, "max_length": 256, "dtype": "float32"},
    "paper": {},
}
TEXTS = {"tiny": (8, 2_000), "small": (12, 8_000), "paper": (1_000, 200_000)}
UPDATES = {"tiny": 12, "small": 24, "paper": None}
# BabyLlama is less than 128 wide.
TINY_LORA = {"rank": 16, "alpha": 32.0}


def settings_of(size: str, method: str) -> Settings:
    """Returns the paper's settings of a method for a model of a size."""
    of_size, options = SIZES[size], METHODS[method]
    return Settings(
        model="",
        task="causal",
        output="",
        template="alpaca",
        density=of_size.density,
        learning_rate=of_size.rates[method],
        warmup=0.03,
        epochs=3,
        batch_size=128,
        accumulate=of_size.accumulate,
        checkpointing=of_size.checkpointing,
        dtype="bfloat16",
        max_length=512,
        **options,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, then shows all of them."""
    parser = table_parser(__doc__, output="runs/instruct")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=[*METHODS])
    parser.add_argument("--mesh")
    args = parser.parse_args(argv)
    methods = [one for one in args.methods if one in SIZES[args.size].rates]
    rows = {
        one: replace(settings_of(args.size, one), mesh=args.mesh) for one in methods
    }
    if args.plan:
        print_plan(f"llama-{args.size}", rows, length=512, target=args.plan)
        return
    if None in (args.model, args.data, args.text):
        parser.error("--model, --data and --text must be given")
    fill_in(args, {"max_steps": UPDATES[args.scale], "seeds": (0,)})
    held_out, characters = TEXTS[args.scale]
    data, text = cut_texts(
        args.data, args.text, args.output, held_out=held_out, characters=characters
    )
    ways = {}
    for method, settings in rows.items():
        changes: dict[str, Any] = {**SCALES[args.scale]}
        if args.scale == "tiny" and method == "lora":
            changes |= TINY_LORA
        changes |= {"model": args.model, "data": data, "kl_text": text}
        if args.max_steps is not None:
            # Some epochs of a few examples; four evaluations draw a curve.
            changes |= {"max_steps": args.max_steps, "epochs": 1000}
            changes["eval_every"] = max(1, args.max_steps // 4)
        rate = SIZES[args.size].rates[method]
        made = []
        for seed in args.seeds:
            output = str(run_folder(args.output, method, rate, seed))
            made.append(way_of(replace(settings, **changes, seed=seed, output=output)))
        ways[method] = {rate: made}
    title = f"{Path(args.model).name}, {args.data.name}, settings of {args.size}"
    show_ways(ways, f"{title}, {args.scale}", args.output / "instruct")


if __name__ == "__main__":
    run_command(main)

"""What does a method forget at equal task loss?  KL to the base on untouched text.

    python -m experiments.forgetting --model FOLDER --data FILE --text FILE
        [--scale tiny|small] [--methods full lora sift random off-principal ...]
        [--learning-rates RATE ...] [--full-rates RATE ...]
        [--max-steps 60] [--output runs/forgetting]

FOLDER is a decoder, the data are what it is fine-tuned on (instructions, chats or plain
text), the text is like what it was trained on before. Each method is evaluated every
few updates on examples not trained on, and compared with its base on the text,
at every rate of its grid. The task loss of the comparison is the lowest that all
methods reach: each is shown where it first gets there, between two evaluations, at the
rate where it has forgotten least by then; "<=" where its first evaluation is below
that loss already. Figures of several seeds are means. All but full train as many
entries. The picture has the whole ways. An interrupted run goes on where it was.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.command import run_command
from experiments.pictures import COLORS, canvas, colored, save
from experiments.report import fill_in, spread, table_parser
from experiments.trials import run_folder, run_once
from sparse_jax import Settings
from sparse_jax.training.run_files import evaluations_of, read_rows

__all__ = ["KERNELS", "MAPS", "Way", "at_loss", "cut_texts", "show_ways", "way_of"]

# All linear maps of the layers, as sites of LoRA and as leaves.
MAPS = ("^attention/(query|key|value|output)$", "^mlp/(gate|up|down)$")
KERNELS = ("^layers/(attention|mlp)/.*kernel$",)
_SPARSE = {"method": "sift", "where": KERNELS}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "where": MAPS},
    "sift": _SPARSE,
    "sift-sum": {**_SPARSE, "select_batches": 8},
    "sift-ist": {**_SPARSE, "sampler": "ist", "active": 0.5},
    "random": {**_SPARSE, "method": "random"},
    "lift": {**_SPARSE, "method": "lift"},
    "off-principal": {**_SPARSE, "score": "off-principal"},
    "smallest-magnitude": {**_SPARSE, "score": "smallest-magnitude"},
    "smallest-fisher": {**_SPARSE, "score": "smallest-fisher", "select_batches": 8},
}
# What the options are where they are left out. A LoRA of this rank has as many
# parameters as there are entries: of BabyLlama, and of SmolLM2-135M.
SCALES: dict[str, dict[str, Any]] = {
    "tiny": {
        "max_steps": 60, "batch_size": 8, "max_length": 128, "eval_every": 6,
        "rank": 4, "density": 0.0507, "held_out": 3_000, "characters": 3_000,
        "full_rates": (1e-3,), "learning_rates": (5e-3,), "seeds": (0,),
    },
    "small": {
        "max_steps": 32, "batch_size": 4, "max_length": 192, "eval_every": 8,
        "rank": 16, "density": 0.046, "held_out": 12, "characters": 8_000,
        "full_rates": (2e-5,), "learning_rates": (5e-4,), "seeds": (0,),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """What a run reached, evaluation after evaluation.

    Attributes:
      loss: of the task, on examples that are not trained on, nats per token.
      kl: to the base on the text, nats per token.
      perplexity: on the text, in relation to that of the base.
      trained: parameters.
    """

    loss: tuple[float, ...]
    kl: tuple[float, ...]
    perplexity: tuple[float, ...]
    trained: int


def way_of(settings: Settings) -> Way:
    """Returns what a run reached; it is made if it has not been."""
    metrics = run_once(settings)
    rows = evaluations_of(read_rows(Path(settings.output) / "metrics.jsonl"))
    task, text = (
        [row for row in rows if row["split"] == split]
        for split in ("validation", "text")
    )
    return Way(
        loss=tuple(row["loss"] for row in task),
        kl=tuple(row["kl"] for row in text),
        perplexity=tuple(math.exp(row["loss"] - row["base_loss"]) for row in text),
        trained=metrics["trained_parameters"],
    )


def at_loss(way: Way, loss: float) -> tuple[float, float] | None:
    """Returns KL and perplexity where a way first comes down to a loss, if it does.

    Between two evaluations a way is a line.

    Example:
      >>> at_loss(Way((3.0, 2.0, 1.0), (0.0, 0.2, 0.4), (1.0, 1.0, 2.0), 1), 1.5)
      (0.3, 1.5)
    """
    for i, found in enumerate(way.loss):
        if found > loss:
            continue
        if i == 0:
            return way.kl[0], way.perplexity[0]
        share = (way.loss[i - 1] - loss) / (way.loss[i - 1] - found)
        kl, perplexity = (
            round(values[i - 1] + share * (values[i] - values[i - 1]), 12)
            for values in (way.kl, way.perplexity)
        )
        return kl, perplexity
    return None


def cut_texts(
    data: Path, text: Path, folder: Path, *, held_out: int, characters: int
) -> tuple[str, str]:
    """Writes the data with something held out, and the beginning of a text.

    Args:
      data: a plain text, or a list or lines of records in JSON.
      text: plain text.
      folder: to write to.
      held_out: characters at the end of a plain text, or records, to evaluate on.
      characters: of the text.

    Returns:
      The folder of the data, and the file of the text.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    whole = data.read_text(encoding="utf-8")
    if data.suffix == ".txt":
        parts = {"train.txt": whole[:-held_out], "validation.txt": whole[-held_out:]}
    else:
        lines = data.suffix == ".jsonl"
        records = [*map(json.loads, whole.splitlines())] if lines else json.loads(whole)
        parts = {
            "train.json": json.dumps(records[:-held_out]),
            "validation.json": json.dumps(records[-held_out:]),
        }
    for name, part in parts.items():
        (folder / "data" / name).write_text(part, encoding="utf-8")
    short = folder / "text.txt"
    short.write_text(text.read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return str(folder / "data"), str(short)


def show_ways(
    ways: Mapping[str, Mapping[float, Sequence[Way]]], title: str, stem: Path
) -> None:
    """Prints the table, and writes `stem.json` and `stem.png`.

    Args:
      ways: of every seed, by method and learning rate.
      title: of the table and the picture.
      stem: path without a suffix.
    """
    reached = lambda way: min(way.loss)
    # The lowest that every seed of every method reaches at one rate at least.
    target = max(
        min(max(map(reached, seeds)) for seeds in rates.values())
        for rates in ways.values()
    )
    table = Table(title=f"{title}; equal task loss: {target:.3f} nats per token")
    for column in (
        "method", "trained", "rate", "task loss at the end", "KL at the end",
        "perplexity of the text at the end", "KL at equal task loss",
        "perplexity of the text there",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "method" else "right")
    best = {}
    for method, rates in ways.items():
        found = {
            rate: [point for way in seeds if (point := at_loss(way, target))]
            for rate, seeds in rates.items()
        }
        whole = {r: p for r, p in found.items() if len(p) == len(rates[r])}
        rate = min(whole, key=lambda rate: np.mean([kl for kl, _ in whole[rate]]))
        seeds, points = rates[rate], whole[rate]
        best[method] = seeds
        most = "<= " * any(way.loss[0] < target for way in seeds)
        table.add_row(
            method,
            f"{seeds[0].trained:,}",
            f"{rate:g}",
            spread([way.loss[-1] for way in seeds], 3),
            spread([way.kl[-1] for way in seeds], 4),
            f"x {spread([way.perplexity[-1] for way in seeds], 3)}",
            f"{most}{spread([kl for kl, _ in points], 4)}",
            f"{most}x {spread([perplexity for _, perplexity in points], 3)}",
        )
    Console(width=150).print(table)
    record = {
        "title": title,
        "equal_loss": target,
        "ways": {
            method: {
                f"{rate:g}": [*map(asdict, seeds)] for rate, seeds in rates.items()
            }
            for method, rates in ways.items()
        },
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=2))
    figure, (axes,) = canvas(1)
    for place, (color, (method, seeds)) in enumerate(colored(best.items())):
        # Colors come again, the lines do not.
        line = "o-" if place < len(COLORS) - 1 else "s--"
        for number, way in enumerate(seeds):
            label = method if number == 0 else None
            axes.plot(way.loss, way.kl, line, color=color, markersize=4, label=label)
    axes.axvline(target, color=COLORS[0], linewidth=1.2, zorder=0)
    axes.invert_xaxis()
    axes.set_yscale("log")
    axes.set_xlabel("loss of the task, not trained on (nats per token), falling")
    axes.set_ylabel("KL to the base on the text (nats per token)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, stem.with_suffix(".png"), title)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, then shows all of them."""
    parser = table_parser(__doc__, output="runs/forgetting")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=[*METHODS])
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", help="the grid of all but full"
    )
    parser.add_argument("--full-rates", type=float, nargs="+", help="the grid of full")
    args = parser.parse_args(argv)
    if args.scale not in SCALES or args.plan or args.model is None:
        parser.error(f"give --model, and a --scale of {', '.join(SCALES)}")
    scale = SCALES[args.scale]
    fill_in(
        args,
        {
            name: scale[name]
            for name in ("max_steps", "seeds", "learning_rates", "full_rates")
        },
    )
    data, text = cut_texts(
        args.data, args.text, args.output,
        held_out=scale["held_out"], characters=scale["characters"],
    )  # fmt: skip
    base = Settings(
        model=args.model,
        task="causal",
        output="",
        data=data,
        kl_text=text,
        loss_on="all" if args.data.suffix == ".txt" else None,
        epochs=1000,  # until `max_steps`
        max_steps=args.max_steps,
        **{name: scale[name] for name in (
            "batch_size", "max_length", "eval_every", "rank", "density"
        )},
    )  # fmt: skip
    ways = {
        method: {
            rate: [_way(method, base, rate, seed, args) for seed in args.seeds]
            for rate in (args.full_rates if method == "full" else args.learning_rates)
        }
        for method in args.methods
    }
    title = f"{Path(args.model).name}, {args.data.name}, {args.max_steps} updates"
    show_ways(ways, title, args.output / "forgetting")


def _way(
    method: str, base: Settings, rate: float, seed: int, args: argparse.Namespace
) -> Way:
    """Returns what a method reached at a rate with a seed."""
    output = str(run_folder(args.output, method, rate, seed))
    about = {"learning_rate": rate, "seed": seed, "output": output}
    return way_of(replace(base, **about, **METHODS[method]))


if __name__ == "__main__":
    run_command(main)

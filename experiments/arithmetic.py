"""Do a few layers, or a few entries, suffice for arithmetic?

    python -m experiments.tables arithmetic --scale tiny|small|paper --model FOLDER
        --data FOLDER --train math_10k.json [--rows lora lora+ist ...] [--seeds 0 1]
        [--output runs/arithmetic] [--plan TARGET]

As `experiments/commonsense.py`, with worked solutions to train on: the model writes,
and its answer is the last number, or for AQuA the first letter from A to E. FOLDER is
`dataset` of LLM-Adapters, with `NAME/test.json`. `small` trains on all of a smaller
file such as `math_data.json`.
"""

from collections.abc import Sequence

from experiments.answers import Benchmark
from experiments.command import run_command
from experiments.questions import make_table, parser_of

SETS = ("gsm8k", "AQuA", "mawps", "SVAMP")
BENCHMARK = Benchmark(
    title="arithmetic",
    sets={"tiny": ("mawps",), "small": SETS, "paper": SETS},
    template="alpaca",
    max_new_tokens=256,
    answers=("write",),
    # Of LLM-Adapters, whose settings IST takes over.
    published={
        "series": (33.3, 15.0, 77.7, 52.3),
        "parallel": (35.3, 18.1, 82.4, 49.6),
        "lora": (37.5, 18.9, 79.0, 52.1),
    },
)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs and the answers that are missing, and shows the table."""
    make_table(parser_of(__doc__, BENCHMARK).parse_args(argv), BENCHMARK)


if __name__ == "__main__":
    run_command(main)

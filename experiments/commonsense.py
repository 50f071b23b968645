"""Do a few layers, or a few entries, suffice for commonsense?

    python -m experiments.tables commonsense --scale tiny|small|paper --model FOLDER
        --data FOLDER [--train FILE] [--rows lora lora+ist ...] [--seeds 0 1]
        [--answer-by cloze|rank|write] [--output runs/commonsense] [--plan TARGET]

FOLDER of the data is `dataset` of LLM-Adapters, with `NAME/test.json` and, of some
sets, `NAME/train.json`.

tiny   60 examples, 20 questions of two sets: shows that it runs.
small  for SmolLM2-135M: 1,002 examples of the training splits of the two ARC sets and
       OpenBookQA, packed, one epoch; 300 questions of those, Social IQa and WinoGrande,
       the same for all rows. Trained and ranked are the texts of the answers: a model
       of this size guesses among numbered ones. SIFT and LIFT train as many entries of
       the same matrices as LoRA has parameters, and a quarter of the layers at a time
       with IST or at random.
paper  LLM-Adapters' mixed training file (`--train commonsense_170k.json`) and eight
       sets, with its prompts and adapters; the model writes its answer with four beams.

The learning rate of a row is the one with the least loss on held-out training examples
on the first seed: no test question chooses anything. Differences of the average to LoRA
are those of the same questions, with their standard error over questions. An
interrupted table goes on where it was, question by question; several processes may
share a folder if their rows or seeds differ (all of them need the first seed).
"""

from collections.abc import Sequence

from experiments.answers import Benchmark
from experiments.command import run_command
from experiments.questions import make_table, parser_of

SETS = (
    "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy",
    "ARC-Challenge", "openbookqa",
)  # fmt: skip
_TRAINED = ("ARC-Easy", "ARC-Challenge", "openbookqa")
BENCHMARK = Benchmark(
    title="commonsense",
    sets={
        "tiny": ("ARC-Easy", "winogrande"),
        "small": (*_TRAINED, "social_i_qa", "winogrande"),
        "paper": SETS,
    },
    trained=_TRAINED,
    template="llm_adapters",
    max_new_tokens=32,
    answers=("cloze", "rank", "write"),
    # Of LLM-Adapters, whose settings IST takes over.
    published={
        "series": (63.0, 79.2, 76.3, 67.9, 75.7, 74.5, 57.1, 72.4),
        "parallel": (67.9, 76.4, 78.8, 69.8, 78.9, 73.7, 57.3, 75.2),
        "lora": (68.9, 80.7, 77.4, 78.1, 78.8, 77.8, 61.3, 74.8),
    },
)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs and the answers that are missing, and shows the table."""
    make_table(parser_of(__doc__, BENCHMARK).parse_args(argv), BENCHMARK)


if __name__ == "__main__":
    run_command(main)

"""Do a few layers at a time suffice for commonsense?  The paper's eight sets.

    python -m experiments.commonsense --model FOLDER --data commonsense_170k.json
        --tests FOLDER [--methods lora dora series parallel]
        [--layers all ist random] [--answer-by write|rank] [--max-questions N]
        [--output runs/commonsense]

Fine-tunes a decoder on the mixed training file of LLM-Adapters by every method, all
layers at a time, a quarter of them by IST, and a quarter at random, and evaluates it on
the test sets `FOLDER/NAME/test.json`. The learning rate of each is the one with the
lowest loss on held-out training examples on the first seed: no test question chooses
anything. `write` lets the model write, with four beams, and takes the first answer it
names; `rank` takes the candidate that is likeliest as the response. An interrupted run
of this file goes on where it was.
"""

from experiments.predictions import run_command
from experiments.questions import compare, parser_of

SETS = (
    "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy",
    "ARC-Challenge", "openbookqa",
)  # fmt: skip


def main() -> None:
    """Makes the runs that are missing, then shows all of them."""
    parser = parser_of(__doc__, SETS, "runs/commonsense")
    parser.add_argument("--answer-by", choices=("write", "rank"), default="write")
    args = parser.parse_args()
    compare(args, template="llm_adapters", max_new_tokens=32, answer_by=args.answer_by)


if __name__ == "__main__":
    run_command(main)

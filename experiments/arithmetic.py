"""Do a few layers at a time suffice for arithmetic?  The paper's four sets.

    python -m experiments.arithmetic --model FOLDER --data math_10k.json
        --tests FOLDER [--methods lora dora series parallel]
        [--layers all ist random] [--max-questions N]
        [--output runs/arithmetic]

As `experiments/commonsense.py`, with worked solutions: the answer is the last number
that the model writes, or for AQuA the first letter from A to E.
"""

from experiments.predictions import run_command
from experiments.questions import compare, parser_of

SETS = ("gsm8k", "AQuA", "mawps", "SVAMP")


def main() -> None:
    """Makes the runs that are missing, then shows all of them."""
    args = parser_of(__doc__, SETS, "runs/arithmetic").parse_args()
    compare(args, template="alpaca", max_new_tokens=256, answer_by="write")


if __name__ == "__main__":
    run_command(main)

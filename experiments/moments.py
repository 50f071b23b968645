"""What do moments of fewer bytes cost in accuracy?  Three seeds, the same updates.

    python -m experiments.moments --model FOLDER --task mrpc --data FOLDER
        [--dtypes float32 bfloat16 int8] [--density 0.05] [--max-steps 200]
        [--batch-size 16] [--max-length 128] [--max-eval-samples N]
        [--seeds 0 1 2] [--learning-rates 2e-3] [--output runs/moments]

SIFT with each `--moment-dtype`: of one seed all choose the same entries and read the
same batches. With the task causal the loss on held-out responses is compared, with a
task of GLUE its metric. Masters are not among the choices, because `--split-masters`
keeps their values but for the last bit of one in 131,072 (tests compare them). An
interrupted run of this file goes on where it was.
"""

import argparse

from experiments.command import run_command
from experiments.trials import measure_of, show, trial_parser
from sparse_jax import Settings
from sparse_jax.training.recipe_options import MOMENTS


def settings_of(moments: str, args: argparse.Namespace) -> Settings:
    """Returns the settings of a choice."""
    return Settings(
        model=args.model,
        data=args.data,
        task=args.task,
        output="",
        density=args.density,
        moment_dtype=moments,
        epochs=100,
        batch_size=args.batch_size,
        group_by_length=True,  # MRPC: rows of 1.2 instead of 1.8 times its tokens
        max_length=args.max_length,
        max_steps=args.max_steps,
        max_eval_samples=args.max_eval_samples,
    )


def main() -> None:
    """Makes the runs that are missing, then shows all of them."""
    parser = trial_parser(__doc__, rates=[2e-3], output="runs/moments")
    parser.set_defaults(max_steps=200)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--dtypes", nargs="+", choices=MOMENTS, default=MOMENTS)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--max-eval-samples", type=int)
    args = parser.parse_args()
    show(
        f"sift on {args.task}, {args.max_steps} updates of {args.batch_size}",
        {name: settings_of(name, args) for name in args.dtypes},
        measure=measure_of(args.task),
        args=args,
    )


if __name__ == "__main__":
    run_command(main)

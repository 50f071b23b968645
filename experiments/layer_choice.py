"""Which layers should an update train?  IST, random layers and all layers, three seeds.

    python -m experiments.layer_choice --model FOLDER --data FILE [--task causal]
        [--choices all ist ist-fast random] [--method lora] [--active 0.25]
        [--max-steps 300] [--seeds 0 1 2] [--learning-rates 5e-4 2e-3 8e-3]
        [--output runs/layer_choice]

With the task causal FOLDER is a decoder of many layers, such as the one that
`experiments/pretrain_decoder.py` makes, and FILE a text of another kind than it was
trained on: what is compared is the loss on the end of the text, which no run trains on.
With a task of GLUE FOLDER is an encoder, and its metric on the evaluation data is
compared. All runs make the same number of updates and differ in nothing but the layers;
each way has its learning rate from the same grid, the best on the first seed. An
interrupted run of this file goes on where it was.
"""

import argparse
from dataclasses import replace

from experiments.trials import measure_of, show, trial_parser
from sparse_jax import Settings

# The paper's sites: query, key, value, and the two maps of the MLP.
WHERE = ("^attention/(query|key|value)$", "^mlp/(up|down)$")
# The released rate is for tens of thousands of updates: a reward is exp(-loss), and at
# 3.5 nats a token it hardly moves the importance in a few hundred.
CHOICES = {
    "all": {},
    "ist": {"sampler": "ist"},
    "ist-fast": {"sampler": "ist", "importance_rate": 1000.0},
    "random": {"sampler": "uniform"},
}


def settings_of(choice: str, args: argparse.Namespace) -> Settings:
    """Returns the settings of a choice of layers."""
    settings = Settings(
        model=args.model,
        data=args.data,
        task=args.task,
        output="",
        method=args.method,
        epochs=100,
        max_steps=args.max_steps,
    )
    if settings.is_causal:
        settings = replace(settings, loss_on="all", batch_size=16, max_length=128)
    if args.method == "sift":
        leaves = tuple(f"^layers/{rule[1:-1]}/" for rule in WHERE)
        settings = replace(settings, where=leaves, density=0.05)
    if args.method == "lora" and settings.is_causal:
        settings = replace(settings, where=WHERE)
    if choice == "all":
        return settings
    return replace(settings, active=args.active, **CHOICES[choice])


def main() -> None:
    """Makes the runs that are missing, then shows all of them."""
    rates = [5e-4, 2e-3, 8e-3]
    parser = trial_parser(__doc__, rates=rates, output="runs/layer_choice")
    parser.set_defaults(max_steps=300)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="causal")
    parser.add_argument("--choices", choices=CHOICES, nargs="+", default=[*CHOICES])
    parser.add_argument("--method", choices=("lora", "sift", "full"), default="lora")
    parser.add_argument("--active", type=float, default=0.25)
    args = parser.parse_args()
    show(
        f"{args.method} on {args.task}, {args.max_steps} updates",
        "layers",
        {f"{args.method}-{name}": settings_of(name, args) for name in args.choices},
        measure=measure_of(args.task),
        args=args,
    )


if __name__ == "__main__":
    main()

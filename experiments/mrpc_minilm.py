"""Does SIFT keep up with full fine-tuning and LoRA?  MiniLM on MRPC, three seeds.

    python -m experiments.mrpc_minilm --model FOLDER --data FOLDER
        [--methods full lora-8 sift-0.01 ...] [--seeds 0 1 2]
        [--learning-rates 1e-4 5e-4 2e-3] [--epochs 4] [--output runs/mrpc_minilm]

FOLDER are all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide) and the two files of MRPC. Every
method has its learning rate from the same grid, the best on the first seed, by
the test examples like all results here. LoRA and the sparse methods train query, key,
value and output of the attention; everything but "head" trains the classifier too.
An interrupted run of this file goes on where it was; several may share a folder if
their methods differ.
"""

from dataclasses import replace

from experiments.trials import measure_of, show, trial_parser
from sparse_jax import Settings

BASE = Settings(
    model="",
    task="mrpc",
    output="",
    batch_size=32,  # examples
    max_length=128,  # tokens
    epochs=4,
)
METHODS = {
    "full": replace(BASE, method="full"),
    "lora-8": replace(BASE, method="lora", rank=8),
    "sift-0.05": replace(BASE, method="sift", density=0.05),
    "sift-0.01": replace(BASE, method="sift", density=0.01),
    "sift-0.001": replace(BASE, method="sift", density=0.001),
    "random-0.001": replace(BASE, method="random", density=0.001),
    # Two of the six layers at a time, chosen by their importance or at random.
    "lora-8-ist": replace(BASE, method="lora", rank=8, sampler="ist", active=0.34),
    "lora-8-rst": replace(BASE, method="lora", rank=8, sampler="uniform", active=0.34),
    "bitfit": replace(BASE, method="bitfit"),
    "head": replace(BASE, method="head"),
}


def main() -> None:
    """Makes the runs that are missing, then shows all of them."""
    rates = [1e-4, 5e-4, 2e-3]
    parser = trial_parser(__doc__, rates=rates, output="runs/mrpc_minilm")
    parser.add_argument("--data", required=True)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=BASE.epochs)
    args = parser.parse_args()
    given = {
        "model": args.model,
        "data": args.data,
        "epochs": args.epochs,
        "max_steps": args.max_steps,
    }
    show(
        f"MRPC, test examples, {args.epochs} epochs",
        "method",
        {name: replace(METHODS[name], **given) for name in args.methods},
        measure=measure_of("mrpc"),
        args=args,
    )


if __name__ == "__main__":
    main()

"""Pre-trains a small Llama on plain text, for experiments that need many layers.

    python -m experiments.pretrain_decoder --text FILE [FILE ...] --output FOLDER
        [--num-layers 8] [--width 128] [--vocabulary 1024] [--epochs 6] [--seed 0]

Files are `.txt`, or `.jsonl` with a column `text`. A byte-pair tokenizer is trained on
them, then the model, in full, by `sparse_jax.finetune` from random weights. Two
megabytes take some ten minutes on two cores. FOLDER is then a model in the Hugging Face
layout; the run is in `FOLDER/run`.
"""

import argparse
import json
from pathlib import Path

import jax

from experiments.command import run_command
from sparse_jax import (
    Settings,
    apply_adapter,
    finetune,
    from_pretrained,
    load_adapter,
    save_pretrained,
)
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import DecoderConfig
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model

LENGTH = 128  # tokens
END = "<|end|>"


def main() -> None:
    """Writes the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = [text for path in args.text for text in read_texts(path)]
    start, run = args.output / "start", args.output / "run"
    write_tokenizer(texts, args.vocabulary, start)
    config = DecoderConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        num_layers=args.num_layers,
        num_heads=args.width // 32,
        num_kv_heads=args.width // 32,
        head_size=32,
        intermediate_size=11 * args.width // 4,
        max_positions=2 * LENGTH,
        tied=True,
    )
    model = Model(CausalLM, LLAMA, config)
    save_pretrained(model, model.init(jax.random.key(args.seed)), start)
    data = args.output / "text.jsonl"
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    data.write_text("".join(lines), encoding="utf-8")
    finetune(
        Settings(
            model=str(start),
            task="causal",
            data=str(data),
            output=str(run),
            method="full",
            loss_on="all",
            packing=True,
            learning_rate=3e-3,
            batch_size=16,
            max_length=LENGTH,
            epochs=args.epochs,
            max_steps=args.max_steps,
            seed=args.seed,
        )
    )
    model, params = from_pretrained(start, head=CausalLM)
    params, _ = apply_adapter(params, load_adapter(run))
    save_pretrained(model, params, args.output)
    write_tokenizer(texts, args.vocabulary, args.output)


def read_texts(path: Path) -> list[str]:
    """Returns the paragraphs of a text, or the texts of JSON lines."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in content.splitlines()]
    return [part.strip() for part in content.split("\n\n") if part.strip()]


def write_tokenizer(texts: list[str], size: int, folder: Path) -> None:
    """Trains a byte-level tokenizer and writes it; the same texts give the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(
        folder
    )


if __name__ == "__main__":
    run_command(main)

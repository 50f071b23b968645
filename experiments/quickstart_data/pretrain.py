"""Pre-trains the quickstart's encoder: hidden words, and which text goes on where.

    python -m experiments.quickstart_data.tokens --corpus corpus.npz
    python -m experiments.quickstart_data.pretrain --corpus corpus.npz --output DIR

The first loss is BERT's: 15 % of the words are to be restored. The second trains the
pooled vector: among all sequences of the batch, it is to be nearest to the sequence
that goes on where its own ends. The corpus is drawn on the device, and a step is one
compiled program, so the script runs unchanged on CPU and GPU.
"""

import argparse
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.quickstart_data.windows import Windows, draw_windows
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.family import Family
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.heads import MaskedLM
from sparse_jax.models.hf.pretrained import save_pretrained

CONFIG = EncoderConfig(
    vocab_size=4096,
    hidden_size=192,
    num_layers=4,
    num_heads=4,
    intermediate_size=576,
    max_positions=128,
)
TEMPERATURE = 0.1  # of the cosines of pooled vectors
EVALUATION_BATCHES = 8

Metrics = dict[str, jax.Array]


class PreTraining(MaskedLM):
    """A masked language model with the pooler of a classifier beside its head."""

    def __init__(self, family: Family, config: EncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(family, config, rngs=rngs)
        assert family.pooler is not None
        self.pooler = family.pooler(config, rngs)

    def read(
        self, windows: Windows, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the word logits `[B, M, V]` and the pooled vectors `[B, D]`."""
        hidden = self.encode(
            {
                "input_ids": windows.input_ids,
                "attention_mask": windows.attention_mask,
            },
            key=key,
            attachment=Attachment(),
            unroll=None,
            checkpoint=False,
        )
        picked = jnp.take_along_axis(hidden, windows.positions[:, :, None], axis=1)
        words = self.lm_head(picked, self.embeddings.word.embedding[...])
        return words, self.pooler(hidden[:, 0])


MODEL = Model(PreTraining, BERT, CONFIG)


def loss(
    params: Params, windows: Windows, key: jax.Array | None, pair_weight: float
) -> tuple[jax.Array, Metrics]:
    """Returns `word_loss + pair_weight * pair_loss`, and both with their accuracies."""
    words, pooled = MODEL.bind(params).read(windows, key)
    share = windows.weights / windows.weights.sum()
    word_losses = optax.softmax_cross_entropy_with_integer_labels(
        words, windows.targets
    )
    word_loss = (word_losses * share).sum()
    word_hits = (words.argmax(-1) == windows.targets) * share
    pair_loss, pair_accuracy = _neighbours(pooled)
    metrics = {
        "word_loss": word_loss,
        "word_accuracy": word_hits.sum(),
        "pair_loss": pair_loss,
        "pair_accuracy": pair_accuracy,
    }
    return word_loss + pair_weight * pair_loss, metrics


def _neighbours(pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores how well the neighbour of each pooled vector `[B, D]` is found."""
    size = pooled.shape[0]
    unit = pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)
    cosines = jnp.where(jnp.eye(size, dtype=bool), -1.0, unit @ unit.T)
    neighbour = jnp.roll(jnp.arange(size), size // 2)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        cosines / TEMPERATURE, neighbour
    )
    return losses.mean(), (cosines.argmax(-1) == neighbour).mean()


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with a warm-up, a cosine to zero, and no decay of vectors.

    At 2e-3 and a short warm-up the encoder collapses: every position gets the same
    vector and the loss stays at that of the words' frequencies, about 6.3.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(steps // 10, 1), steps
    )
    # The leaves under `layers` have one axis more, and their biases are matrices.
    is_matrix = partial(
        jax.tree_util.tree_map_with_path,
        lambda path, leaf: path[-1].key in ("kernel", "embedding"),
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.01, mask=is_matrix),
    )


def pretrain(corpus: Mapping[str, np.ndarray], args: argparse.Namespace) -> Params:
    """Returns trained parameters, and prints how the training goes."""
    streams = {name: jnp.asarray(ids) for name, ids in corpus.items()}
    draw = partial(draw_windows, batch_size=args.batch_size, length=args.length)
    optimizer = make_optimizer(args.learning_rate, args.steps)
    init_key, train_key, test_key = jax.random.split(jax.random.key(args.seed), 3)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, stream: jax.Array, count: jax.Array):
        draw_key, dropout_key = jax.random.split(jax.random.fold_in(train_key, count))
        windows = draw(draw_key, stream)
        gradient = jax.grad(loss, has_aux=True)
        grads, metrics = gradient(params, windows, dropout_key, args.pair_weight)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    @jax.jit
    def evaluate(params: Params, stream: jax.Array) -> Metrics:
        keys = jax.random.split(test_key, EVALUATION_BATCHES)
        score = lambda key: loss(params, draw(key, stream), None, args.pair_weight)[1]
        return jax.tree.map(jnp.mean, jax.lax.map(score, keys))

    params = MODEL.init(init_key)
    state = optimizer.init(params)
    begin = time.perf_counter()
    for count in range(1, args.steps + 1):
        params, state, metrics = step(params, state, streams["train"], jnp.int32(count))
        if count % args.log_every == 0 or count == args.steps:
            held_out = evaluate(params, streams["validation"])
            print(f"step {count:6} {time.perf_counter() - begin:6.0f} s", end="")
            print(f"  train: {_text(metrics)}  held out: {_text(held_out)}", flush=True)
    return params


def _text(metrics: Metrics) -> str:
    """Returns metrics on one line."""
    return " ".join(f"{name} {float(value):.3f}" for name, value in metrics.items())


def save(params: Params, folder: Path) -> None:
    """Writes the encoder, its pooler and its word head in 16 bits."""
    # float16 keeps three bits more of a weight than bfloat16 does.
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    save_pretrained(Model(MaskedLM, BERT, CONFIG), halves, folder)


def main() -> None:
    """Reads the command line, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("corpus.npz"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--pair-weight", type=float, default=0.2)
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with np.load(args.corpus) as corpus:
        params = pretrain(dict(corpus), args)
    save(params, args.output)
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()

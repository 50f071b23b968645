"""The two models the benchmarks step: an encoder and a decoder-shaped stack."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax import Attachment
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.slots import run_slots
from sparse_jax.models.stack import default_unroll

LAYERS, WIDTH, HEADS, VOCABULARY = 8, 512, 8, 8192


class Stack(NamedTuple):
    """A model to measure."""

    params: Any
    loss: Callable[..., Any]  # (params, batch, key, attachment) -> (total, weight)
    batch: Any
    where: str  # the targets


def encoder(
    dtype: Any, batch: int, length: int, checkpoint: bool, unroll: int | None = None
) -> Stack:
    """Returns a BERT of 30 M parameters with a classification head."""
    config = EncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        intermediate_size=4 * WIDTH,
        num_labels=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = Model(SequenceClassifier, BERT, config)
    ids = jax.random.randint(jax.random.key(1), (batch, length), 1, VOCABULARY)
    inputs = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    labels = jnp.arange(batch) % 2

    def loss(params: Any, batch: Any, key: Any, attachment: Attachment) -> Any:
        inputs, labels = batch
        options = {"checkpoint": checkpoint, "unroll": unroll}
        logits = model(params, inputs, attachment=attachment, **options)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), losses.size

    params = model.init(jax.random.key(0), dtype)
    # Matrices and their biases, as the paper's modules have them. With the biases left
    # out XLA:CPU lays out the cotangents badly: every method that does not train them,
    # the floor and LoRA included, takes a quarter longer.
    linear = r"layers/(attention|mlp)/(query|key|value|output|up|down)/"
    return Stack(params, loss, (inputs, labels), linear)


def decoder(
    dtype: Any,
    batch: int,
    length: int,
    checkpoint: bool,
    unroll: int | None = None,
    recompute_attention: bool = False,
) -> Stack:
    """Returns a Llama-shaped stack of 30 M parameters with tied embeddings.

    With `recompute_attention` the scores of the attention are not kept for the backward
    pass, as with a flash kernel.
    """
    hidden = 1408
    shapes = {
        "attention/query": (WIDTH, WIDTH),
        "attention/key": (WIDTH, WIDTH),
        "attention/value": (WIDTH, WIDTH),
        "attention/output": (WIDTH, WIDTH),
        "mlp/gate": (WIDTH, hidden),
        "mlp/up": (WIDTH, hidden),
        "mlp/down": (hidden, WIDTH),
    }
    draw = lambda i, *shape: 0.02 * jax.random.normal(jax.random.key(i), shape, dtype)
    layers = {
        site: {"kernel": draw(i, LAYERS, *shape)}
        for i, (site, shape) in enumerate(shapes.items())
    }
    scales = {f"norm_{i}": jnp.ones((LAYERS, WIDTH), dtype) for i in (1, 2)}
    params = {"embedding": draw(99, VOCABULARY, WIDTH), "layers": layers | scales}
    ids = jax.random.randint(jax.random.key(1), (batch, length), 1, VOCABULARY)
    passes = unroll or default_unroll(LAYERS, checkpoint)

    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    if recompute_attention:
        attend = jax.checkpoint(attend)

    def layer(x: jax.Array, layer_params: Any, respond: Any) -> jax.Array:
        linear = lambda site, x: respond(
            site, lambda x: x @ layer_params[site]["kernel"], x
        )
        h = _norm(x) * layer_params["norm_1"]
        heads = [
            linear(f"attention/{name}", h).reshape(*h.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        ]
        mixed = attend(*heads)
        x = x + linear("attention/output", mixed.reshape(x.shape))
        h = _norm(x) * layer_params["norm_2"]
        gated = jax.nn.silu(linear("mlp/gate", h)) * linear("mlp/up", h)
        return x + linear("mlp/down", gated)

    def loss(params: Any, ids: Any, key: Any, attachment: Attachment) -> Any:
        def call(x: jax.Array, one: Any) -> jax.Array:
            layer_params, trained = one
            layer_params = attachment.weights(layer_params, trained)
            respond = lambda site, f, x: attachment.response(site, f, x, trained, None)
            return layer(x, layer_params, respond)

        def call_row(x: jax.Array, one: Any, row: Any, context: Any) -> jax.Array:
            del context
            layer_params, trained = one
            return call(x, (layer_params, trained.with_row(row)))

        x = params["embedding"][ids]
        stacked, slots = (params["layers"], attachment.trained), attachment.slots
        if slots is None:
            body = lambda x, one: (call(x, one), None)
            body = jax.checkpoint(body, prevent_cse=False) if checkpoint else body
            x, _ = jax.lax.scan(body, x, stacked, unroll=passes)
        else:
            x = run_slots(
                call_row, x, stacked, slots.rows, (), slots.active,
                rows_of=lambda one: slots.rows_of(*one), recompute=slots.recompute,
                own=lambda context, one: context,
            )  # fmt: skip
        logits = (_norm(x) @ params["embedding"].T).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], ids[:, 1:]
        )
        return losses.sum(), losses.size

    return Stack(params, loss, ids, r"layers/.*kernel")


def _norm(x: jax.Array) -> jax.Array:
    """Divides by the root mean square, in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return (wide * scale).astype(x.dtype)

"""Forgetting: how far a model is from its base, on text it was not trained on."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.switch import AdapterSwitch
from sparse_jax.data.batches import Batches, eval_batches
from sparse_jax.data.conversations import PROMPTS
from sparse_jax.data.examples import Examples
from sparse_jax.data.instructions import load_whole
from sparse_jax.data.read_rows import read_text
from sparse_jax.data.tokenizer import encode, load_tokenizer
from sparse_jax.errors import InputError
from sparse_jax.methods.method import Method
from sparse_jax.models.attachment import Attachment, LayerValues
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.modules import Inputs
from sparse_jax.sharding.placement import Placement
from sparse_jax.training.feed import MAX_LENGTH, causal_feed
from sparse_jax.training.objective import Metrics, model_inputs, perplexity
from sparse_jax.training.settings import Settings
from sparse_jax.training.setup import Base

__all__ = ["Comparison", "distance_of", "make_comparison", "text_batches"]

_log = logging.getLogger(__name__)

# Logits of the base held at a time, in entries: 128 MiB of float32.
_MOST_LOGITS = 2**25

# Puts the parameters of one of the two in place, and returns them.
Turn = Callable[[], Params]
# (base, tuned, arrays of the attachment) -> metrics
Comparison = Callable[[Turn, Turn, LayerValues], Metrics]
Sums = dict[str, jax.Array]


class _Measure(NamedTuple):
    """What is compared of two models."""

    outputs: Callable[[Model, Params, Inputs, Attachment], jax.Array]
    sums: Callable[[jax.Array, jax.Array, Inputs], Sums]  # base, tuned -> of a batch
    metrics: Callable[[dict[str, float]], Metrics]  # of the sums over all batches


def text_batches(path: str | Path, base: Base, settings: Settings) -> Batches:
    """Returns the batches of a text that two models are compared on.

    For a decoder the file is any that a run takes as its data, all tokens of it in
    windows of the run's `max_length`; for an encoder every line is an example.

    Raises:
      InputError: if the file cannot be read, or has no text.
    """
    tokenizer, config = load_tokenizer(base.folder), base.model.config
    if base.model.head is CausalLM:
        whole = {"loss_on": "all", "packing": False, "accumulate": 1}
        template = PROMPTS[settings.resolved_template]
        conversations = load_whole(path, tokenizer, template=template)
        settings = replace(settings, **whole)
        feed = causal_feed(conversations, tokenizer, base.model, settings)
        size = _MOST_LOGITS // (feed.max_length * config.vocab_size)
        size = min(max(size, 1), settings.batch_size)
        return eval_batches(feed.examples["validation"], size)
    lines = [line for line in read_text(Path(path)).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"`{path}` must have text, got an empty file.")
    length = settings.max_length or min(MAX_LENGTH, config.max_positions)
    examples = Examples(lines, None, np.zeros(len(lines), np.int32))
    bounds = {"max_length": length, "positions": config.max_positions}
    encoded = encode(examples, tokenizer, **bounds)
    return eval_batches(encoded, settings.batch_size)


def make_comparison(
    model: Model, attachment: Attachment, batches: Batches, placement: Placement
) -> Comparison:
    """Returns the comparison of what was trained with its base, on some batches.

    Of a decoder the metrics are, in nats per token and as means over all tokens,

        kl = sum_v p_base(v) (log p_base(v) - log p_tuned(v))

    and `loss` and `perplexity`, also those of the base. Of an encoder it is `drift`,
    the distance of the last hidden states in relation to their size,

        drift = sqrt(sum |h_tuned - h_base|^2 / sum |h_base|^2)

    The two take turns in one place, batch by batch, so that there is one copy of what
    neither changes.

    Args:
      model: of both.
      attachment: of what was trained; the base has none.
      batches: as `text_batches` returns them.
      placement: of the parameters.
    """
    measure = _DECODER if model.head is CausalLM else _ENCODER

    @placement.compiled
    def of_base(params: Params, inputs: Inputs) -> jax.Array:
        return measure.outputs(model, params, inputs, Attachment())

    @placement.compiled
    def sums(
        params: Params, trained: LayerValues, batch: Inputs, base: jax.Array
    ) -> Sums:
        attached = attachment._replace(trained=trained)
        tuned = measure.outputs(model, params, model_inputs(batch), attached)
        return measure.sums(base, tuned, batch)

    def compare(base: Turn, tuned: Turn, trained: LayerValues) -> Metrics:
        totals: dict[str, float] = {}
        for batch in batches:
            placed = placement.put(batch)
            outputs = of_base(base(), model_inputs(placed))
            for name, value in sums(tuned(), trained, placed, outputs).items():
                # Python adds in float64.
                totals[name] = totals.get(name, 0.0) + float(value)
        return measure.metrics(totals)

    return compare


def distance_of(
    adapter: Adapter, base: Base, text: str | Path, settings: Settings
) -> Metrics:
    """Returns the metrics of `make_comparison` for an adapter on its base.

    Args:
      adapter: that fits the base.
      base: its parameters are used up.
      text: file of what neither was trained on.
      settings: of the evaluation.

    Raises:
      InputError: as `text_batches`.
    """
    batches = text_batches(text, base, settings)
    entries = replace(adapter, added={}, method=Method(), word="")
    switch = AdapterSwitch(base.params, {"tuned": entries})
    added = jax.tree.map(jnp.asarray, adapter.added)
    attachment = Attachment(LayerValues(added), response=adapter.method.respond)
    compare = make_comparison(base.model, attachment, batches, base.placement)
    _log.warning("comparing with the base on `%s`", text)
    return compare(switch.to, lambda: switch.to("tuned"), attachment.trained)


def _logits(
    model: Model, params: Params, inputs: Inputs, attachment: Attachment
) -> jax.Array:
    """Returns the logits of a decoder, `[B, T, V]`."""
    return model(params, inputs, attachment=attachment)


def _hidden(
    model: Model, params: Params, inputs: Inputs, attachment: Attachment
) -> jax.Array:
    """Returns the last hidden states of an encoder, `[B, T, D]`."""
    return model.bind(params).encode(inputs, attachment=attachment)


def _token_sums(base: jax.Array, tuned: jax.Array, batch: Inputs) -> Sums:
    """Returns KL, losses and number of the tokens that are predicted."""
    ids, weights = batch["input_ids"][:, 1:, None], batch["weights"][:, 1:]
    old, new = (jax.nn.log_softmax(one[:, :-1]) for one in (base, tuned))
    loss = lambda log: -jnp.take_along_axis(log, ids, axis=-1)[..., 0]
    found = {
        "kl": jnp.sum(jnp.exp(old) * (old - new), axis=-1),
        "loss": loss(new),
        "base_loss": loss(old),
        "tokens": jnp.ones_like(weights),
    }
    return {name: jnp.sum(weights * one) for name, one in found.items()}


def _token_metrics(sums: dict[str, float]) -> Metrics:
    """Returns means over tokens."""
    tokens = sums["tokens"]
    means = {name: sums[name] / tokens for name in ("kl", "loss", "base_loss")}
    return {
        # Of equal models it is zero but for rounding.
        "kl": means["kl"] if math.isnan(means["kl"]) else max(means["kl"], 0.0),
        "loss": means["loss"],
        "perplexity": perplexity(means["loss"]),
        "base_loss": means["base_loss"],
        "base_perplexity": perplexity(means["base_loss"]),
        "tokens": tokens,
    }


def _state_sums(base: jax.Array, tuned: jax.Array, batch: Inputs) -> Sums:
    """Returns squares of hidden states and of their changes."""
    old, new = (one.astype(jnp.float32) for one in (base, tuned))
    weights = batch["attention_mask"] * batch["weights"][:, None]
    square = lambda x: jnp.sum(weights * jnp.sum(jnp.square(x), axis=-1))
    tokens = jnp.sum(weights)
    return {"change": square(new - old), "size": square(old), "tokens": tokens}


def _state_metrics(sums: dict[str, float]) -> Metrics:
    """Returns the relative distance of hidden states."""
    drift = math.sqrt(sums["change"] / sums["size"])
    return {"drift": drift, "tokens": sums["tokens"]}


_DECODER = _Measure(_logits, _token_sums, _token_metrics)
_ENCODER = _Measure(_hidden, _state_sums, _state_metrics)

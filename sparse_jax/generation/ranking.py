"""Answers by likelihood: which of some responses a model would rather write."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.data.batches import TokenSequences
from sparse_jax.data.causal_tokens import tokenize
from sparse_jax.data.conversations import ALPACA, Conversation, PromptTemplate
from sparse_jax.data.llm_adapters import Question
from sparse_jax.data.tokenizer import Tokenizer
from sparse_jax.errors import InputError
from sparse_jax.generation.cpu import compiled
from sparse_jax.generation.prefix_trees import tree_batches
from sparse_jax.models.attachment import Attachment, LayerValues
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.modules import Inputs

__all__ = ["Scored", "rank_candidates", "score_responses", "score_sequences"]

_log = logging.getLogger(__name__)

# Logits held at a time, in entries: 64 MiB of float32.
_MOST_LOGITS = 2**24
_NO_LIMIT = 2**30  # of the tokens of a sequence, where all are to be counted


class Scored(NamedTuple):
    """What a model makes of the targets of N sequences."""

    log_likelihood: np.ndarray  # shape=(N,), float64: of all targets, in nats
    is_greedy: np.ndarray  # shape=(N,), bool: whether each is the likeliest token


def rank_candidates(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    template: PromptTemplate = ALPACA,
    per_token: bool = False,
    attachment: Attachment = Attachment(),  # noqa: B008 - a tuple
    batch_size: int = 16,
) -> list[str]:
    """Returns the likeliest of the responses to every question.

        argmax over r of log p(r, end | prompt)

    Every candidate is stated as the training data state answers, see `Question`. A
    question that is too long for the model gets no response, and a warning counts them.

    Args:
      model: a model with the head `CausalLM`.
      params: its parameters.
      tokenizer: of the model.
      questions: each with candidates.
      template: the prompt around a question.
      per_token: whether the logarithm is divided by the tokens of the response, for
        candidates of unequal length.
      attachment: what a method adds to the layers.
      batch_size: rows of 256 tokens at a time.

    Returns:
      The responses, in which `accuracy` finds the answers, "" if there is none.

    Raises:
      InputError: if a question has no candidates.
    """
    responses = [question.responses(template) for question in questions]
    for number, candidates in enumerate(responses):
        if not candidates:
            raise InputError(
                f"`questions` must have candidates, got none for question {number}, "
                "whose answer is a number. Let the model write it."
            )
    scores = score_responses(
        model,
        params,
        tokenizer,
        responses,
        per_token=per_token,
        attachment=attachment,
        batch_size=batch_size,
    )
    return [
        one[int(np.argmax(found))].pieces[-1].text if len(found) else ""
        for one, found in zip(responses, scores, strict=True)
    ]


def score_responses(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    responses: Sequence[Sequence[Conversation]],
    *,
    per_token: bool = False,
    attachment: Attachment = Attachment(),  # noqa: B008 - a tuple
    batch_size: int = 16,
) -> list[np.ndarray]:
    """Returns the log-likelihoods of the responses to every question, in nats.

    Args:
      model: a model with the head `CausalLM`.
      params: its parameters.
      tokenizer: of the model.
      responses: for each question, its prompt with one response and another.
      per_token: as in `rank_candidates`.
      attachment: what a method adds to the layers.
      batch_size: rows of 256 tokens at a time.

    Returns:
      A float64 array for each question, as long as its responses; without entries if
      the question is too long for the model, and a warning counts those.
    """
    sequences = tokenize(
        [one for candidates in responses for one in candidates],
        tokenizer,
        max_length=_NO_LIMIT,
        positions=_NO_LIMIT,
    )
    owners = np.repeat(np.arange(len(responses)), [len(one) for one in responses])
    # The last token is predicted, and not read.
    read = np.array([len(ids) - 1 for ids in sequences.input_ids])
    too_long = {*owners[read > model.config.max_positions].tolist()}
    if too_long:
        _log.warning(
            "%d of %d questions are longer than the %d positions of the model and "
            "count as wrong", len(too_long), len(responses), model.config.max_positions
        )  # fmt: skip
    kept = np.flatnonzero(~np.isin(owners, [*too_long]))
    fitting = replace(
        sequences,
        input_ids=[sequences.input_ids[i] for i in kept],
        is_target=[sequences.is_target[i] for i in kept],
    )
    scores = score_sequences(
        model, params, fitting, attachment=attachment, batch_size=batch_size
    ).log_likelihood
    if per_token:
        scores /= [marks.sum() for marks in fitting.is_target]
    return [scores[owners[kept] == owner] for owner in range(len(responses))]


def score_sequences(
    model: Model,
    params: Params,
    sequences: TokenSequences,
    *,
    attachment: Attachment = Attachment(),  # noqa: B008 - a tuple
    batch_size: int = 16,
) -> Scored:
    """Returns the log-probability of the targets of every sequence.

    What sequences have in common is read once, and logits are computed of targets only.

    Args:
      model: a model with the head `CausalLM`.
      params: its parameters.
      sequences: tokens, with marks on those that are predicted.
      attachment: what a method adds to the layers.
      batch_size: rows of 256 tokens at a time.
    """
    total = np.zeros(len(sequences))
    is_greedy = np.ones(len(sequences), bool)
    vocab_size = model.config.vocab_size
    most = 1 << max(0, (_MOST_LOGITS // vocab_size).bit_length() - 1)
    attached = attachment._replace(trained=None)
    for batch in tree_batches(sequences, batch_size):
        hidden = _hidden(
            params, attachment.trained, batch.inputs, model=model, attached=attached
        )
        # A target that several sequences share is scored once.
        pairs, which = np.unique(
            batch.places * vocab_size + batch.tokens, return_inverse=True
        )
        size = min(most, 1 << (len(pairs) - 1).bit_length())
        padded = np.pad(pairs, (0, -len(pairs) % size)).reshape(-1, size)
        found = [
            _score(params, hidden, part // vocab_size, part % vocab_size, model=model)
            for part in padded
        ]
        logs, is_best = (np.concatenate(x)[which] for x in zip(*found, strict=True))
        np.add.at(total, batch.numbers, logs)
        np.logical_and.at(is_greedy, batch.numbers, is_best)
    return Scored(total, is_greedy)


def _read(
    params: Params,
    trained: LayerValues | None,
    inputs: Inputs,
    *,
    model: Model,
    attached: Attachment,
) -> jax.Array:
    """Returns the hidden states of all tokens, `[B * T, D]`."""
    attachment = attached._replace(trained=trained)
    # A loop compiles in a third of the time of all layers, and is no slower here.
    hidden = model.hidden(params, inputs, attachment=attachment, unroll=1)
    return hidden.reshape(-1, hidden.shape[-1])


_hidden = compiled(_read, ("model", "attached"))


@functools.partial(jax.jit, static_argnames="model")
def _score(
    params: Params,
    hidden: jax.Array,
    places: jax.Array,
    tokens: jax.Array,
    *,
    model: Model,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities of tokens after some places; which are the likeliest.

    Both have the shape `[M]` of the places and of the tokens.
    """
    logits = model.logits(params, hidden[places])
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    logs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return logs, chosen >= jnp.max(logits, axis=-1)

"""Answers by likelihood: which of some responses a model would rather write."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.data.batches import TokenSequences, eval_batches
from sparse_jax.data.causal_tokens import tokenize
from sparse_jax.data.conversations import ALPACA, PromptTemplate
from sparse_jax.data.llm_adapters import Question
from sparse_jax.data.tokenizer import Tokenizer
from sparse_jax.errors import InputError
from sparse_jax.models.attachment import Attachment, LayerValues
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.modules import Inputs
from sparse_jax.models.next_token import summed_token_loss

__all__ = ["log_likelihoods", "rank_candidates"]

_INPUTS = ("input_ids", "attention_mask")


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

    Every candidate is stated as the training data state answers, see `Question`.

    Args:
      model: a model with the head `CausalLM`.
      params: its parameters.
      tokenizer: of the model.
      questions: each with candidates.
      template: the prompt around a question.
      per_token: whether the logarithm is divided by the tokens of the response, for
        candidates of unequal length.
      attachment: what a method adds to the layers.
      batch_size: responses at a time.

    Returns:
      The responses, in which `accuracy` finds the answers.

    Raises:
      InputError: if a question has no candidates, or is too long for the model.
    """
    positions = model.config.max_positions
    responses = [question.responses(template) for question in questions]
    for number, candidates in enumerate(responses):
        if not candidates:
            raise InputError(
                f"`questions` must have candidates, got none for question {number}, "
                "whose answer is a number. Let the model write it."
            )
        longest = max(len(tokenizer(one.text)["input_ids"]) + 1 for one in candidates)
        if longest > positions:
            raise InputError(
                f"`questions` must have at most {positions} tokens, the positions of "
                f"the model, with their responses, got {longest} for question "
                f"{number}. Leave it out."
            )
    sequences = tokenize(
        [one for candidates in responses for one in candidates],
        tokenizer,
        max_length=positions,
        positions=positions,
    )
    scores = log_likelihoods(
        model, params, sequences, attachment=attachment, batch_size=batch_size
    )
    if per_token:
        scores = scores / [marks.sum() for marks in sequences.is_target]
    ends = np.cumsum([len(candidates) for candidates in responses])
    best = [int(np.argmax(part)) for part in np.split(scores, ends[:-1])]
    return [one[i].pieces[-1].text for one, i in zip(responses, best, strict=True)]


def log_likelihoods(
    model: Model,
    params: Params,
    sequences: TokenSequences,
    *,
    attachment: Attachment = Attachment(),  # noqa: B008 - a tuple
    batch_size: int = 16,
) -> np.ndarray:
    """Returns the log-probability of the targets of every sequence.

    Args:
      model: a model with the head `CausalLM`.
      params: its parameters.
      sequences: tokens, with marks on those that are predicted.
      attachment: what a method adds to the layers.
      batch_size: sequences at a time.

    Returns:
      float64 `[N]`, in nats.
    """
    found = []
    for batch in eval_batches(sequences, batch_size):
        losses = _row_losses(
            params,
            attachment.trained,
            batch,
            model=model,
            attached=attachment._replace(trained=None),
        )
        found.append(np.asarray(losses, np.float64))
    return -np.concatenate(found)[: len(sequences)]


@functools.partial(jax.jit, static_argnames=("model", "attached"))
def _row_losses(
    params: Params,
    trained: LayerValues | None,
    batch: Inputs,
    *,
    model: Model,
    attached: Attachment,
) -> jax.Array:
    """Returns the summed losses of every row, float32 `[B]`."""
    inputs = {name: batch[name] for name in _INPUTS}
    hidden = model.hidden(params, inputs, attachment=attached._replace(trained=trained))

    def one(hidden: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        rows = (jnp.expand_dims(array, 0) for array in (hidden, ids, weights))
        return summed_token_loss(model, params, *rows)

    return jax.lax.map(
        lambda row: one(*row), (hidden, batch["input_ids"], batch["weights"])
    )

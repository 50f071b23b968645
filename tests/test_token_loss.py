"""The loss of a causal language model: of every target, however it is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_text import CONFIG, tiny_decoder

from sparse_jax.data.batches import TokenSequences, eval_batches
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.next_token import summed_token_loss
from sparse_jax.training.objective import make_token_loss

VOCAB = CONFIG.vocab_size


def naive(logits, ids, weights):
    """The sum, one target at a time."""
    total = 0.0
    for row, column in zip(*np.nonzero(weights), strict=True):
        scores = np.asarray(logits[row, column - 1], np.float64)
        total += np.log(np.sum(np.exp(scores))) - scores[ids[row, column]]
    return total


def random_batch():
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCAB, (3, 11)).astype(np.int32)
    weights = (random.random((3, 11)) < 0.5).astype(np.float32)
    weights[:, 0] = 0
    return ids, weights


# 3 rows and 10 words: 330 logits in all; 11 columns, 1, 4 and 6 at a time.
@pytest.mark.parametrize("most_logits", [2**24, 330, 329, 180, 125, 30, 1])
def test_parts_of_the_logits_have_the_loss_and_gradient_of_all(most_logits):
    model, params = tiny_decoder()
    ids, weights = random_batch()
    hidden = jax.random.normal(jax.random.key(0), (3, 11, CONFIG.hidden_size))

    def loss(hidden, most):
        return summed_token_loss(model, params, hidden, ids, weights, most_logits=most)

    expected = naive(model.logits(params, hidden), ids, weights)
    value, grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)(
        hidden, most_logits
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    whole = jax.grad(loss)(hidden, 2**24)
    np.testing.assert_allclose(grad, whole, atol=1e-6)


def test_the_loss_is_that_of_transformers(tmp_path):
    import torch
    from tiny_text import write_decoder
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(write_decoder(tmp_path)).eval()
    ids, weights = random_batch()
    model, params = tiny_decoder()
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "weights": weights}
    total, count = make_token_loss(model)(params, batch, None, Attachment())
    labels = np.where(weights == 1, ids, -100)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(ids, dtype=torch.long),
            labels=torch.tensor(labels, dtype=torch.long),
        ).loss.item()
    assert count == weights.sum()
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)


def test_packed_rows_have_the_loss_of_their_texts():
    random = np.random.default_rng(1)
    ids = [random.integers(0, VOCAB, n).astype(np.int32) for n in (5, 9, 3, 12, 4, 7)]
    marks = [np.arange(len(row)) > 1 for row in ids]
    model, params = tiny_decoder()
    loss = jax.jit(
        lambda params, batch: make_token_loss(model)(params, batch, None, Attachment())
    )
    sums = []
    for is_packed in (False, True):
        sequences = TokenSequences(ids, marks, 16, 0, is_packed=is_packed)
        batches = eval_batches(sequences, 2)
        parts = [loss(params, batch) for batch in batches]
        sums.append([sum(float(part[i]) for part in parts) for i in range(2)])
    single, packed = sums
    assert single[1] == packed[1] == sum(len(row) - 2 for row in ids)
    np.testing.assert_allclose(single[0], packed[0], rtol=1e-5)


def test_all_logits_are_never_there_at_once():
    model, params = tiny_decoder()
    ids, weights = random_batch()
    hidden = jnp.zeros((3, 11, CONFIG.hidden_size))

    def biggest(most_logits):
        grad = jax.grad(
            lambda hidden: summed_token_loss(
                model, params, hidden, ids, weights, most_logits=most_logits
            )
        )
        text = jax.jit(grad).lower(hidden).as_text()
        return f"tensor<3x11x{VOCAB}xf32>" in text, f"tensor<3x4x{VOCAB}xf32>" in text

    assert biggest(2**24) == (True, False)
    assert biggest(125) == (False, True)

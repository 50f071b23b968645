"""Every number that a batch looks up in a table has a row there."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import jax_batch
from tiny_run import CONFIG, write_model
from tiny_text import tiny_decoder, write_chats, write_decoder

from sparse_jax import Settings
from sparse_jax.data.examples import Examples, Splits
from sparse_jax.data.glue import TASKS
from sparse_jax.data.instructions import load_conversations
from sparse_jax.data.tokenizer import load_tokenizer
from sparse_jax.errors import InputError
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.params.names import map_named
from sparse_jax.training.feed import causal_feed, labeled_feed

RUN = {"model": "m", "output": "o", "max_length": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


def pairs():
    """Returns two pairs of texts, one longer than the other."""
    examples = Examples(
        ["good film", "a bad book a bad book"],
        ["the film", "the book"],
        np.array([1, 0], np.int32),
    )
    return Splits(TASKS["mrpc"], {"train": examples})


def feed_of(tokenizer, **changes):
    """Returns the feed of the pairs for a tiny encoder, and that."""
    model = Model(SequenceClassifier, BERT, replace(CONFIG, **changes))
    settings = Settings(**RUN, task="mrpc", batch_size=2)
    return labeled_feed(pairs(), tokenizer, model, settings), model


def test_a_run_trains_on_examples_spread_over_the_data(tokenizer, folder):
    texts = [f"film {'good ' * i}" for i in range(10)]
    examples = Examples(texts, None, np.zeros(10, np.int32))
    splits = Splits(TASKS["sst2"], {"train": examples, "validation": examples})
    settings = Settings(**RUN, task="sst2", max_train_samples=4, max_eval_samples=2)
    model = Model(SequenceClassifier, BERT, CONFIG)
    feed = labeled_feed(splits, tokenizer, model, settings)
    lengths = [len(ids) for ids in feed.examples["train"].input_ids]
    assert np.diff(lengths).tolist() == [2, 3, 2]
    assert feed.sizes == {"train": 4, "validation": 2}


def drawn(model):
    """Returns random parameters."""
    random = np.random.default_rng(0)
    draw = lambda name, leaf: random.normal(size=leaf.shape).astype(leaf.dtype)
    return map_named(draw, model.abstract())


def test_a_token_type_without_an_embedding_is_refused(tokenizer):
    feed, model = feed_of(tokenizer)
    (batch,) = feed.train(0)
    assert batch["token_type_ids"].max() == 1
    assert np.isfinite(model(drawn(model), jax_batch(batch))).all()
    with pytest.raises(InputError, match="every token type .* 1 and the token type 1"):
        feed_of(tokenizer, type_vocab_size=1)


def test_a_token_without_an_embedding_is_refused(tokenizer):
    with pytest.raises(InputError, match="every token of .* got 8 and the token 14"):
        feed_of(tokenizer, vocab_size=8)


def test_padding_that_has_no_embedding_leaves_the_logits_as_they_are(tokenizer):
    feed, model = feed_of(tokenizer)
    params = drawn(model)
    (expected,) = (model(params, jax_batch(batch)) for batch in feed.train(0))
    added = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert tokenizer.pad_token_id == added >= model.config.vocab_size
    feed, _ = feed_of(tokenizer)
    (found,) = (model(params, jax_batch(batch)) for batch in feed.train(0))
    np.testing.assert_array_equal(found, expected)


def test_padding_of_texts_has_an_embedding(tmp_path):
    tokenizer = load_tokenizer(write_decoder(tmp_path / "model"))
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    model, _ = tiny_decoder()
    assert tokenizer.pad_token_id >= model.config.vocab_size
    data = write_chats(tmp_path / "chats.jsonl")
    chats = load_conversations(data, tokenizer, held_out=0.2)
    settings = Settings(**RUN, task="causal", batch_size=4)
    feed = causal_feed(chats, tokenizer, model, settings)
    for batch in feed.train(0):
        assert batch["input_ids"].max() < model.config.vocab_size

"""Weights of examples in the loss, from a column of the data."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_text import text_settings
from tiny_tokenizers import characters

from sparse_jax import InputError
from sparse_jax.data.batches import TokenSequences, train_batches
from sparse_jax.data.causal_tokens import tokenize
from sparse_jax.data.conversations import plain_text
from sparse_jax.data.files import load, load_one
from sparse_jax.data.glue import TASKS
from sparse_jax.data.instructions import load_conversations, load_whole
from sparse_jax.models.attachment import Attachment
from sparse_jax.training.feed import tokenize_splits
from sparse_jax.training.objective import make_loss

COLUMNS = {"weight": "trust"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def listed(examples):
    """Returns the weights of examples."""
    assert examples.weights.dtype == np.float32
    return examples.weights.tolist()


def labeled(count=20):
    return [{"text": f"t{i}", "label": i % 2, "trust": i + 1} for i in range(count)]


def test_a_column_weighs_the_training_examples_and_no_others(tmp_path):
    data = write(tmp_path / "a.jsonl", labeled())
    splits = load(TASKS["classification"], data, columns=COLUMNS, held_out=0.25)
    numbers = [float(text[1:]) + 1 for text in splits.train.text_a]
    assert listed(splits.train) == numbers
    assert splits["validation"].weights is None
    assert listed(splits.train.take([3, 0])) == [numbers[3], numbers[0]]


def test_data_to_evaluate_on_need_no_weights(tmp_path):
    write(tmp_path / "train.jsonl", labeled())
    others = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    write(tmp_path / "dev.jsonl", others)
    task = TASKS["classification"]
    splits = load(task, str(tmp_path), columns=COLUMNS)
    assert splits["validation"].text_a == ["a", "b"]
    one = load_one(task, write(tmp_path / "new.jsonl", others), "01", columns=COLUMNS)
    assert one.examples.text_a == ["a", "b"]


def test_a_column_of_that_name_counts_only_where_it_is_named(tmp_path):
    rows = [{**row, "weight": row.pop("trust")} for row in labeled()]
    data, task = write(tmp_path / "a.jsonl", rows), TASKS["classification"]
    assert load(task, data, held_out=0.5).train.weights is None
    named = load(task, data, held_out=0.5, columns={"weight": "weight"})
    assert named.train.weights is not None


def test_values_are_weighted_and_tables_have_words(tmp_path):
    lines = [f"t{i}\t{i / 4}\t0.5\n" for i in range(8)]
    (tmp_path / "a.tsv").write_text("text\tlabel\ttrust\n" + "".join(lines))
    splits = load(TASKS["regression"], str(tmp_path / "a.tsv"), columns=COLUMNS,
                  held_out=0.5)  # fmt: skip
    assert listed(splits.train) == [0.5] * 4


@pytest.mark.parametrize("value", [0, -1, "much", None, True, float("nan"), 1e400])
def test_other_weights_are_refused_with_the_line(tmp_path, value):
    rows = labeled()
    rows[4]["trust"] = value
    data = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=r"a\.jsonl` line 5 must have a positive numb"):
        load(TASKS["classification"], data, columns=COLUMNS, held_out=0.5)


def test_an_absent_column_is_named(tmp_path):
    data = write(tmp_path / "a.jsonl", labeled())
    with pytest.raises(InputError, match="that are there, got 'faith' for `weight`"):
        load(TASKS["classification"], data, columns={"weight": "faith"}, held_out=0.5)


def test_the_loss_is_the_weighted_mean_of_the_examples():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]], np.float32)
    model: Any = lambda params, inputs, **_: jnp.asarray(logits)
    loss = make_loss(model)
    batch = {"labels": np.array([1, 1, 0]), "weights": np.array([3.0, 1.0, 0.0])}
    total, weight = loss({}, batch, None, Attachment())
    each = [np.log(1 + np.exp(2.0)), np.log(1 + np.exp(-1.0))]
    np.testing.assert_allclose(total / weight, (3 * each[0] + each[1]) / 4, rtol=1e-6)


def test_some_of_the_sequences_keep_their_weights():
    model: Any = SimpleNamespace(config=SimpleNamespace(max_positions=8))
    options = {"max_train_samples": 4, "max_length": 8, "loss_on": "all"}
    settings = text_settings("model", "data", "run", **options)
    parts = [replace(plain_text("abcdefgh" * (i + 1)), weight=i + 1) for i in range(4)]
    few = tokenize_splits({"train": parts}, characters(), model, settings)["train"]
    # Of the 1, 2, 3 and 4 or more sequences of the texts.
    found = listed(few)
    assert len(few) == len(found) == 4
    assert found == sorted(found) and len({*found}) > 2


def texts(count=12):
    return [{"prompt": "say red :", "completion": " red" * (1 + i % 3), "trust": i + 1}
            for i in range(count)]  # fmt: skip


def test_texts_are_weighted_token_by_token(tmp_path):
    tokenizer = characters()
    data = write(tmp_path / "a.jsonl", texts())
    how = {"columns": COLUMNS, "held_out": 0.25}
    splits = load_conversations(data, tokenizer, **how)
    sequences = tokenize(splits["train"], tokenizer, max_length=32, positions=32)
    assert listed(sequences) == [one.weight for one in splits["train"]]
    whole = load_whole(data, tokenizer, columns=COLUMNS)["validation"]
    assert {one.weight for one in whole} == {1.0}
    plain = load_conversations(data, tokenizer, held_out=0.25)["train"]
    assert tokenize(plain, tokenizer, max_length=32, positions=32).weights is None


@pytest.mark.parametrize("is_packed", [False, True])
def test_every_target_of_a_row_has_the_weight_of_its_text(is_packed):
    ids = [np.full(n, n, np.int32) for n in (2, 3, 4, 5)]
    marks = [np.arange(len(one)) > 0 for one in ids]
    weights = np.array([0.5, 2.0, 3.0, 1.0], np.float32)
    sequences = TokenSequences(ids, marks, 9, 0, is_packed=is_packed, weights=weights)
    (batch,) = train_batches(sequences, 4, seed=0, epoch=0)
    found, tokens = batch["weights"], batch["input_ids"]
    assert found.dtype == np.float32
    for one, weight in zip(ids, weights, strict=True):
        assert found[tokens == len(one)].sum() == weight * (len(one) - 1)

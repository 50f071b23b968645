import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_text import text_settings, tiny_decoder, write_decoder

from sparse_jax.data.batches import Encoded, TokenSequences
from sparse_jax.data.examples import Examples
from sparse_jax.data.tokenizer import load_tokenizer
from sparse_jax.training.causal_data import causal_data
from sparse_jax.training.token_cache import (
    Tokens,
    encoded_of,
    tokenizer_files,
    tokens_of,
)


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Returns tokens of a key, and which keys were made."""
    monkeypatch.setenv("SPARSE_JAX_CACHE", str(tmp_path / "cache"))
    keys = []

    def get(*key):
        def make():
            keys.append(key)
            ids = [np.arange(n, dtype=np.int32) for n in (3, 1, 5)]
            part = TokenSequences(ids, [i > 0 for i in ids], 8, 2, 1, 4, (7, 9))
            weights = np.array([0.5, 1, 2], np.float32)
            splits = {"train": replace(part, weights=weights), "validation": part}
            return Tokens(splits, has_chats=True)

        return tokens_of([*key], make)

    get.keys = keys
    return get


def test_tokens_are_made_once_and_come_back_as_they_were(made):
    first, second = made("a", 1), made("a", 1)
    assert made.keys == [("a", 1)]
    assert second.has_chats
    assert [*second.splits] == ["train", "validation"]
    for name, part in first.splits.items():
        other = second.splits[name]
        for field in ("input_ids", "is_target"):
            pairs = zip(getattr(part, field), getattr(other, field), strict=True)
            assert all(a.dtype == b.dtype and (a == b).all() for a, b in pairs)
        for field in (
            "max_length",
            "pad_id",
            "num_truncated",
            "num_dropped",
            "end_ids",
        ):
            assert getattr(part, field) == getattr(other, field)
    assert second.splits["train"].weights.tolist() == [0.5, 1, 2]
    assert second.splits["validation"].weights is None


@pytest.mark.parametrize("has_types", [False, True])
def test_labeled_texts_are_encoded_once_whatever_their_labels_are(
    monkeypatch, tmp_path, has_types
):
    monkeypatch.setenv("SPARSE_JAX_CACHE", str(tmp_path / "cache"))
    made = []

    def get(text_a, text_b=None, labels=(0, 1), key="key"):
        examples = Examples([*text_a], text_b and [*text_b], np.array(labels))

        def make():
            made.append(text_a)
            ids = [np.arange(len(text), dtype=np.int32) for text in text_a]
            types = [i % 2 for i in ids] if has_types else None
            return {"train": Encoded(ids, types, examples.labels, 8, 3, 1)}

        return encoded_of({"train": examples}, [key], make)["train"]

    first, second = get(["ab", "c"]), get(["ab", "c"], labels=(1, 1))
    assert len(made) == 1
    for field in ("max_length", "pad_id", "num_truncated"):
        assert getattr(first, field) == getattr(second, field)
    for field in ("input_ids", "token_type_ids") if has_types else ("input_ids",):
        pairs = zip(getattr(first, field), getattr(second, field), strict=True)
        assert all(a.dtype == b.dtype and (a == b).all() for a, b in pairs)
    assert (first.labels.tolist(), second.labels.tolist()) == ([0, 1], [1, 1])
    assert (second.token_type_ids is not None) == has_types
    get(["a", "bc"]), get(["ab", "c"], ["d", "e"]), get(["ab", "c"], key="other")
    assert len(made) == 4


def test_another_key_makes_others(made):
    made("a", 1), made("a", 2), made("a", 1)
    assert made.keys == [("a", 1), ("a", 2)]


def test_a_damaged_file_is_made_again(made, tmp_path):
    made("a")
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    for content in (b"torn", path.read_bytes()[:-3]):
        path.write_bytes(content)
        made("a")
    assert made.keys == [("a",)] * 3


def test_without_a_key_or_a_folder_nothing_is_kept(made, monkeypatch, tmp_path):
    tokens_of(None, lambda: Tokens({}, has_chats=False))
    monkeypatch.setenv("SPARSE_JAX_CACHE", "off")
    made("a"), made("a")
    assert made.keys == [("a",)] * 2
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_reported(made, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    made("a")
    assert "tokens are not kept in" in caplog.text


def test_the_same_bytes_are_other_texts_in_a_file_of_another_kind(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("SPARSE_JAX_CACHE", str(tmp_path / "cache"))
    folder, (model, _) = write_decoder(tmp_path / "model"), tiny_decoder()
    sizes = []
    for name in ("a.jsonl", "a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "red blue"}\n' * 5)
        settings = text_settings(folder, tmp_path / name, "run", max_length=8)
        feed, _ = causal_data(settings, folder, model, load_tokenizer(folder), None)
        sizes.append(feed.sizes)
    # Of the text 13 tokens are cut into sequences that share one.
    assert sizes[0] == sizes[2] == {"train": 4, "validation": 1}
    assert sizes[1] == {"train": 2, "validation": 1}
    assert len([*(tmp_path / "cache").rglob("*.safetensors")]) == 2


def test_the_files_of_a_tokenizer_are_part_of_the_key(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
    before = tokenizer_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    after = tokenizer_files(tmp_path)
    assert [name for name, _ in before] == ["tokenizer.json"]
    assert [name for name, _ in after] == ["chat_template.jinja", "tokenizer.json"]

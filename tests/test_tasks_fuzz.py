"""Files with random damage: they are read right, or refused by `InputError`."""

import json
import random

import numpy as np
import pytest

from sparse_jax.data.files import load
from sparse_jax.data.glue import TASKS
from sparse_jax.data.instructions import load_conversations
from sparse_jax.errors import InputError

_TEXTS = ("a good film", "a bad one", 'he said "no", twice', "naïve\u2028🙂")


def _delimited(labels, mark):
    quote = '"{}"'.format if mark == "," else str
    texts = [quote(text.replace('"', '""' if mark == "," else '"')) for text in _TEXTS]
    rows = zip(texts, labels, strict=True)
    return "".join(f"{a}{mark}{b}\n" for a, b in [("text", "label"), *rows])


def _objects(labels, key="label", text="text"):
    rows = zip(_TEXTS, labels, strict=True)
    return [{text: one, key: label} for one, label in rows]


def _lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


_WORDS, _VALUES = ("x", "y", "x", "y"), (1, 2.5, -3, 0)
_SETS = (["x", "y"], [], ["y"], ["x"])
SEEDS = {
    "csv": ("csv", _delimited(_WORDS, ",")),
    "tsv": ("tsv", _delimited(_WORDS, "\t")),
    "csv of numbers": ("csv", _delimited(_VALUES, ",")),
    "json": ("json", json.dumps(_objects(_WORDS))),
    "jsonl": ("jsonl", _lines(_objects(_WORDS))),
    "jsonl of numbers": ("jsonl", _lines(_objects(_VALUES))),
    "json of sets": ("json", json.dumps(_objects(_SETS))),
    "jsonl of sets": ("jsonl", _lines(_objects(_SETS))),
}
RECORDS = {
    "completions": ("jsonl", _lines(_objects(_WORDS, "completion", "prompt"))),
    "instructions": ("json", json.dumps(_objects(_WORDS, "output", "instruction"))),
    "texts": ("jsonl", _lines(_objects(_WORDS))),
    "text": ("txt", "\n".join(_TEXTS)),
}
_PIECES = (
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\t", b"\r", b"\n", b"\0",
    b"\xff", b"\xef\xbb\xbf", b"\x1b[2J", b"null", b"true", b"NaN", b"Infinity",
    b"1e999", b"-1", b"1.0", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"\\ud83d",
    b'"text": 1,', b'""', b'"label": null,', b"label", b"text_b", b"\xe2\x80\xae",
    b"-", b"nan",
)  # fmt: skip


def damaged(content, seed):
    """Returns bytes with one to four random changes."""
    chance, found = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(found) + 1)
        end = min(start + chance.choice((0, 1, 4, 30)), len(found))
        kind = chance.randrange(5)
        if kind == 0:
            del found[start:end]
        elif kind == 1:
            found[start:start] = chance.choice(_PIECES)
        elif kind == 2:
            found[start:end] = chance.choice(_PIECES)
        elif kind == 3:
            found[start:start] = found[start:end] * chance.choice((1, 2, 500))
        else:
            found[start:end] = bytes(chance.randrange(256) for _ in range(end - start))
    return bytes(found)


def check_labeled(kind, seed, folder):
    """Raises unless a damaged file gives whole examples, or is refused."""
    suffix, content = SEEDS[kind]
    (folder / f"dev.{suffix}").write_bytes(content.encode())
    (folder / f"train.{suffix}").write_bytes(damaged(content.encode(), seed))
    try:
        splits = load(TASKS["classification"], folder, drop_unlabeled=bool(seed % 2))
    except InputError as error:
        assert len(str(error)) < 1000
        assert str(error).isprintable()
        return False
    task, train = splits.task, splits.train
    assert all(isinstance(text, str) for text in train.text_a)
    assert all(line.isprintable() for line in (*splits.notes, *splits.warnings))
    assert np.isfinite(train.labels).all()
    if task.is_multilabel:
        assert train.labels.shape == (len(train), task.num_outputs)
        assert set(np.unique(train.labels)) <= {0, 1}
    elif not task.is_regression:
        assert train.labels.dtype == np.int32
        assert 0 <= train.labels.min() <= train.labels.max() < task.num_outputs
    return True


def check_records(kind, seed, folder):
    """Raises unless a damaged file gives texts, or is refused."""
    suffix, content = RECORDS[kind]
    path = folder / f"records.{suffix}"
    path.write_bytes(damaged(content.encode(), seed))
    try:
        splits = load_conversations(path, tokenizer=None)
    except InputError as error:
        assert len(str(error)) < 1000
        assert str(error).isprintable()
        return False
    for conversation in (one for split in splits.values() for one in split):
        conversation.text.encode()
    return True


@pytest.mark.parametrize("kind", SEEDS)
def test_a_damaged_file_is_read_right_or_refused(kind, tmp_path):
    read = [check_labeled(kind, seed, tmp_path) for seed in range(60)]
    # Both happen, or nothing was tried.
    assert 3 < sum(read) < 57


@pytest.mark.parametrize("kind", RECORDS)
def test_damaged_records_are_read_right_or_refused(kind, tmp_path):
    read = [check_records(kind, seed, tmp_path) for seed in range(60)]
    assert 3 < sum(read) < 60

import json
from collections import Counter
from pathlib import Path

import pytest

ASSETS = Path(__file__).parents[1] / "experiments" / "assets"
TASK = ASSETS / "quickstart"
TOKENIZER = ASSETS / "quickstart_bert"


def rows_of(split):
    lines = (TASK / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)


def test_the_assets_take_at_most_six_megabytes():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) <= 6e6


def test_the_license_of_the_text_lies_beside_it():
    assert "PYTHON SOFTWARE FOUNDATION" in (ASSETS / "PSF-LICENSE").read_text()


@pytest.mark.parametrize(
    ("split", "fewest", "most"), [("train", 3000, 6000), ("validation", 800, 1500)]
)
def test_a_split_is_balanced_over_the_labels(split, fewest, most):
    rows = rows_of(split)
    counts = Counter(row["label"] for row in rows)
    assert fewest <= len(rows) <= most
    assert len(counts) == 8
    assert max(counts.values()) <= 1.2 * min(counts.values())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_row_has_a_text_and_a_label(split):
    assert all(row.keys() == {"text", "label"} for row in rows_of(split))
    assert all(len(row["text"].split()) >= 8 for row in rows_of(split))


def test_both_splits_have_the_same_labels():
    labels = [{row["label"] for row in rows_of(s)} for s in ("train", "validation")]
    assert labels[0] == labels[1]


def test_no_text_is_in_both_splits():
    train, validation = (
        {" ".join(row["text"].lower().split()) for row in rows_of(split)}
        for split in ("train", "validation")
    )
    assert not train & validation
    assert len(train) == len(rows_of("train"))
    assert len(validation) == len(rows_of("validation"))


def test_no_long_run_of_words_of_a_validation_row_is_a_training_row():
    runs = lambda text: set(zip(*(text.split()[i:] for i in range(12)), strict=False))
    seen = set().union(*(runs(row["text"].lower()) for row in rows_of("train")))
    shared = [r for r in rows_of("validation") if runs(r["text"].lower()) & seen]
    assert len(shared) <= 0.01 * len(rows_of("validation"))


@pytest.mark.parametrize("name", ["asyncio", "json", "tkinter", "unittest", "tarfile"])
def test_no_text_has_the_name_of_a_module(name):
    rows = [*rows_of("train"), *rows_of("validation")]
    assert not any(name in row["text"].lower().split() for row in rows)


def test_the_tokenizer_reads_as_bert_does(tokenizer):
    encoded = tokenizer("Return the [MASK] of a file.", "True or False?")
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens[:4] == ["[CLS]", "return", "the", "[MASK]"]
    assert tokens.count("[SEP]") == 2
    assert set(encoded["token_type_ids"]) == {0, 1}
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]"]) == [0, 1]
    assert len(tokenizer) == 4096


def test_the_tokenizer_gives_the_words_back(tokenizer):
    text = "return the number of bytes in the internal buffer"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_row_fits_in_128_tokens_and_nearly_all_in_64(tokenizer):
    texts = [row["text"] for row in (*rows_of("train"), *rows_of("validation"))]
    sizes = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert max(sizes) <= 128
    assert sum(size > 64 for size in sizes) <= 0.01 * len(sizes)

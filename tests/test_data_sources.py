import json
import re

import datasets
import pytest

from sparse_jax.data.files import load
from sparse_jax.data.glue import TASKS
from sparse_jax.data.instructions import load_conversations
from sparse_jax.data.sources import as_source, one_part
from sparse_jax.errors import InputError

OWN = TASKS["classification"]
ROWS = [
    {"text": f"t{i}", "label": "rare" if i % 10 == 0 else "often"} for i in range(80)
]


def write(path, rows):
    """Writes rows as the extension says."""
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        table.to_csv(path, sep="," if path.suffix == ".csv" else "\t")
    else:
        table.to_json(path, lines=path.suffix == ".jsonl")
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_a_single_file_is_split_alike_in_every_class(tmp_path, suffix):
    data = write(tmp_path / f"rows.{suffix}", ROWS)
    splits = load(OWN, data, held_out=0.25)
    labels = {name: split.labels.tolist() for name, split in splits.items()}
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 60,
        "validation": 20,
    }
    # Of 8 rare ones.
    assert labels["validation"].count(1) == 2
    again = load(OWN, data, held_out=0.25)
    assert again["validation"].text_a == splits["validation"].text_a
    other = load(OWN, data, held_out=0.25, seed=1)
    assert other["validation"].text_a != splits["validation"].text_a


def test_a_number_of_rows_can_be_held_out(tmp_path):
    splits = load(OWN, write(tmp_path / "a.csv", ROWS), held_out=7)
    assert len(splits["validation"]) == 7


def test_a_class_of_one_row_is_trained_on(tmp_path):
    rows = [{"text": "x", "label": "one"}, *ROWS]
    splits = load(OWN, write(tmp_path / "a.jsonl", rows), held_out=0.5)
    assert splits.task.labels == ("often", "one", "rare")


def test_columns_get_our_names(tmp_path):
    rows = [{"review": f"r{i}", "stars": i % 2, "text": "other"} for i in range(10)]
    data, names = write(tmp_path / "a.csv", rows), {"text": "review", "label": "stars"}
    splits = load(OWN, data, columns=names, held_out=0.5)
    assert {*splits.train.text_a, *splits["validation"].text_a} == {
        f"r{i}" for i in range(10)
    }


def test_pairs_get_our_names(tmp_path):
    rows = [{"q": f"a{i}", "p": f"b{i}", "label": i % 2} for i in range(4)]
    data, names = write(tmp_path / "a.csv", rows), {"text_a": "q", "text_b": "p"}
    splits = load(OWN, data, columns=names, held_out=0.5)
    assert [a[1:] for a in splits.train.text_a] == [b[1:] for b in splits.train.text_b]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": "reviews"},
            "`columns` must name columns that are there, got 'reviews' for `text`, "
            "and `{path}` line 2 has text, label.",
        ),
        ({"txt": "text"}, "`columns` must give names to text, text_a, text_b,"),
    ],
)
def test_a_column_that_is_not_there_is_refused(tmp_path, columns, message):
    path = write(tmp_path / "a.csv", ROWS)
    with pytest.raises(InputError, match=re.escape(message.format(path=path))):
        load(OWN, path, columns=columns, held_out=0.5)


def test_instructions_get_our_names(tmp_path):
    rows = [{"ask": "1 + 1 =", "reply": f" {i}"} for i in range(4)]
    data = write(tmp_path / "a.parquet", rows)
    columns = {"prompt": "ask", "response": "reply"}
    splits = load_conversations(data, None, columns=columns, held_out=1)
    assert [len(split) for split in splits.values()] == [3, 1]
    assert splits["train"][0].text.startswith("1 + 1 = ")


def test_a_mixture_has_its_weights_and_no_row_twice(tmp_path):
    few, many = (
        [{"text": f"{n} {i}"} for i in range(size)]
        for n, size in (("a", 30), ("b", 500))
    )
    paths = [
        write(tmp_path / f"{n}.jsonl", rows) for n, rows in (("a", few), ("b", many))
    ]
    data = as_source(f"{paths[0]}=0.3,{paths[1]}=0.7")
    texts = [row["text"] for _, row in one_part(data).read().numbered]
    assert len({*texts}) == len(texts) == 100
    assert sum(text.startswith("a") for text in texts) == 30
    again, other = (one_part(data, seed=seed) for seed in (0, 1))
    assert [row["text"] for _, row in again.read().numbered] == texts
    assert [row["text"] for _, row in other.read().numbered] != texts
    assert again.digest != other.digest


def test_a_wrong_row_of_a_mixture_is_named_by_its_file(tmp_path):
    good = write(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    bad = write(tmp_path / "b.jsonl", [{"text": "x"}, {"text": None}, {"text": "x"}])
    with pytest.raises(InputError, match="b.jsonl` line 2 must have a text in `text`"):
        load_conversations({good: 1.0, bad: 1.0}, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a.jsonl=0.5,b.jsonl=-1", "`data` must have positive weights"),
        ("a.jsonl=0.5,a.jsonl=1", "`data` must name a source once"),
        ({"a.jsonl": 0.0}, "`data` must have positive weights"),
        ({}, "`data` must be a file, a folder, hub:NAME"),
        (3, "`data` must be a file, a folder, hub:NAME"),
    ],
)
def test_what_is_no_source_is_refused(data, message):
    with pytest.raises(InputError, match=re.escape(message)):
        as_source(data)


def test_a_file_whose_name_is_a_mixture_is_a_file(tmp_path):
    (tmp_path / "a=1,b=2").mkdir()
    assert as_source(str(tmp_path / "a=1,b=2")) == str(tmp_path / "a=1,b=2")


def test_a_source_of_a_mixture_has_to_be_there(tmp_path):
    with pytest.raises(InputError, match="`data` must mix files, or hub:.*none.jsonl"):
        one_part({str(tmp_path / "none.jsonl"): 1.0})


OWN_ROWS = {
    "list": ROWS,
    "generator": lambda: (row for row in ROWS),
    "dataset": datasets.Dataset.from_list(ROWS),
}


@pytest.mark.parametrize("name", OWN_ROWS)
def test_rows_of_a_program_are_data(name):
    rows = OWN_ROWS[name]
    splits = load(OWN, rows() if callable(rows) else rows, held_out=0.25)
    assert [len(split) for split in splits.values()] == [60, 20]


def test_splits_of_a_program_are_data():
    table = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": table, "validation": table})
    assert [len(split) for split in load(OWN, splits).values()] == [80, 80]
    chats = {"train": [{"text": "a"}], "validation": [{"text": "b"}]}
    found = load_conversations(chats, None)
    assert [split[0].text for split in found.values()] == ["a", "b"]


def test_what_is_no_row_is_refused():
    with pytest.raises(InputError, match="`data` row 1 must be an object, got str."):
        load(OWN, [ROWS[0], "text"], held_out=0.5)


@pytest.mark.parametrize(
    ("data", "request_", "sizes"),
    [
        ("hub:films", ("films", None, None), (80, 80)),
        ("hub:owner/films:small", ("owner/films", "small", None), (80, 80)),
        ("hub:films::train[:10%]", ("films", None, "train[:10%]"), (60, 20)),
    ],
)
def test_a_data_set_of_the_hub_has_a_name(monkeypatch, data, request_, sizes):
    table, asked = datasets.Dataset.from_list(ROWS), []

    def load_dataset(name, configuration, split=None):
        asked.append((name, configuration, split))
        return table if split else {"train": table, "validation": table}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load(OWN, data, held_out=0.25)
    assert asked[0] == request_
    assert tuple(map(len, splits.values())) == sizes


def test_settings_hold_columns_and_mixtures_as_mappings():
    from sparse_jax import Settings

    run = {"model": "m", "task": "causal", "output": "o"}
    text = Settings(**run, data="a.jsonl=1,b.jsonl=3", columns="text=body")
    same = Settings(**run, data={"a.jsonl": 1, "b.jsonl": 3}, columns={"text": "body"})
    assert text.record() == same.record() == json.loads(json.dumps(text.record()))
    assert Settings(**run, data=[{"text": "a"}]).record()["data"] == "own"

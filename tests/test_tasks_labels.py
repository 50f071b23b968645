import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

from sparse_jax.data.files import load
from sparse_jax.data.glue import TASKS
from sparse_jax.errors import InputError

OWN = TASKS["classification"]


@pytest.fixture
def splits_of(tmp_path):
    def read(labels, task=OWN, dev=None, suffix="json", **options):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for name, found in (("train", labels), ("dev", labels if dev is None else dev)):
            rows = [(f"{name} {i}", label) for i, label in enumerate(found)]
            if suffix == "json":
                content = json.dumps([{"text": t, "label": label} for t, label in rows])
            else:
                lines = (f"{text},{label}\n" for text, label in rows)
                content = "text,label\n" + "".join(lines)
            (folder / f"{name}.{suffix}").write_text(content, encoding="utf-8")
        return load(task, folder, **options)

    return read


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["None", "Some", None], "item 3 must have a label, got None. Leave out such"),
        (["x", "y", float("nan")], "item 3 must have a label, got nan. Leave out such"),
        (["x", "y", ""], "item 3 must have a label, got ''. Leave out such rows with "),
        (
            [{"x": 1}, {"x": 2}],
            "item 1 must have a word or a number as its label, got {",
        ),
        ([["x"], {"x": 2}], "item 2 must have a list of labels, got {'x': 2}. Write "),
        (
            [["x"], "y"],
            "item 2 must have a list of labels, got 'y'. Write the data as ",
        ),
        (
            [["x"], ["y", ["z"]]],
            "item 2 must have a word or a number as its label, got",
        ),
        ([["x"], ["y", None]], "item 2 must have a label, got None. Leave out such "),
        (
            [["x", "y"], ["y", "y"]],
            "item 2 must have no label twice, got ['y', 'y'].",
        ),
        ([0.5, None], "item 2 must have a label, got None. Leave out such rows with "),
        (
            [0.5, float("inf")],
            "item 2 must have a word or a number as its label, got i",
        ),
        (["a", "b", "\x1b[2J" * 99], "dev.json` item 1 must have one of the labels "),
    ],
)
def test_what_is_no_label_is_refused_by_its_place(splits_of, labels, message):
    dev = ["c"] if labels[0] == "a" else None
    with pytest.raises(InputError, match=re.escape(message)) as error:
        splits_of(labels, dev=dev)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_a_message_does_not_list_hundreds_of_labels(splits_of):
    with pytest.raises(InputError, match="2, 3, 4, 5, 6, 7, 8, 9 and 190 more, got 'x"):
        splits_of(range(200), dev=["x"])


def test_numbers_with_decimals_are_a_regression(splits_of):
    splits = splits_of([1, 2.5, -3.0], dev=[7])
    assert splits.task.name == "regression"
    assert splits.task.metrics == ("pearson", "spearman", "rmse")
    assert splits.train.labels.tolist() == [1, 2.5, -3]
    assert splits.train.labels.dtype == splits["validation"].labels.dtype == np.float32
    assert splits.notes == (
        "labels of 3 training examples: numbers from -3 to 2.5, so the task is "
        "regression.",
    )


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_whole_numbers_are_classes_unless_regression_is_asked_for(splits_of, suffix):
    labels = [1.0, 2, 10, 2.0]
    splits = splits_of(labels, suffix=suffix)
    assert splits.task.labels == ("1", "2", "10")
    assert splits.train.labels.tolist() == [0, 1, 2, 1]
    splits = splits_of(labels, TASKS["regression"], suffix=suffix)
    assert splits.train.labels.tolist() == labels


def test_words_that_look_like_numbers_are_words_where_there_are_types(splits_of):
    assert splits_of(["3.5", "3.12"]).task.labels == ("3.12", "3.5")
    assert splits_of(["3.5", "3.12"], suffix="csv").task.name == "regression"
    assert splits_of(["1.0", "x"]).task.labels == ("1.0", "x")
    assert splits_of(["9" * 5000, "x"], suffix="csv").task.num_outputs == 2
    assert splits_of([10**30, 10**31, 2]).task.labels == ("2", f"{10**30}", f"{10**31}")


def test_glue_reads_whole_numbers_in_any_spelling(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("sentence,label\na,1.0\nb,0\n")
    assert load(TASKS["sst2"], tmp_path).train.labels.tolist() == [1, 0]


def test_lists_of_labels_are_sets(splits_of):
    splits = splits_of([["b", "a"], [], ["c"]], dev=[["a"]])
    assert splits.task.name == "multilabel"
    assert splits.task.labels == ("a", "b", "c")
    assert splits.train.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert splits["validation"].labels.tolist() == [[1, 0, 0]]
    assert splits.train.labels.dtype == np.float32
    assert splits.notes == (
        "labels of 3 training examples: 3 labels, a, b, c, so the task is multilabel.",
    )


def test_numbers_in_lists_are_labels_or_flags(splits_of):
    assert splits_of([[10, 9], [9]]).train.labels.tolist() == [[1, 1], [1, 0]]
    splits = splits_of([[0, 1.0, 0], [1, 1, 0]], dev=[[0, 0, 1]])
    assert splits.task.labels == ("0", "1", "2")
    assert splits.train.labels.tolist() == [[0, 1, 0], [1, 1, 0]]
    assert splits["validation"].labels.tolist() == [[0, 0, 1]]
    assert splits.warnings == ("train: no example has the label 2.",)
    with pytest.raises(
        InputError, match="dev.json` item 1 must have a list of 2 labels"
    ):
        splits_of([[0, 1], [1, 1]], dev=[[0, 1, 1]])


@pytest.mark.parametrize(
    ("task", "labels", "left", "counts"),
    [
        (
            OWN,
            ["a", None, "b", "-", -1, "a"],
            [0, 1, 0],
            "1 with no label, 1 with the l",
        ),
        (
            OWN,
            [0, float("nan"), 1, 2],
            [0, 1, 2],
            "train.json`: 1 of 4 rows are dropped",
        ),
        (
            TASKS["regression"],
            [-1, None, "-", 0.5],
            [-1, 0.5],
            "2 of 4 rows are dropped",
        ),
        (
            OWN,
            [["a"], None, []],
            [[1], [0]],
            "1 of 3 rows are dropped as unlabeled, 1",
        ),
    ],
)
def test_rows_without_a_label_can_be_dropped(splits_of, task, labels, left, counts):
    splits = splits_of(labels, task, drop_unlabeled=True)
    assert splits.train.labels.tolist() == left
    assert len(splits.train.text_a) == len(left)
    assert any(counts in note for note in splits.notes)
    with pytest.raises(InputError, match="drop-unlabeled"):
        splits_of(labels, task)


def test_rows_of_snli_without_a_label_can_be_dropped(tmp_path):
    rows = [("neutral", "p"), ("-", "q"), (-1, "r"), ("entailment", "s")]
    content = "".join(
        json.dumps({"sentence1": text, "sentence2": "h", "gold_label": label}) + "\n"
        for label, text in rows
    )
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"line 2 must have one .*--drop-unlabeled"):
        load(TASKS["mnli"], tmp_path)
    splits = load(TASKS["mnli"], tmp_path, drop_unlabeled=True)
    assert splits.train.labels.tolist() == [1, 0]
    assert splits.train.text_a == ["p", "s"]
    assert splits.train.text_b == ["h", "h"]
    assert splits.notes[0].endswith(
        "2 of 4 rows are dropped as unlabeled, 1 with the label -, 1 with the label -1."
    )


def test_a_split_whose_rows_are_all_dropped_is_refused(splits_of):
    with pytest.raises(InputError, match="dev.json` must have labeled examples, got n"):
        splits_of(["a", "b"], dev=[None, "-"], drop_unlabeled=True)


def test_labels_are_numbered_in_the_order_of_a_model(splits_of):
    splits = splits_of(["no", "yes", "no"], order=("YES", "No"))
    assert splits.task.labels == ("yes", "no")
    assert splits.train.labels.tolist() == [1, 0, 1]
    assert splits_of(["no", "yes"], order=("YES", "maybe")).task.labels == ("no", "yes")


@pytest.mark.parametrize(
    ("labels", "dev", "warning"),
    [
        (["Yes", "yes ", "no"], None, "the labels 'Yes', 'yes' are different classes."),
        (
            ["-", "a", "b"],
            None,
            "the label - is a class. Pass --drop-unlabeled if it ",
        ),
        (
            [-1, 0, 1, 2],
            None,
            "the label -1 is a class. Pass --drop-unlabeled if it m",
        ),
        (["a", "b"], ["b", "b"], "validation: all 2 examples have the label b."),
        ([0.5, 1], [2, 2], "validation: all 2 examples have the label 2.0."),
        (
            [*range(30)],
            None,
            "there are 30 classes in 30 training examples. Pass the t",
        ),
        ([["a"], ["b"]], None, ""),
        ([-1, 1], None, ""),
        (["a", "b"], None, ""),
    ],
)
def test_odd_labels_are_told(splits_of, labels, dev, warning):
    warnings = splits_of(labels, dev=dev).warnings
    assert [one[: len(warning)] for one in warnings] == ([warning] if warning else [])


def test_examples_that_were_trained_on_and_empty_texts_are_told(tmp_path):
    content = "text,label\na,x\nb,y\n ,x\n"
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text(content)
    assert load(OWN, tmp_path).warnings == (
        "train: 1 of 3 examples have an empty text.",
        "validation: 1 of 3 examples have an empty text.",
        "validation: 3 of 3 examples are training examples too, so its metrics say "
        "little about other data.",
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": "a", "text_a": "b"},
            "item 1 must have one of `text` or `text_a`, got ",
        ),
        (
            {"label": "x", "labels": "y"},
            "must have one of `label` or `labels`, got both",
        ),
        ({"te\x1b[31mxt": "a"}, "got the columns label, 'te\\x1b[31mxt'."),
    ],
)
def test_a_column_is_not_guessed(tmp_path, columns, message):
    row = {"text": "a", "label": "x", **columns}
    if message.startswith("got the columns"):
        del row["text"]
    (tmp_path / "train.json").write_text(json.dumps([row]))
    with pytest.raises(InputError, match=re.escape(message)):
        load(OWN, tmp_path)


def test_columns_of_two_names_may_agree(tmp_path):
    rows = [{"text": "a", "text_a": "a", "label": i, "labels": None} for i in (0, 1)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    assert load(OWN, tmp_path).train.labels.tolist() == [0, 1]

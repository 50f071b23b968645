import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparse_jax.data.files import load
from sparse_jax.data.glue import TASKS
from sparse_jax.errors import InputError

RTE = "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n1\tC.\tD.\t1\n"
OWN = '{"text": "good", "label": "plus"}\n{"text": "bad", "label": "minus"}\n'


@pytest.fixture
def folder(tmp_path):
    def write(**contents):
        for name, content in contents.items():
            stem, _, suffix = name.rpartition("_")
            (tmp_path / f"{stem}.{suffix}").write_text(content, encoding="utf-8")
        return tmp_path

    return write


def one_example(task, *, header, row, name="tsv"):
    """Returns the training split of one row beside a copy for evaluation."""
    content = "\t".join(header) + "\n" + "\t".join(row) + "\n"
    return {f"train_{name}": content, f"dev_{name}": content}


OFFICIAL = {
    "sst2": ("sentence label", ["good film", "1"], 1),
    "mrpc": ("Quality|#1 ID|#2 ID|#1 String|#2 String", ["0", "1", "2", "A", "B"], 0),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        ["0", "g", "f", "y", "1", "s", "t", "A", "B", "3.800"],
        3.8,
    ),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", [*"123AB", "1"], 1),
    "mnli": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
        "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
        [*"01234567AB", "neutral", "contradiction"],
        2,
    ),
    "qnli": ("index question sentence label", [*"0AB", "not_entailment"], 1),
    "rte": ("index sentence1 sentence2 label", [*"0AB", "entailment"], 0),
}


@pytest.mark.parametrize(
    ("name", "header", "row", "label"),
    [(name, *case) for name, case in OFFICIAL.items()],
    ids=OFFICIAL,
)
def test_official_columns_are_known(folder, name, header, row, label):
    header = header.split("|" if "|" in header else " ")
    splits = load(TASKS[name], folder(**one_example(name, header=header, row=row)))
    texts = ("good film", None) if name == "sst2" else ("A", ["B"])
    assert (splits.train.text_a[0], splits.train.text_b) == texts
    assert splits.train.labels.tolist() == pytest.approx([label])
    dtype = np.float32 if name == "stsb" else np.int32
    assert splits.train.labels.dtype == dtype


HUB = {
    "cola": {"sentence": "A", "label": 1, "idx": 0},
    "sst2": {"sentence": "A", "label": 1, "idx": 0},
    "mrpc": {"sentence1": "A", "sentence2": "B", "label": 1, "idx": 0},
    "stsb": {"sentence1": "A", "sentence2": "B", "label": 1.0, "idx": 0},
    "qqp": {"question1": "A", "question2": "B", "label": 1, "idx": 0},
    "mnli": {"premise": "A", "hypothesis": "B", "label": 1, "idx": 0},
    "qnli": {"question": "A", "sentence": "B", "label": 1, "idx": 0},
    "rte": {"sentence1": "A", "sentence2": "B", "label": 1, "idx": 0},
}


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_columns_of_the_hub_are_known(folder, name, suffix):
    row = json.dumps(HUB[name])
    content = f"[{row}]" if suffix == "json" else row
    files = {f"train_{suffix}": content, f"validation_{suffix}": content}
    train = load(TASKS[name], folder(**files)).train
    assert train.text_a == ["A"]
    assert train.text_b == (["B"] if len(HUB[name]) == 4 else None)
    assert train.labels.tolist() == [1]


def test_the_first_evaluation_split_is_validation(folder):
    splits = load(TASKS["rte"], folder(test_tsv=RTE, train_tsv=RTE, dev_tsv=RTE))
    assert list(splits) == ["train", "validation", "test"]
    assert list(splits.evaluation) == ["validation", "test"]
    assert len(splits) == 3
    assert len(splits["validation"]) == 2


def test_val_gives_way_to_dev(folder):
    head = RTE[: RTE.index("\n1") + 1]
    data = folder(train_tsv=RTE, val_tsv=RTE)
    assert len(load(TASKS["rte"], data).evaluation["validation"]) == 2
    data = folder(dev_tsv=head)
    assert len(load(TASKS["rte"], data).evaluation["validation"]) == 1


def test_mnli_has_two_evaluation_splits(folder):
    content = '{"premise": "A", "hypothesis": "B", "label": "neutral"}\n'
    data = folder(train_jsonl=content, dev_matched_jsonl=content)
    folder(dev_mismatched_jsonl=content, test_matched_jsonl="not read")
    splits = load(TASKS["mnli"], data)
    assert list(splits.evaluation) == ["validation", "validation_mismatched"]


@pytest.mark.parametrize(
    "test",
    [
        "index\tsentence1\tsentence2\n0\tA\tB\n",
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t-1\n1\tA\tB\t-1\n",
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t\n",
    ],
)
def test_a_test_split_without_labels_is_not_for_evaluation(folder, test):
    splits = load(TASKS["rte"], folder(train_tsv=RTE, dev_tsv=RTE, test_tsv=test))
    assert list(splits) == ["train", "validation"]


def test_official_files_of_mrpc_are_second_to_those_of_glue(folder):
    content = "Quality\t#1 String\t#2 String\n1\tA\tB\n"
    data = folder(msr_paraphrase_train_txt=content, msr_paraphrase_test_txt=content)
    assert list(load(TASKS["mrpc"], data)) == ["train", "test"]
    folder(train_tsv=content + "0\tC\tD\n", dev_tsv=content)
    folder(test_tsv="index\t#1 String\t#2 String\n0\tA\tB\n")
    splits = load(TASKS["mrpc"], data)
    assert list(splits) == ["train", "validation"]
    assert len(splits.train) == 2


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["plus", "minus", "plus"], ("minus", "plus"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        ([1, -1, "1"], ("-1", "1"), [1, 0, 1]),
        ([2, "two", 2], ("2", "two"), [0, 1, 0]),
    ],
)
def test_names_of_own_labels_come_from_the_training_file(
    folder, labels, names, numbers
):
    content = json.dumps([{"text": "a", "label": label} for label in labels])
    splits = load(TASKS["classification"], folder(train_json=content, dev_json=content))
    assert splits.task == replace(TASKS["classification"], labels=names)
    assert splits.task.num_outputs == 2
    assert splits.train.labels.tolist() == numbers


@pytest.mark.parametrize("column", ["text_b", "text_pair"])
def test_own_texts_may_be_pairs(folder, column):
    content = f"text,{column},label\na,b,0\nc,d,1\n"
    splits = load(TASKS["classification"], folder(train_csv=content, dev_csv=content))
    assert splits.train.text_b == ["b", "d"]


def test_own_texts_may_have_null_as_the_second(folder):
    content = OWN.replace("}", ', "text_b": null}')
    splits = load(TASKS["classification"], folder(train_jsonl=content, dev_jsonl=OWN))
    assert splits.train.text_b is None


def test_the_quickstart_task_loads():
    data = Path(__file__).parents[1] / "experiments" / "assets" / "quickstart"
    splits = load(TASKS["classification"], data)
    assert len(splits.train) == 3200
    assert list(splits.evaluation) == ["validation"]
    assert splits.task.labels is not None
    assert len(splits.task.labels) == 8
    assert splits.task.labels[0] == "concurrency"


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("rte", {}, "must hold a training file such as `train.tsv` or `train.jsonl`, "),
        ("rte", {"dev_tsv": RTE}, "`train.jsonl`, got dev.tsv."),
        ("rte", {"train_tsv": RTE}, "train.tsv` must come with labeled examples for"),
        (
            "rte",
            {"train_tsv": RTE, "test_tsv": "sentence1\tsentence2\nA\tB"},
            "train.tsv` must come with labeled examples for",
        ),
        ("rte", {"train_xlsx": "x"}, "train.xlsx` must end in .tsv, .txt, "),
        ("rte", {"train_tsv": ""}, "train.tsv` must have examples, got none."),
        ("cola", {"train_tsv": ""}, "train.tsv` must have examples, got none."),
        ("rte", {"train_tsv": RTE[:32]}, "train.tsv` must have examples, got none"),
        (
            "rte",
            {"train_tsv": RTE, "train_csv": RTE},
            "must hold one file `train`, got train.csv and train.tsv.",
        ),
        (
            "mrpc",
            {"train_tsv": RTE.replace("sentence2", "other")},
            "train.tsv` line 2 must have a column `sentence2` or `#2 String` or "
            "`text_b`, got the columns index, sentence1, other, label.",
        ),
        (
            "rte",
            {"train_tsv": "sentence1\tsentence2\nA\tB"},
            "train.tsv` line 2 must have a column `label`, got the columns sentence1, ",
        ),
        (
            "rte",
            {"train_tsv": RTE, "dev_tsv": RTE.replace("\t1\n", "\tneutral\n")},
            "dev.tsv` line 3 must have one of the labels 0, 1, entailment, "
            "not_entailment, got 'neutral'.",
        ),
        (
            "rte",
            {"train_tsv": RTE.replace("\t1\n", "\t-1\n")},
            "train.tsv` line 3 must have one of the labels 0, 1, ",
        ),
        (
            "rte",
            {"train_json": '[{"sentence1": "A", "sentence2": null, "label": 0}]'},
            "train.json` item 1 must have a text in `sentence2` or `text_b`, got None.",
        ),
        (
            "cola",
            {"train_jsonl": r'{"sentence": "\ud83d", "label": 0}'},
            "train.jsonl` line 1 must have whole characters in `sentence`",
        ),
        (
            "stsb",
            {"train_json": '[{"sentence1": "A", "sentence2": "B", "label": "x"}]'},
            "train.json` item 1 must have a number as its label, got 'x'.",
        ),
        (
            "stsb",
            {"train_json": '[{"sentence1": "A", "sentence2": "B", "label": NaN}]'},
            "train.json` item 1 must have a label, got nan. Leave out such rows with "
            "`drop_unlabeled` (--drop-unlabeled).",
        ),
        (
            "classification",
            {"train_jsonl": OWN, "dev_jsonl": '{"text": "a", "label": 0}'},
            "dev.jsonl` line 1 must have one of the labels minus, plus, got 0.",
        ),
        (
            "classification",
            {"train_jsonl": OWN.replace("plus", "minus")},
            "train.jsonl` must have at least two labels in `label`, got minus.",
        ),
        (
            "classification",
            {"train_jsonl": OWN.replace('"plus"', "null")},
            "train.jsonl` line 1 must have a label, got None. Leave out such rows ",
        ),
        (
            "classification",
            {"train_jsonl": OWN + '{"text": "a", "text_b": "b", "label": "plus"}'},
            "train.jsonl` line 3 must have a second text exactly if the rows before it",
        ),
        (
            "classification",
            {"train_jsonl": OWN, "dev_csv": "text,text_b,label\na,b,plus\n"},
            "dev.csv` must have a second text exactly if `",
        ),
    ],
)
def test_an_error_says_what_is_wrong_and_where(folder, name, files, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load(TASKS[name], folder(**files))


@pytest.mark.parametrize("data", ["glue", "./no/such", "/no/such"])
def test_a_missing_folder_is_an_error(data):
    with pytest.raises(
        InputError, match="`data` must be a file, a folder .* there is none "
    ):
        load(TASKS["rte"], data)


def test_own_texts_need_data():
    with pytest.raises(InputError, match="`data` must be given for the task classif"):
        load(TASKS["classification"])


@pytest.mark.parametrize(
    ("name", "folder_name", "counts"),
    [
        ("mrpc", "MRPC", {"train": 4076, "test": 1725}),
        ("rte", "RTE", {"train": 2490, "validation": 277}),
        ("cola", "CoLA", {"train": 7250, "validation": 1043}),
        ("sst2", "samples/SST-2", {"train": 400, "validation": 200}),
        ("stsb", "samples/STS-B", {"train": 400, "validation": 200}),
        ("qqp", "samples/QQP", {"train": 400, "validation": 200}),
        ("mnli", "samples/MNLI", {"train": 400, "validation": 200}),
        ("qnli", "samples/QNLI", {"train": 400, "validation": 200}),
    ],
)
def test_real_files_have_their_counts(shared_data, name, folder_name, counts):
    folder = shared_data / "glue" / folder_name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    splits = load(TASKS[name], folder)
    assert {split: len(examples) for split, examples in splits.items()} == counts
    for examples in splits.values():
        assert len(examples.labels) == len(examples.text_a)
        assert all(examples.text_a)
        assert (examples.text_b is None) == (name in ("cola", "sst2"))
        assert 0 <= examples.labels.min() < examples.labels.max() <= 5


def test_mrpc_trains_on_2753_paraphrases(shared_data):
    if not (shared_data / "glue/MRPC").is_dir():
        pytest.skip("needs glue/MRPC")
    train = load(TASKS["mrpc"], shared_data / "glue/MRPC").train
    assert train.text_a[0].startswith("Amrozi accused his brother, whom he called")
    assert train.labels.sum() == 2753


def test_the_rest_of_cola_needs_its_own_name(shared_data, tmp_path):
    source = shared_data / "glue/CoLA"
    if not source.is_dir():
        pytest.skip("needs glue/CoLA")
    for name in ("train.tsv", "val.tsv"):
        (tmp_path / name).symlink_to(source / name)
    splits = load(TASKS["cola"], tmp_path)
    assert len(splits["validation"]) == 1301

import datasets
import pytest

from sparse_jax.data.files import load
from sparse_jax.data.glue import TASKS
from sparse_jax.errors import InputError


@pytest.fixture
def hub(monkeypatch):
    """Replaces the Hub by splits given in a test; returns the requests made to it."""
    requests = []

    def serve(**splits):
        def load_dataset(*names):
            requests.append(names)
            return {k: datasets.Dataset.from_list(rows) for k, rows in splits.items()}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return requests

    return serve


def test_without_data_glue_comes_from_the_hub(hub):
    row = {"sentence1": "A", "sentence2": "B", "label": 1, "idx": 0}
    hidden = row | {"label": -1}
    requests = hub(test=[hidden], validation=[row], train=[row, row | {"label": 0}])
    splits = load(TASKS["mrpc"])
    assert requests == [("nyu-mll/glue", "mrpc")]
    assert list(splits) == ["train", "validation"]
    assert splits.train.labels.tolist() == [1, 0]


def test_classes_of_the_hub_have_the_numbers_of_the_task(monkeypatch):
    names = ["contradiction", "entailment", "neutral"]
    kinds = {"premise": "string", "hypothesis": "string"}
    features = datasets.Features(
        {name: datasets.Value(kind) for name, kind in kinds.items()}
        | {"label": datasets.ClassLabel(names=names)}
    )
    rows = [{"premise": "A", "hypothesis": "B", "label": i} for i in (0, 1, 2, -1)]
    split = datasets.Dataset.from_list(rows, features=features)
    served = {"train": split, "validation": split}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: served)
    splits = load(TASKS["mnli"], "owner/nli", drop_unlabeled=True)
    # GLUE has entailment, neutral, contradiction.
    assert splits.train.labels.tolist() == [2, 0, 1]


def test_the_matched_split_of_mnli_is_validation(hub):
    row = {"premise": "A", "hypothesis": "B", "label": 2, "idx": 0}
    evaluation = {"validation_matched": [row], "validation_mismatched": [row, row]}
    hub(train=[row], test_matched=[row | {"label": -1}], **evaluation)
    splits = load(TASKS["mnli"])
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1,
        "validation": 1,
        "validation_mismatched": 2,
    }


def test_hidden_scores_of_stsb_are_recognized(hub):
    row = {"sentence1": "A", "sentence2": "B", "label": 2.5, "idx": 0}
    hub(train=[row], validation=[row], test=[row | {"label": -1.0}])
    assert list(load(TASKS["stsb"])) == ["train", "validation"]


def test_own_data_sets_come_by_name(hub):
    rows = [{"text": "A", "label": 1}, {"text": "B", "label": 0}]
    requests = hub(train=rows, test=rows)
    assert list(load(TASKS["classification"], "owner/films")) == ["train", "test"]
    assert requests == [("owner/films", None)]


def test_a_wrong_row_is_named_by_its_split(hub):
    row = {"sentence": "A", "label": 5}
    hub(train=[row], validation=[row])
    with pytest.raises(InputError, match="`nyu-mll/glue` train row 0 must have one of"):
        load(TASKS["cola"])


def test_a_data_set_needs_a_training_split(hub):
    hub(test=[{"text": "A", "label": 1}])
    with pytest.raises(InputError, match="`a/b` must have a split `train`, got test."):
        load(TASKS["classification"], "a/b")


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, ValueError])
def test_a_data_set_that_cannot_be_fetched_is_an_error(monkeypatch, error):
    def load_dataset(*names):
        raise error("Couldn't reach it.\nDetails.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = "got 'data/rte', which is no folder and .*: Couldn't reach it. Check"
    with pytest.raises(InputError, match=message):
        load(TASKS["rte"], "data/rte")

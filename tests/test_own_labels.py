"""Runs on one's own sets of labels and values."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import WORDS, tiny_settings, write_model

from sparse_jax import InputError, evaluate_adapter, finetune, load_adapter
from sparse_jax.models.attachment import Attachment
from sparse_jax.training.objective import make_loss


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def write_rows(folder, label):
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, count in (("train", 24), ("dev", 12)):
        texts = [" ".join(random.choice(WORDS, 5)) for _ in range(count)]
        rows = [{"text": text, "label": label(set(text.split()))} for text in texts]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    ("label", "found", "labels", "metrics"),
    [
        (
            lambda words: sorted(words & {"good", "bad", "film"}),
            "multilabel",
            ("bad", "film", "good"),
            ["micro_f1", "macro_f1", "subset_accuracy"],
        ),
        (
            lambda words: len(words & {*WORDS[:3]}) / 2,
            "regression",
            (),
            ["pearson", "spearman", "rmse"],
        ),
    ],
)
@pytest.mark.quick(1)
def test_a_run_and_its_evaluation_agree(
    model, tmp_path, caplog, label, found, labels, metrics
):
    data = write_rows(tmp_path / "data", label)
    settings = tiny_settings(
        model, data, tmp_path / "run", task="classification", method="lora"
    )
    with caplog.at_level("INFO"):
        results = finetune(settings)["eval"]
    assert f"so the task is {found}" in caplog.text
    assert [*results] == [*metrics, "loss"]
    assert np.isfinite([*results.values()]).all()
    adapter = load_adapter(settings.output)
    assert (adapter.task, adapter.labels) == (found, labels)
    assert evaluate_adapter(settings.output, data=str(data)) == results


@pytest.mark.slow
def test_sets_of_labels_are_not_evaluated_with_one_label_for_each(model, tmp_path):
    one = write_rows(tmp_path / "one", lambda words: "ab"["good" in words])
    sets = write_rows(tmp_path / "sets", lambda words: ["ab"["good" in words]])
    run = tmp_path / "run"
    options = {"task": "classification", "method": "lora", "max_steps": 1}
    finetune(tiny_settings(model, one, run, **options))
    # The labels are the same, and one of two outputs is the larger; not above zero.
    with pytest.raises(InputError, match="`data` must have one label for every"):
        evaluate_adapter(run, data=str(sets))


@pytest.mark.parametrize("problem", ["multi_label", "single_label", "regression"])
def test_losses_are_those_of_transformers(problem):
    import torch

    random = np.random.default_rng(0)
    size = 1 if problem == "regression" else 3
    logits = random.normal(size=(4, size)).astype(np.float32)
    targets, loss = {
        "multi_label": (
            random.integers(0, 2, (4, 3)).astype(np.float32),
            torch.nn.BCEWithLogitsLoss(),
        ),
        "single_label": (np.array([0, 2, 1, 2]), torch.nn.CrossEntropyLoss()),
        "regression": (np.array([0.5, -1, 2, 3], np.float32), torch.nn.MSELoss()),
    }[problem]
    predicted = torch.tensor(logits if size > 1 else logits[:, 0])
    expected = loss(predicted, torch.tensor(targets)).item()

    model: Any = lambda params, inputs, **options: jnp.asarray(logits)
    batch = {"labels": jnp.asarray(targets), "weights": jnp.ones(4)}
    total, count = make_loss(model)({}, batch, jax.random.key(0), Attachment())
    assert float(total / count) == pytest.approx(expected, rel=1e-6)

"""The best model of a run: kept, waited for, and the same after an interruption."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_settings, write_files

from sparse_jax import InputError, evaluate_adapter, finetune
from sparse_jax.data.glue import TASKS
from sparse_jax.data.metrics import evaluate, require_metrics
from sparse_jax.training import best_model
from sparse_jax.training.best_model import BestModel, Standing
from sparse_jax.training.checkpoint import Checkpoints
from sparse_jax.training.loop import Loop


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def settings_of(files, output, **changes):
    fields = {"method": "sift", "where": ("query",), "batch_size": 4, "epochs": 2}
    return tiny_settings(**files, output=output, **{**fields, **changes})


BEST = {"load_best_model_at_end": True, "eval_every": 2, "keep": 1, "save_every": 1}


def scripted(monkeypatch, values):
    """Lets the accuracy on the validation data be what a test says."""
    evaluate = Loop._evaluate

    def say(loop, state, at, *args, **more):
        real = loop.evaluate

        def found(state):
            evaluated = real(state)
            evaluated.results["validation"]["accuracy"] = values[at.batches]
            return evaluated

        with monkeypatch.context() as patch:
            patch.setattr(loop, "evaluate", found)
            return evaluate(loop, state, at, *args, **more)

    monkeypatch.setattr(Loop, "_evaluate", say)


def rows_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "split" in row]


def test_the_best_model_is_the_result_also_after_an_interruption(
    files, tmp_path, monkeypatch
):
    scripted(monkeypatch, {2: 0.5, 4: 0.75, 6: 0.7, 8: 0.75, 10: 0.5, 12: 0.6})
    whole = settings_of(files, tmp_path / "whole", **BEST)
    metrics = finetune(whole)
    assert (metrics["best_step"], metrics["steps"]) == (4, 12)
    assert metrics["eval"]["accuracy"] == 0.75
    step, adapter = Loop._batch, "adapter.safetensors"

    def stop(loop, state, at, batch):
        if at.batches == 9:
            loop.checkpoints.close()
            raise KeyboardInterrupt
        return step(loop, state, at, batch)

    part = replace(whole, output=str(tmp_path / "part"))
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(part)
    # All but the newest are removed, and not the best.
    kept = sorted(path.name for path in (tmp_path / "part/checkpoints").iterdir())
    assert kept == ["4", "9"]
    finetune(replace(part, resume=True))
    same = [(tmp_path / run / adapter).read_bytes() for run in ("whole", "part")]
    assert same[0] == same[1]
    rows = rows_of(tmp_path / "whole")
    assert rows == rows_of(tmp_path / "part")
    assert [row["is_best"] for row in rows] == [True, True, False, False, False, False]
    # It is the model of that evaluation to the bit, on the data of the run.
    losses = [row["loss"] for row in rows]
    assert evaluate_adapter(tmp_path / "whole")["loss"] == losses[1] != losses[-1]


def test_a_best_model_that_is_lost_is_reported(files, tmp_path, monkeypatch, caplog):
    scripted(monkeypatch, {2: 0.9, 4: 0.5, 6: 0.5})
    monkeypatch.setattr(Checkpoints, "_write", lambda self, record, leaves: None)
    metrics = finetune(settings_of(files, tmp_path / "run", **BEST, epochs=1))
    assert "the best model" in caplog.text
    assert (metrics["best_step"], metrics["eval"]["accuracy"]) == (None, 0.5)


def test_a_run_ends_when_no_better_model_comes(files, tmp_path, monkeypatch, caplog):
    scripted(monkeypatch, {0: 0.9, 2: 0.5, 4: 0.505, 6: 0.3})
    options = {
        "early_stopping_patience": 2, "early_stopping_threshold": 0.01,
        "eval_every": 2, "eval_on_start": True, "max_eval_samples": 5,
    }  # fmt: skip
    with caplog.at_level("INFO"):
        metrics = finetune(settings_of(files, tmp_path / "run", **options))
    assert (metrics["steps"], metrics["eval"]["accuracy"]) == (6, 0.3)
    assert metrics["examples"]["validation"]["used"] == 5
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    # The evaluation before the training is not of a model that could be kept.
    assert [row.get("is_best") for row in rows] == [None, True, True, False]
    assert "no better accuracy on validation in 2 evaluations" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "loss"}, "`metric_for_best_model` must come "),
        ({"early_stopping_patience": 0}, "_patience` must be positive"),
        ({"early_stopping_threshold": 0.1}, "`early_stopping_threshold` must come"),
        (
            {"early_stopping_threshold": float("nan")},
            "`early_stopping_threshold` must be 0 or more and finite, got nan",
        ),
        ({"max_eval_samples": 0}, "`max_eval_samples` must be positive"),
        ({"load_best_model_at_end": True, "reselect_every": 3}, "left out with `r"),
        ({"eval_data": ("a/x.csv", "b/x.csv")}, "of its own for every file, got 'x'"),
        ({"eval_data": ("train=a.csv",)}, "of its own for every file, got 'train'"),
    ],
)  # fmt: skip
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        tiny_settings("m", "d", "o", **options)


def job_of(settings) -> Any:
    fields = {
        "settings": settings, "total": 12, "select_after": 0,
        "objective": SimpleNamespace(metrics=("accuracy", "loss"), primary="accuracy"),
        "feed": SimpleNamespace(
            sizes={"train": 9, "validation": 3, "test": 3}, batches_per_epoch=6
        ),
    }  # fmt: skip
    return SimpleNamespace(**fields)


def test_a_metric_is_named_as_in_the_results():
    name = lambda word: best_model.best_model_of(
        job_of(
            tiny_settings(
                "m", "d", "o", load_best_model_at_end=True, metric_for_best_model=word
            )
        )
    )
    assert name(None) == BestModel("validation", "accuracy")
    assert name("eval_loss") == name("loss") == BestModel("validation", "loss")
    assert name("accuracy_test") == BestModel("test", "accuracy")
    message = "must be one of accuracy, loss, accuracy_test, loss_test, got 'f1'"
    with pytest.raises(InputError, match=message):
        name("f1")


@pytest.mark.parametrize(
    ("patience", "every", "count"), [(2, None, 2), (1, None, 0), (6, 2, 6), (3, 5, 4)]
)
def test_a_run_warns_of_patience_beyond_its_evaluations(patience, every, count, caplog):
    """Twelve updates in two epochs."""
    settings = tiny_settings(
        "m", "d", "o", early_stopping_patience=patience, eval_every=every
    )
    job = job_of(settings)
    by = best_model.best_model_of(job)
    assert by == BestModel("validation", "accuracy", patience=patience)
    is_told = f"cannot stop a run of {count} evaluations" in caplog.text
    assert is_told == bool(count and patience >= count)


def test_early_stopping_counts_as_that_of_transformers():
    """Compares with `EarlyStoppingCallback` on random metrics."""
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

    random = np.random.default_rng(0)
    for trial in range(20):
        values = random.integers(0, 8, 12) / 8
        args = SimpleNamespace(
            metric_for_best_model="f1", greater_is_better=bool(trial % 2)
        )
        metric = "f1" if trial % 2 else "loss"
        theirs = EarlyStoppingCallback(3, 0.125)
        state, rows = TrainerState(best_metric=None), []
        by = BestModel("validation", metric, threshold=0.125, patience=3)
        for value in values:
            theirs.check_metric_value(args, state, TrainerControl(), value)
            better = np.greater if args.greater_is_better else np.less
            if state.best_metric is None or better(value, state.best_metric):
                state.best_metric = value
            is_best = by.is_better(rows, {metric: value})
            assert is_best == (state.best_metric == value) or not is_best
            rows.append({"step": len(rows), metric: value, "is_best": is_best})
            found = by.standing(rows)
            assert found.value == state.best_metric
            assert found.since == theirs.early_stopping_patience_counter


def test_a_metric_that_is_not_finite_is_never_the_best():
    by = BestModel("validation", "loss")
    rows = [
        {"step": i, "loss": x, "is_best": 0} for i, x in enumerate([None, 2.0, None])
    ]
    assert by.standing(rows) == Standing(1, 2.0, 1)
    assert not by.is_better([], {"loss": np.nan})


def test_a_metric_of_a_program_is_reported_and_chooses_the_model(files, tmp_path):
    seen = []

    def classes_error(labels, predictions):
        seen.append((labels.copy(), predictions.copy()))
        return [0.5, 0.25, 0.25, 0.75][len(seen) - 1]

    options = {
        **BEST, "epochs": 1, "metric_for_best_model": "classes_error",
    }  # fmt: skip
    settings = settings_of(files, tmp_path / "run", **options)
    found = finetune(settings, metrics={"classes_error": classes_error})
    assert (found["best_step"], found["eval"]["classes_error"]) == (4, 0.25)
    again = evaluate_adapter(
        tmp_path / "run", metrics={"share": lambda *both: np.mean(both[0] == both[1])}
    )
    assert again["share"] == again["accuracy"] == found["eval"]["accuracy"]
    assert [shown.shape for shown in seen[0]] == [(13,), (13,)]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"accuracy": max}, "`metrics` must be functions by names .* got 'accuracy'"),
        ({"my score": max}, "`metrics` must be functions by names .* got 'my score'"),
        ({"share": 0.5}, "`metrics` must be functions by names .* got 'share': 0.5"),
    ],
)
def test_other_metrics_are_refused(metrics, message):
    with pytest.raises(InputError, match=message):
        require_metrics(metrics, "sst2", ("accuracy", "loss"))


def test_a_metric_that_is_no_number_and_one_without_labels_are_refused():
    outputs, labels = np.array([[1.0, 0.0]]), np.array([0])
    own: Any = {"share": lambda *_: "ten"}
    with pytest.raises(InputError, match="must return a number, got 'ten' of 'share'"):
        evaluate(TASKS["sst2"], outputs, labels, own)
    with pytest.raises(InputError, match="left out with task 'causal', got share"):
        require_metrics({"share": max}, "causal", ())

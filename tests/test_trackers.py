"""Trackers show the rows of a run, and never end it."""

import json
import logging
import struct
import sys
from types import SimpleNamespace

import pytest
from tiny_run import tiny_settings, write_data, write_model

from sparse_jax import InputError, finetune
from sparse_jax.training import trackers
from sparse_jax.training.trackers import (
    TRACKERS,
    Callbacks,
    Start,
    Trackers,
    register_tracker,
    require_trackers,
)

UPDATE = {
    "step": 3, "loss": 0.5, "gradient_norm": float("inf"), "learning_rate": None,
    "tokens": 80, "seconds": 2.0, "is_compiling": False,
}  # fmt: skip


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self):
        self.rows, self.is_closed = [], False

    def log(self, values, step):
        self.rows.append((step, dict(values)))

    def close(self):
        self.is_closed = True


class Broken(Kept):
    def log(self, values, step):
        super().log(values, step)
        raise ConnectionError("no route to host")


@pytest.fixture
def known(monkeypatch):
    """Returns a function that registers a tracker for one test."""
    monkeypatch.setattr(trackers, "TRACKERS", dict(TRACKERS))

    def add(word, tracker):
        register_tracker(word, lambda start: tracker)
        return tracker

    return add


def events(folder):
    """Returns (tag, step) -> value of the event files in a folder."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            at += size + 16
    return found


def test_tensorboard_shows_what_metrics_jsonl_has(tmp_path, known):
    pytest.importorskip("tensorboardX")
    kept = known("kept", Kept())
    write_model(tmp_path / "model")
    write_data(tmp_path / "data")
    made = {"method": "head", "max_steps": 3, "report_to": ("tensorboard", "kept")}
    settings = tiny_settings(
        tmp_path / "model", tmp_path / "data", tmp_path / "run", **made
    )
    finetune(settings)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    shown = events(tmp_path / "run" / "tensorboard")
    for row in rows:
        group, name = (
            (row["split"], "accuracy") if "split" in row else ("train", "loss")
        )
        tag = f"{group}/{name}"
        assert shown[tag, row["step"]] == pytest.approx(row[name], rel=1e-6)
        assert (row["step"], row[name]) in [
            (step, values.get(tag)) for step, values in kept.rows
        ]
    assert kept.is_closed


def test_only_finite_numbers_are_shown(tmp_path, known):
    kept = known("kept", Kept())
    shown = Trackers(["kept"], Start(tmp_path, {}, 0))
    shown.log(UPDATE)
    shown.log({"step": 4, "is_skipped": True})
    shown.log({"step": 4, "is_selection": True, "seconds": 2.0})
    assert kept.rows == [(3, {"train/loss": 0.5, "train/tokens_per_second": 40.0})]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, known, caplog):
    broken, kept = known("broken", Broken()), known("kept", Kept())
    shown = Trackers(["broken", "kept"], Start(tmp_path, {}, 0))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            shown.log(UPDATE)
        shown.close()
    assert (len(broken.rows), len(kept.rows)) == (1, 3)
    assert caplog.messages == ["broken is not logged to any more (no route to host)"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("wanb", "`report_to` must be one of tensorboard, wandb, got 'wanb'."),
        (
            "wandb",
            "`report_to` must name a tracker that is installed, got 'wandb' and no "
            "wandb. Run `pip install 'sparse_jax[wandb]'`.",
        ),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(word, message, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda module: None)
    with pytest.raises(InputError) as error:
        require_trackers([word])
    assert str(error.value) == message


def test_a_resumed_run_goes_on_in_its_run_of_wandb(tmp_path, monkeypatch):
    begun = []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(id="abc", log=lambda *a, **k: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for step in (0, 20, 0):
        Trackers(["wandb"], Start(tmp_path, {"seed": 1}, step)).close()
    assert [one["id"] for one in begun] == [None, "abc", None]
    assert begun[0]["config"] == {"seed": 1}


def test_a_run_calls_the_functions_of_a_program(tmp_path):
    steps, splits, saved = [], [], []
    calls = Callbacks(
        on_step=lambda row: steps.append((row["step"], row["loss"] > 0)),
        on_evaluate=lambda row: splits.append((row["step"], row["split"])),
        on_save=saved.append,
    )
    lines = (write_data(tmp_path / "data") / "train.jsonl").read_text().splitlines()
    model, output = write_model(tmp_path / "model"), tmp_path / "run"
    settings = tiny_settings(model, "", output, method="head", max_steps=2)
    rows = [json.loads(line) for line in lines]
    finetune(settings, data=rows, held_out=6, callbacks=calls)
    assert steps == [(1, True), (2, True)]
    assert splits == [(2, "validation")]
    assert saved == [2]

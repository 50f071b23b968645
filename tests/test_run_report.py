"""A run says what it did: examples, selection, skipped updates, and what went wrong."""

import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_settings, write_data, write_model

from sparse_jax import InputError, finetune
from sparse_jax.adapter.adapter import Adapter
from sparse_jax.cli.summary import print_summary
from sparse_jax.training import objective, progress
from sparse_jax.training.checkpoint import Checkpoints
from sparse_jax.training.progress import show_progress, warnings_kept
from sparse_jax.training.results import require_finite
from sparse_jax.training.run_files import outcome_warnings, skipped_at_end, updates_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "sst2")


def test_truncated_examples_are_told(model, data, tmp_path, caplog):
    # Every sentence has five words, seven tokens with the special ones.
    settings = tiny_settings(
        model, data, tmp_path / "run", method="head", max_length=6, max_steps=1
    )
    metrics = finetune(settings)
    assert metrics["examples"] == {
        "train": {"used": 22, "truncated": 22, "dropped": 0},
        "validation": {"used": 13, "truncated": 13, "dropped": 0},
    }
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [line for line in told if "examples used" in line] == [
        "train: 22 examples used (22 truncated to 6 tokens)",
        "validation: 13 examples used (13 truncated to 6 tokens)",
    ]


@pytest.mark.parametrize("handlers", [[], [logging.NullHandler()]])
def test_a_warning_is_printed_where_no_log_takes_it(handlers, monkeypatch, capsys):
    log = logging.getLogger("sparse_jax")
    monkeypatch.setattr(log, "propagate", True)
    # Other tests leave those of the command line.
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(logging.root, "handlers", handlers)
    with warnings_kept() as kept:
        logging.getLogger("sparse_jax.training.loop").warning("batch 1 is skipped")
    assert kept == ["batch 1 is skipped"]
    assert capsys.readouterr().err == ("" if handlers else "batch 1 is skipped\n")


def rows_of(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def spoil(monkeypatch, is_bad):
    """Makes the training loss NaN where `is_bad` says so of the key of a batch."""
    make_loss = objective.make_loss

    def make(model, **options):
        loss = make_loss(model, **options)

        def spoiled(params, batch, key, attachment):
            total, weight = loss(params, batch, key, attachment)
            return jnp.where(is_bad(key), jnp.nan, 1.0) * total, weight

        return spoiled

    monkeypatch.setattr(objective, "make_loss", make)


@pytest.mark.parametrize(
    ("method", "epochs", "in_a_row"), [("sift", 8, 20), ("head", 8, 20), ("head", 1, 3)]
)
@pytest.mark.quick(1)
def test_a_run_whose_loss_is_never_finite_stops(
    method, epochs, in_a_row, model, data, tmp_path, monkeypatch, caplog
):
    spoil(monkeypatch, lambda key: True)
    settings = tiny_settings(
        model, data, tmp_path / "run", method=method, epochs=epochs,
        where=("query",) if method == "sift" else None,
    )  # fmt: skip
    message = f"got {in_a_row} batches in a row where they are not, after 0 updates"
    with pytest.raises(InputError, match=message):
        finetune(settings)
    assert skipped_at_end(rows_of(tmp_path / "run")) == in_a_row
    assert not (tmp_path / "run/adapter.safetensors").exists()
    assert not (tmp_path / "run/metrics.json").exists()
    told = [record.getMessage() for record in caplog.records]
    assert sum("batch 1 is skipped" in line for line in told) == 1


@pytest.mark.slow
def test_skipped_updates_are_counted_and_a_resumed_run_skips_the_same(
    model, data, tmp_path, monkeypatch, caplog
):
    bad = lambda key: jax.random.bernoulli(jax.random.fold_in(key, 7), 0.4)
    spoil(monkeypatch, bad)
    options = {"method": "head", "epochs": 4, "save_every": 1}
    whole = finetune(tiny_settings(model, data, tmp_path / "whole", **options))
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(12)]
    skipped = [i + 1 for i in range(12) if bool(bad(keys[i]))]
    assert 2 <= len(skipped) <= 8
    rows = rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows if row.get("is_skipped")] == skipped
    assert (whole["steps"], whole["skipped_batches"]) == (
        12 - len(skipped),
        len(skipped),
    )
    assert len(updates_of(rows)) == whole["steps"]
    save = Checkpoints.save

    def die(self, state, at):
        save(self, state, at)
        if at.batches > 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", die)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_settings(model, data, tmp_path / "broken", **options))
    monkeypatch.setattr(Checkpoints, "save", save)
    again = tiny_settings(model, data, tmp_path / "broken", resume=True, **options)
    caplog.set_level("INFO", logger="sparse_jax")
    assert finetune(again)["skipped_batches"] == len(skipped)
    assert "resuming after update 7 of 12" in caplog.messages
    a, b = (tmp_path / name / "adapter.safetensors" for name in ("whole", "broken"))
    assert a.read_bytes() == b.read_bytes()
    losses = [
        [row.get("loss") for row in rows_of(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1]


def test_a_model_that_has_diverged_overwrites_no_checkpoint(
    model, data, tmp_path, monkeypatch
):
    saved = []
    save = Checkpoints.save
    keep = lambda self, state, at: (saved.append(at.batches), save(self, state, at))
    monkeypatch.setattr(Checkpoints, "save", keep)
    # Only the first three batches have a loss that is finite.
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(3)]
    good = [np.asarray(jax.random.key_data(key)) for key in keys]
    is_good = lambda key: [jnp.all(jax.random.key_data(key) == one) for one in good]
    spoil(monkeypatch, lambda key: ~jnp.any(jnp.stack(is_good(key))))
    settings = tiny_settings(
        model, data, tmp_path / "run", method="head", epochs=9, save_every=2
    )
    with pytest.raises(InputError, match="20 batches in a row .* after 3 updates"):
        finetune(settings)
    assert saved == [2, 3]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "2",
        "3",
    ]


def test_a_selection_has_a_row_and_a_time_of_its_own(model, data, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sparse_jax")
    settings = tiny_settings(model, data, tmp_path / "run", max_steps=2)
    metrics = finetune(settings)
    first, second, *_ = rows_of(tmp_path / "run")
    assert first.pop("seconds") == metrics["selection_seconds"] > 0
    assert first == {"step": 1, "is_selection": True}
    assert second["step"] == 1
    told = [record.getMessage() for record in caplog.records]
    # A tenth of the four maps of two layers, and the head, of 4,786 parameters.
    assert told.count("selecting the entries to train") == 1
    assert any(line.startswith("training sift: 530 of 4,786 par") for line in told)
    # The same without the head: 16 x 16 + 16 and 16 x 2 + 2.
    assert [line for line in told if line.startswith("selected 224 entries in ")]
    settings = tiny_settings(
        model, data, tmp_path / "other", method="head", max_steps=1
    )
    assert finetune(settings)["selection_seconds"] is None


def test_time_left_and_pace_leave_out_what_compiles(caplog):
    caplog.set_level(logging.INFO, "sparse_jax")
    with show_progress(total=10) as progress:
        progress.update(1, 2.0, 100, 500.0, is_compiling=True)
        progress.update(2, 2.0, 100, 4.0, is_compiling=False)
        progress.update(3, 2.0, 100, 500.0, is_compiling=True)
        progress.update(4, 2.0, 100, 8.0, is_compiling=False)
    first, second, _, last = [record.getMessage() for record in caplog.records]
    assert "tokens/s" not in first
    assert "left" not in first
    assert "25 tokens/s" in second
    assert second.endswith("32 s left")
    # 200 tokens in 12 seconds, and six updates of six seconds each.
    assert "17 tokens/s" in last
    assert last.endswith("36 s left")


def losses(*values):
    return [{"step": i, "loss": value} for i, value in enumerate(values, 1)]


def rising(*begin):
    """Returns five losses, five others, and the first by 0.06 higher."""
    return losses(*begin, *[0.7] * 5, *(loss + 0.06 for loss in begin))


@pytest.mark.parametrize(
    ("rows", "results", "expected"),
    [
        (losses(3.0, 2.0, 1.0), {"validation": {"loss": 1.0, "perplexity": 2.7}}, []),
        (losses(1.0), {"validation": {"accuracy": 0.5}}, []),
        (losses(2.0, None, 1.0), {}, []),
        (losses(None), {}, []),
        # Two batches, or means of two, say nothing.
        (losses(0.7, 1.5), {}, []),
        (losses(1, 2, 9, 9, 3, 2), {}, []),
        # The standard error of the rise is 0.055, then 0.004.
        (rising(0.6, 0.75, 0.55, 0.74, 0.66), {}, []),
        (
            rising(0.66, 0.67, 0.65, 0.66, 0.66),
            {},
            ["the loss ends at 0.72, above 0.66 where it began (means of 5 updates)"],
        ),
        # The means of two fall from 7 to 5.
        (
            losses(1, 13, 9, 9, 5, 5),
            {},
            ["the loss ends at 5, above 1 where it began:"],
        ),
        (losses(1, 3, 3, 3), {}, ["the loss ends at 3, above 1 where it began:"]),
        # One lucky batch is nothing to go by.
        (losses(1, 13, 9, 9, 5, 2), {}, []),
        (
            losses(3.0, 2.0, 1.0) + [{"step": 4, "is_skipped": True}],
            {},
            ["batches skipped at the end, as their loss is not finite: 1."],
        ),
        (
            losses(2.0, 1.0),
            {"validation": {"loss": math.nan, "perplexity": math.nan}},
            ["validation: not finite: loss, perplexity"],
        ),
        (
            losses(2.0, 1.0),
            {"test": {"loss": 4.5, "perplexity": 91.0}},
            ["test: the perplexity is 91, and that of guessing is 100"],
        ),
    ],
)
def test_what_went_wrong_is_said_at_the_end(rows, results, expected):
    lines = list(outcome_warnings(rows, results, vocab_size=100))
    assert len(lines) == len(expected)
    assert all(a.startswith(b) for a, b in zip(lines, expected, strict=True))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("part", ["values", "dense", "added"])
def test_an_adapter_that_is_not_finite_is_not_written(part, value):
    array = np.array([0.0, value], np.float32)
    parts = {part: {"w": {"a": array} if part == "added" else array}}
    with pytest.raises(InputError, match="`w(/a)?` must be finite after training"):
        require_finite(Adapter(**parts))
    require_finite(Adapter(values={"w": np.zeros(2, np.float32)}))


def test_a_summary_shows_runs_of_before_and_metrics_that_are_not_finite(
    model, data, tmp_path, capsys
):
    settings = tiny_settings(model, data, tmp_path / "run", method="head", max_steps=1)
    metrics = finetune(settings)
    before = {
        name: value
        for name, value in metrics.items()
        if name not in ("examples", "warnings", "selection_seconds")
    }
    print_summary(settings, before | {"eval": {"f1": None, "loss": math.nan}})
    assert capsys.readouterr().out.count("not finite") == 2
    print_summary(settings, metrics | {"warnings": ["a", "b"]})
    printed = capsys.readouterr().out
    assert "22 train, 13 validation" in printed
    assert "2, in metrics.json" in printed


def test_what_reading_and_long_compilations_leave_is_given_back(monkeypatch):
    given, listeners = [], []
    monkeypatch.setattr(progress, "_trim", lambda: given.append(1))
    name = "register_event_duration_secs_listener"
    monkeypatch.setattr(jax.monitoring, name, listeners.append)
    progress._listen.cache_clear()
    progress.release_freed_memory()
    progress.release_freed_memory()
    (listen,) = listeners
    assert len(given) == 2
    for seconds in (0.1, 2.0):
        listen(progress._COMPILED, seconds)
    listen("/jax/other", 2.0)
    assert len(given) == 3

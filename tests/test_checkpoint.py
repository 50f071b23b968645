"""Checkpoints: a run that was stopped ends like one that was not."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from tiny_text import text_settings, write_chats, write_decoder

from sparse_jax import Static, finetune
from sparse_jax.adapter.file import load_adapter
from sparse_jax.errors import InputError
from sparse_jax.training.checkpoint import Checkpoints
from sparse_jax.training.checkpoint_file import write_checkpoint
from sparse_jax.training.loop import Loop
from sparse_jax.training.stop_signals import stop_signals


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_decoder(folder / "model"), write_chats(folder / "chats.jsonl")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Returns the folder of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finetune(sift_settings(files, output))
    return output


def sift_settings(files, output, **changes):
    # Two of the seven matrices: each compiles a selection of its own.
    fields = {"method": "sift", "density": 0.1, "where": ("query", "down")}
    fields |= {"save_every": 1, "sampler": "ist", "active": 0.5}
    return text_settings(*files, output, **{**fields, **changes})


def stop_at(monkeypatch, settings, batches):
    """Runs until so many batches are used."""
    step = Loop._batch

    def stop(loop, state, at, batch):
        if at.batches == batches:
            raise KeyboardInterrupt
        return step(loop, state, at, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings)


def signal_at(monkeypatch, settings, batches, number, error):
    """Runs, and sends itself a signal within an update."""
    step = Loop._batch

    def send(loop, state, at, batch):
        if at.batches == batches:
            os.kill(os.getpid(), number)
        return step(loop, state, at, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_batch", send)
        with pytest.raises(error) as stop:
            finetune(settings)
    return stop.value


def steps_of(output):
    """Returns the steps of the checkpoints of a run."""
    found = (output / "checkpoints").iterdir()
    return sorted(int(path.name) for path in found)


def same_bytes(one, other):
    name = "adapter.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("batches", [0, pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.slow
def test_a_run_stopped_anywhere_ends_like_one_that_was_not(
    batches, files, whole, tmp_path, monkeypatch
):
    settings = sift_settings(files, tmp_path / "run")
    stop_at(monkeypatch, settings, batches)
    finetune(replace(settings, resume=True))
    assert same_bytes(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_from_the_state_of_layers_that_are_never_trained(
    files, tmp_path, monkeypatch
):
    static = {"sampler": "static", "layers": (2,), "active": 0.25}
    whole, settings = (
        sift_settings(files, tmp_path / name, **static) for name in ("whole", "run")
    )
    finetune(whole)
    with monkeypatch.context() as patch:
        # As versions wrote it that kept the state of all layers.
        every = property(lambda rule: tuple(range(rule.num_layers)))
        patch.setattr(Static, "reachable", every)
        stop_at(monkeypatch, settings, 2)
    finetune(replace(settings, resume=True))
    assert same_bytes(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_optimizer_only(files, tmp_path, monkeypatch):
    given = {"learning_rate": None, "optimizer": optax.sgd(0.1)}
    settings = sift_settings(files, tmp_path / "run", **given)
    stop_at(monkeypatch, settings, 1)
    resumed = replace(settings, resume=True, optimizer=optax.adamw(1e-3))
    with pytest.raises(InputError, match="`optimizer` must be that of the run to res"):
        finetune(resumed)
    assert steps_of(tmp_path / "run") == [1]
    again = {"output": str(tmp_path / "run"), "resume": True}
    with pytest.raises(InputError, match="A file cannot hold an optimizer: pass it"):
        finetune(**again)
    assert finetune(**again, optimizer=optax.sgd(0.1))["steps"] == 4


@pytest.mark.parametrize(
    ("number", "error", "batches", "saved"),
    [
        pytest.param(signal.SIGTERM, SystemExit, 1, [2], marks=pytest.mark.slow),
        (signal.SIGINT, KeyboardInterrupt, 2, [3]),
        # The last update: the end of the epoch is saved, its evaluation is not begun.
        (signal.SIGTERM, SystemExit, 3, [4]),
    ],
)
def test_a_signal_saves_before_it_stops(
    number, error, batches, saved, files, whole, tmp_path, monkeypatch
):
    settings = sift_settings(files, tmp_path / "run", save_every=100)
    stop = signal_at(monkeypatch, settings, batches, number, error)
    assert getattr(stop, "code", 143) == 143
    assert steps_of(tmp_path / "run") == saved
    finetune(replace(settings, resume=True))
    assert same_bytes(whole, tmp_path / "run")
    rows = [(run / "metrics.jsonl").read_text() for run in (whole, tmp_path / "run")]
    assert [text.count("split") for text in rows] == [1, 1]


def test_a_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested() == signal.SIGTERM
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_stops_an_evaluation_at_once():
    stop = pytest.raises(KeyboardInterrupt)
    with stop_signals() as signals, signals.at_once(), stop:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_state_is_saved_before_it_is_evaluated(files, tmp_path, monkeypatch):
    options = {"save_every": 100, "eval_every": 2}
    settings = sift_settings(files, tmp_path / "run", **options)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "_evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings)
    assert steps_of(tmp_path / "run") == [2]


def test_a_killed_run_ends_like_one_that_was_not(files, whole, tmp_path):
    """SIGKILL comes whenever it comes: here while a checkpoint may be half written."""
    settings = sift_settings(files, tmp_path / "run")
    code = (
        "import time\n"
        "from sparse_jax import Settings, finetune\n"
        "from sparse_jax.training.loop import Loop\n"
        "step = Loop._batch\n"
        "Loop._batch = lambda *a: (time.sleep(0.3), step(*a))[1]\n"
        f"finetune({settings!r})\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    folder = tmp_path / "run" / "checkpoints"
    while time.monotonic() < until and not (folder / "2").exists():
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert (folder / "2").exists()
    assert not (tmp_path / "run" / "metrics.json").exists()
    finetune(replace(settings, resume=True))
    assert same_bytes(whole, tmp_path / "run")


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked(keep, files, tmp_path, monkeypatch):
    settings = sift_settings(files, tmp_path / "run", keep=keep)
    signal_at(monkeypatch, settings, 3, signal.SIGTERM, SystemExit)
    assert steps_of(tmp_path / "run") == list(range(5 - keep, 5))


@pytest.mark.parametrize("name", ["model", "data"])
def test_a_run_is_not_resumed_with_other_files(name, files, tmp_path, monkeypatch):
    model, data = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(files[0], model)
    shutil.copy(files[1], data)
    settings = sift_settings((model, data), tmp_path / "run")
    stop_at(monkeypatch, settings, 1)
    if name == "data":
        data.write_text(data.read_text().replace("red", "green"))
    else:
        write_decoder(model, seed=1)
    message = f"`{name}` must be what it was in the run to resume"
    with pytest.raises(InputError, match=message):
        finetune(replace(settings, resume=True))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def garble(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


# More kinds of damage are in test_checkpoint_damage.py; here the run is finished.
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    files, whole, tmp_path, monkeypatch, caplog
):
    settings = sift_settings(files, tmp_path / "run")
    stop_at(monkeypatch, settings, 3)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert steps_of(tmp_path / "run") == [2, 3]
    garble(checkpoints / "3" / "trained" / "manifest.ocdbt")
    with caplog.at_level(logging.WARNING):
        finetune(replace(settings, resume=True))
    assert f"{checkpoints / '3'} is damaged" in caplog.text
    assert same_bytes(whole, tmp_path / "run")


def test_a_run_without_a_checkpoint_that_can_be_read_is_refused(
    files, tmp_path, monkeypatch
):
    settings = sift_settings(files, tmp_path / "run", keep=1)
    stop_at(monkeypatch, settings, 2)
    for path in (tmp_path / "run" / "checkpoints").glob("*/told/metadata"):
        truncate(path)
    with pytest.raises(InputError, match="must have a checkpoint that can be read"):
        finetune(replace(settings, resume=True))


def test_a_disk_without_space_loses_no_run(files, whole, tmp_path, monkeypatch, caplog):
    """Checkpoints fail from the second on, also the one after a signal."""
    settings = sift_settings(files, tmp_path / "run")

    def full(folder, *args):
        if folder.name != "1":
            raise OSError(28, "No space left on device")
        write_checkpoint(folder, *args)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("sparse_jax.training.checkpoint.write_checkpoint", full)
        signal_at(monkeypatch, settings, 2, signal.SIGTERM, SystemExit)
        assert steps_of(tmp_path / "run") == [1]
        finetune(replace(settings, resume=True))
    reports = [line for line in caplog.messages if "could not be written" in line]
    assert len(reports) == 2 + 3
    assert "([Errno 28] No space left on device); the run continues" in reports[0]
    assert "`resume=True`" in reports[0]
    assert same_bytes(whole, tmp_path / "run")


MESHES = {
    "one device": None,
    "fsdp": "fsdp=8",
    "all": "data=2,fsdp=2,tensor=2",
}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("one device", "fsdp", marks=pytest.mark.slow),
        pytest.param("all", "one device", marks=pytest.mark.slow),
        ("all", "fsdp"),
    ],
)
@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(
    before, after, files, whole, tmp_path, monkeypatch
):
    settings = sift_settings(files, tmp_path / "run", mesh=MESHES[before])
    stop_at(monkeypatch, settings, 2)
    metrics = finetune(replace(settings, resume=True, mesh=MESHES[after]))
    expected = json.loads((whole / "metrics.json").read_text())
    np.testing.assert_allclose(
        metrics["eval"]["loss"], expected["eval"]["loss"], rtol=1e-4
    )
    first, second = load_adapter(whole), load_adapter(tmp_path / "run")
    for leaf, support in first.support.items():
        np.testing.assert_array_equal(support, second.support[leaf])
        np.testing.assert_allclose(first.values[leaf], second.values[leaf], atol=1e-3)


def test_what_is_saved_is_the_state_before_the_next_step(files, tmp_path, monkeypatch):
    seen = {}
    save = Checkpoints.save

    def copying(checkpoints, state, position):
        arrays = jax.tree.map(np.array, jax.tree.leaves(state.params))
        seen[position.batches] = arrays
        save(checkpoints, state, position)

    monkeypatch.setattr(Checkpoints, "save", copying)
    settings = sift_settings(files, tmp_path / "run", sampler=None, active=0.25)
    stop_at(monkeypatch, settings, 3)
    read = Checkpoints.restore

    def checking(checkpoints, state, *begin):
        state, position = read(checkpoints, state, *begin)
        for stored, known in zip(
            jax.tree.leaves(state.params), seen[position.batches], strict=True
        ):
            np.testing.assert_array_equal(stored, known)
        return state, position

    monkeypatch.setattr(Checkpoints, "restore", checking)
    finetune(replace(settings, resume=True))

"""Run directories: one run at a time, and nothing is lost where writing fails."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_jax import Settings
from sparse_jax.errors import InputError
from sparse_jax.training import run_directory
from sparse_jax.training.output_folder import (
    FolderLock,
    require_unlocked,
    require_usable,
)
from sparse_jax.training.run_directory import RunDirectory

CONFIG = {"base_hash": "1", "examples_hash": "2"}
FULL = OSError(errno.ENOSPC, "No space left on device")


def settings(output, **changes):
    return Settings(model="m", task="sst2", output=str(output), **changes)


def create(output, **changes):
    return RunDirectory.create(settings(output, **changes), CONFIG)


def steps_in(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch):
    monkeypatch.setattr(run_directory, "_RETRY_AFTER", 0.0)


@pytest.mark.parametrize("changes", [{"overwrite": True}, {"resume": True}, {}])
def test_a_second_run_in_a_folder_is_refused(changes, tmp_path):
    first = create(tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_bytes()
    message = "must be a folder that no other run writes to, got .*in use by 'process "
    with pytest.raises(InputError, match=message):
        create(tmp_path / "run", **changes)
    with pytest.raises(InputError, match=message):
        require_unlocked(tmp_path / "run")
    first.add_row({"step": 1})
    assert steps_in(tmp_path / "run") == [1]
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    first.close()
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "metrics.jsonl"]
    create(tmp_path / "run", overwrite=True).close()


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from sparse_jax.training.output_folder import FolderLock\n"
        "lock = FolderLock(pathlib.Path(sys.argv[1]))\n"
        "lock.acquire()\n"
        "print('locked', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "locked\n"
    try:
        with pytest.raises(InputError, match=f"in use by 'process {run.pid} on "):
            FolderLock(tmp_path).acquire()
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
    require_unlocked(tmp_path)
    create(tmp_path).close()


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def flock(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    create(tmp_path / "run").close()
    assert "run cannot be locked (Operation not supported)" in caplog.text


def test_rows_that_cannot_be_written_are_written_later(tmp_path, caplog):
    directory = create(tmp_path)
    directory.add_row({"step": 1})
    # A folder of that name is in the way.
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    directory.add_row({"step": 2})
    directory.add_row({"step": 3})
    (line,) = caplog.messages
    assert "the run continues and tries again" in line
    assert "`resume=True`" in line
    (tmp_path / "metrics.jsonl").rmdir()
    directory.add_row({"step": 4})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    # A disk that becomes full within a row.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"st')
    directory.add_row({"step": 5})
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    directory.close()


def test_a_folder_that_is_removed_is_made_again(tmp_path):
    directory = create(tmp_path / "run")
    directory.add_row({"step": 1})
    config = (tmp_path / "run" / "config.json").read_bytes()
    shutil.rmtree(tmp_path / "run")
    directory.add_row({"step": 2})
    assert steps_in(tmp_path / "run") == [1, 2]
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    # The lock is made again, too.
    with pytest.raises(InputError, match="no other run writes to"):
        create(tmp_path / "run", overwrite=True)
    shutil.rmtree(tmp_path / "run")
    assert directory.add_adapter(lambda path: path.write_bytes(b"1234")) == 4
    directory.finish({"steps": 2})
    assert steps_in(tmp_path / "run") == [1, 2]
    directory.close()


def test_a_folder_that_another_run_took_is_left_to_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = create(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    other = create(tmp_path / "run", seed=1)
    other.add_row({"step": 7})
    directory.add_row({"step": 1})
    assert "no other run writes to" in caplog.text
    with pytest.raises(InputError, match=r"The adapter is in `.*sparse_jax-"):
        directory.add_adapter(lambda path: path.write_bytes(b"1234"))
    other.close()
    directory.add_row({"step": 2})
    assert steps_in(tmp_path / "run") == [7]
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    directory.close()


def test_an_adapter_is_tried_twice_and_then_saved_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory, tried = create(tmp_path / "run"), []

    def save(path, failures):
        tried.append(path)
        if len(tried) <= failures:
            raise FULL
        return path.write_bytes(b"1234")

    assert directory.add_adapter(lambda path: save(path, 1)) == 4
    assert len(tried) == 2
    tried.clear()
    with pytest.raises(InputError) as error:
        directory.add_adapter(lambda path: save(path, 2))
    assert tried[2].read_bytes() == b"1234"
    assert "No space left on device" in str(error.value)
    assert f"The adapter is in `{tried[2].parent}`" in str(error.value)
    assert "`resume=True`" in str(error.value)
    tried.clear()
    with pytest.raises(InputError, match="could not be written elsewhere either"):
        directory.add_adapter(lambda path: save(path, 3))
    directory.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_at_the_end_keeps_the_checkpoints(tmp_path):
    directory = create(tmp_path)
    directory.checkpoints.mkdir()
    (tmp_path / ".metrics.json.part").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"No space left on device\. .*`resume=True`"):
        directory.finish({"steps": 1})
    assert directory.checkpoints.exists()
    assert not (tmp_path / "metrics.json").exists()
    directory.finish({"steps": 1})
    assert not directory.checkpoints.exists()
    directory.close()


def test_a_full_disk_at_the_start_is_refused(tmp_path, monkeypatch):
    def write(path, value):
        raise FULL

    monkeypatch.setattr(run_directory, "write_json", write)
    with pytest.raises(InputError, match="must be a folder that can be written, got"):
        create(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, caplog):
    def draw(path):
        raise FULL

    RunDirectory(tmp_path).draw("curve.png", draw)
    assert "curve.png was not drawn (No space left" in caplog.text


@pytest.mark.parametrize(
    "name", ["a run", "läuft", "two\nlines", "-o", "link", "x/y/z"]
)
def test_an_output_folder_may_have_any_name(name, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    directory = create(tmp_path / name)
    directory.add_row({"step": 1})
    directory.close()
    assert steps_in(tmp_path / name) == [1]


@pytest.mark.parametrize("name", ["", " ", "x" * 300, "a\0b"])
def test_an_output_without_a_name_is_refused(name):
    with pytest.raises(InputError, match="`output` must name a folder, got '"):
        require_usable(settings(name))


def test_the_files_of_a_model_are_not_overwritten(tmp_path):
    model = json.dumps({"model_type": "bert"})
    (tmp_path / "config.json").write_text(model)
    given = Settings(
        model=str(tmp_path), task="sst2", output=str(tmp_path), overwrite=True
    )
    with pytest.raises(InputError, match="`output` must not be the folder of `model`"):
        require_usable(given)
    with pytest.raises(InputError, match=r"whose config.json may be removed, got"):
        create(tmp_path, overwrite=True)
    assert (tmp_path / "config.json").read_text() == model


def test_a_damaged_run_may_be_overwritten(tmp_path):
    create(tmp_path).close()
    (tmp_path / "config.json").write_bytes(b"\xff{")
    (tmp_path / ".adapter.safetensors.part").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    create(tmp_path, overwrite=True).close()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "notes.txt"]


def test_a_setting_of_another_version_is_refused(tmp_path):
    create(tmp_path).close()
    config = json.loads((tmp_path / "config.json").read_text())
    config["settings"] |= {"momentum": 0.9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="settings that this version knows, got mom"):
        require_usable(settings(tmp_path, resume=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 1, "loss": "\xff"}', "which it is not: 'utf-8' codec"),
        (b'{"step": 1, "loss": ' + b"9" * 5000 + b"}", "which it is not: Exceeds the"),
        (b"[" * 10_000, "which it is not: maximum recursion depth"),
        (b'{"step": 1, "loss": NaN}', "which it is not: NaN is not JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"loss": 1.0}', "must have a `step`, a whole number, got None"),
        (b'{"step": "1"}', "must have a `step`, a whole number, got '1'"),
        (b'{"step": true}', "must have a `step`, a whole number, got True"),
        (b'{"step": -1}', "must have a `step`, a whole number, got -1"),
        (b'{"step": 1, "split": 5}', "must have a name as `split`, got 5"),
        (b'{"step": 1, "split": "test", "f1": []}', r"number as `f1`, got \[\]"),
        (b'{"step": 1, "loss": 1.0}', "must have a number as `seconds`, got None"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_refused_by_its_line(line, message, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b"\n")
    with pytest.raises(InputError, match=f"metrics.jsonl` line 2 .*{message}"):
        RunDirectory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "does not. Put it back"),
        ({"eval": [1]}, r"must have metrics as `eval`, got \[1\]"),
        ({"eval": {"loss": "low"}}, "must have metrics as `eval`"),
        ({"splits": {"test": [1]}}, r"must have metrics as `eval`, got \[1\]"),
        ({"steps": None}, "must have a number as `steps`, got None"),
        ({"total_parameters": 0}, "must have a number as `total_parameters`, got 0"),
    ],
)
def test_a_run_without_its_results_is_not_finished(changes, message, tmp_path):
    counts = (
        "adapter_bytes", "optimizer_bytes", "peak_memory_bytes", "seconds_per_step",
        "skipped_batches", "steps", "total_parameters", "trained_parameters",
        "trained_parameters_without_head",
    )  # fmt: skip
    metrics = {"eval": {"loss": None}, **dict.fromkeys(counts, 4), **changes}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=message):
        RunDirectory(tmp_path).finished()
    if not changes:
        (tmp_path / "adapter.safetensors").write_bytes(b"1234")
        assert RunDirectory(tmp_path).finished() == metrics


def test_a_second_line_of_a_failure_is_not_logged(tmp_path, caplog):
    directory = create(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            directory.add_row({"step": step})
        (tmp_path / "metrics.jsonl").rmdir()
        assert directory.write_rows()
    assert [line.endswith("could be written again") for line in caplog.messages] == [
        False,
        True,
    ]
    directory.close()

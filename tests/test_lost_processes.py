"""Processes that died are named, in bounded time."""

import subprocess
import sys
import threading
import time

import pytest
from test_processes import free_port, options
from tiny_text import text_settings, write_chats, write_decoder

from sparse_jax.sharding import processes as lost


class Store:
    """The store of three processes, of which one gives no sign of life any more."""

    def __init__(self, **silent):
        self.values = {f"{lost._FOLDER}{n[1:]}": v for n, v in silent.items()}
        self.now = 0

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, folder):
        self.now += 1
        self.values[f"{folder}1"] = str(self.now)
        return list(self.values.items())


class Closed:
    def key_value_set(self, key, value, allow_overwrite):
        raise RuntimeError("UNAVAILABLE")

    def key_value_dir_get(self, folder):
        raise RuntimeError("UNAVAILABLE")


class Left(BaseException):
    pass


@pytest.fixture
def three(monkeypatch):
    """Gives this process, the first of three, a store."""

    def give(store):
        monkeypatch.setattr(lost.distributed.global_state, "client", store)
        return store

    def leave(found):
        raise Left(found)

    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr(lost, "leave", leave)
    for name in ("_SHORT", "_LONG", "_EVERY"):
        monkeypatch.setattr(lost, name, 0.01)
    return give


def test_after_a_failure_the_silent_ones_are_named(three):
    three(Store(p0="1", p2="5"))
    assert lost.lost_processes() == [2]
    three(Store(p0="1"))
    assert lost.lost_processes() == []
    three(Closed())
    assert lost.lost_processes() == [0]


def test_a_single_process_loses_nobody():
    assert lost.lost_processes() == []


def test_a_process_that_waits_leaves_those_that_died(three):
    store = three(Store(p2="5"))
    with pytest.raises(Left, match=r"\[2\]"):
        lost._watch(store, 0, threading.Event())
    store = three(Closed())
    with pytest.raises(Left, match=r"\[0\]"):
        lost._watch(store, 1, threading.Event())


def test_a_process_that_ended_by_itself_is_not_lost(three):
    store, ended = three(Store(p2="done")), threading.Event()
    threading.Timer(0.3, ended.set).start()
    lost._watch(store, 0, ended)
    assert ended.is_set()


@pytest.mark.slow
def test_the_other_process_ends_when_one_is_killed(tmp_path):
    files = write_decoder(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl")
    given = options(text_settings(*files, tmp_path / "run"), epochs=200, save_every=1)
    given += ["--devices", "4", "--coordinator", f"localhost:{free_port()}"]
    command = [sys.executable, "-m", "sparse_jax.cli.main", "finetune", *given]
    first, second = (
        subprocess.Popen(
            [*command, "--processes", "2", "--process", str(i)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    )
    try:
        until = time.monotonic() + 400
        saved = tmp_path / "run" / "checkpoints" / "3"
        while time.monotonic() < until and not saved.exists():
            time.sleep(0.1)
        second.kill()
        # Busy cores take their time over it.
        error = first.communicate(timeout=240)[1]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 1
    assert "error: process 1 of 2 is lost." in error
    assert "--resume" in error
    assert "Traceback" not in error

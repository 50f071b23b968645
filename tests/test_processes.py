"""Two processes that run one program, each with its own simulated devices."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny_text import text_settings, write_chats, write_decoder

from sparse_jax import finetune
from sparse_jax.adapter.file import load_adapter
from sparse_jax.errors import InputError
from sparse_jax.sharding.processes import join_processes, require_agreement


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_two(arguments, program=("-m", "sparse_jax.cli.main")):
    """Runs the command line twice, with what differs between the two."""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, *program, "finetune", *own]
            + ["--devices", "4", "--coordinator", f"localhost:{port}"]
            + ["--processes", "2", "--process", str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, own in enumerate(arguments)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    return [(p.returncode, *output) for p, output in zip(running, outputs, strict=True)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_decoder(folder / "model"), write_chats(folder / "chats.jsonl")


# Every matrix compiles a selection of its own, here three times.
WHERE = "query|down"


def options(settings, **changes):
    """Returns the options of the command for settings."""
    fields = {
        "model": settings.model,
        "data": settings.data,
        "output": settings.output,
        "task": "causal",
        "method": "sift",
        "density": 0.1,
        "where": WHERE,
        "sampler": "ist",
        "active": 0.5,
        "batch_size": 8,
        "epochs": 1,
        "max_length": 16,
        "held_out": 0.2,
        "learning_rate": 3e-2,
        "mesh": "data=2,fsdp=2,tensor=2",
        **changes,
    }
    return [
        word
        for name, value in fields.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(files, tmp_path):
    changes = {"method": "sift", "density": 0.1, "where": (WHERE,)}
    changes |= {"sampler": "ist", "active": 0.5}
    one = finetune(text_settings(*files, tmp_path / "one", **changes))
    settings = text_settings(*files, tmp_path / "two")
    first, second = run_two([options(settings)] * 2)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    # The first one tells what came out.
    assert "trained parameters" in first[1]
    assert "trained parameters" not in second[1]
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    np.testing.assert_allclose(two["eval"]["loss"], one["eval"]["loss"], rtol=1e-4)
    adapters = [load_adapter(tmp_path / name) for name in ("one", "two")]
    for leaf, support in adapters[0].support.items():
        np.testing.assert_array_equal(support, adapters[1].support[leaf])


STOPPED = """
from sparse_jax.cli.main import main
from sparse_jax.training.loop import Loop
step = Loop._batch

def stop(loop, state, at, batch):
    if at.batches == 2:
        raise SystemExit(7)
    return step(loop, state, at, batch)

Loop._batch = stop
main()
"""


@pytest.mark.slow
def test_two_processes_go_on_from_the_checkpoint_of_both(files, tmp_path):
    whole, parts = (
        options(text_settings(*files, tmp_path / name), save_every=1)
        for name in ("whole", "parts")
    )
    assert [code for code, *_ in run_two([whole] * 2)] == [0, 0]
    assert [code for code, *_ in run_two([parts] * 2, ["-c", STOPPED])] == [7, 7]
    steps = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir())
    assert steps == ["1", "2"]
    first, second = run_two([[*parts, "--resume"]] * 2)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "damaged" not in first[2] + second[2]
    one, two = (tmp_path / n / "adapter.safetensors" for n in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


def test_processes_that_disagree_all_stop(files, tmp_path):
    settings = text_settings(*files, tmp_path / "run")
    both = [options(settings), options(settings, density=0.2)]
    for code, _, error in run_two(both):
        assert code == 2
        assert "`settings` must be the same on every process" in error
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 2}, "must be given together, got None, 2 and None"),
        (
            {"coordinator": "localhost:1", "processes": 2, "process": 2},
            r"`process` must be in \[0, 2\), got 2",
        ),
    ],
)
def test_half_of_what_joins_processes_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        join_processes(**given)


def test_a_single_process_agrees_with_itself():
    require_agreement("settings", {"a": 1})

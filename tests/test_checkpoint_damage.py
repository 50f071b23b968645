"""Run directories with damaged or foreign files: refused, or nothing is lost."""

import json
import logging
import random
import shutil
import zlib
from contextlib import closing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_text import text_settings, write_chats, write_decoder

from sparse_jax import finetune
from sparse_jax.errors import InputError
from sparse_jax.training.checkpoint import Checkpoints
from sparse_jax.training.checkpoint_file import read_arrays, read_record
from sparse_jax.training.finetune import _tuner
from sparse_jax.training.job import make_job
from sparse_jax.training.loop import Loop
from sparse_jax.training.run_directory import RunDirectory
from sparse_jax.training.surroundings import surroundings


class Stopped:
    """A run stopped after three updates, and what a continuation would start from."""

    def __init__(self, folder, **changes):
        files = write_decoder(folder / "model"), write_chats(folder / "chats.jsonl")
        fields = {"method": "sift", "density": 0.1, "sampler": "ist", "active": 0.5}
        fields |= {"save_every": 1, "resume": False, **changes}
        self.path = folder / "run"
        self.settings = text_settings(*files, self.path, **fields)
        step = Loop._batch

        def stop(loop, state, at, batch):
            if at.batches == 3:
                raise KeyboardInterrupt
            return step(loop, state, at, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "_batch", stop)
            with pytest.raises(KeyboardInterrupt):
                finetune(self.settings)
        self.job = make_job(self.settings)
        self.tuner = _tuner(self.job, 4)
        params = jax.tree.map(jnp.copy, self.job.base.params)
        self.state = self.job.base.devices.runner(self.tuner).init(
            params, jax.random.key(0)
        )
        self.expected = [self.resumed(self.copied(folder / "three"))]
        shutil.rmtree(folder / "three" / "checkpoints" / "3")
        self.expected.append(self.resumed(folder / "three"))

    def copied(self, folder):
        """Returns a copy of the run directory."""
        return shutil.copytree(self.path, folder)

    def resumed(self, folder):
        """Returns what a resumed run would start from: state, position and rows."""
        settings = replace(self.settings, output=str(folder), resume=True)
        directory = RunDirectory.create(settings, surroundings(self.job))
        with closing(directory), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "_rebuilt", lambda self, state, trained: trained)
            checkpoints = Checkpoints(directory, self.tuner, self.job.base.devices)
            state, at = checkpoints.restore(self.state)
            directory.rewind(at.batches)
        numbers = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in plain(state)]
        return at, numbers, (folder / "metrics.jsonl").read_bytes()


def plain(state):
    leaves = jax.tree.leaves(state)
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return [jax.random.key_data(x) if is_key(x) else x for x in leaves]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return Stopped(tmp_path_factory.mktemp("stopped"))


def rewrite(path, **changes):
    """Changes what a checkpoint says about itself."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        words = json.loads(file.metadata()["sparse_jax"])
    for name, change in changes.items():
        words[name] = change(words[name])
    save_file(tensors, path, metadata={"sparse_jax": json.dumps(words)})


def garble(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def at_edited(**changes):
    return lambda path: rewrite(path, position=lambda at: {**at, **changes})


def with_tensors_of_the_step_before(path):
    with safe_open(path.parents[1] / "2" / path.name, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


DAMAGES = {
    "file truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "file emptied": lambda path: path.write_bytes(b""),
    "file garbled": garble,
    "file of the step before": lambda path: shutil.copy(
        path.parents[1] / "2" / path.name, path
    ),
    "arrays of the step before": with_tensors_of_the_step_before,
    "batches edited": at_edited(batches=2),
    "skipped edited": at_edited(skipped=1),
    "selection edited": at_edited(is_selected=False),
    "shapes edited": lambda path: rewrite(path, shapes=lambda shapes: shapes[::-1]),
    "names edited": lambda path: rewrite(path, names=lambda names: names[::-1]),
    "run edited": lambda path: rewrite(path, run=lambda run: ""),
    "rows edited": lambda path: rewrite(path, rows=lambda rows: ""),
    "cuts edited": lambda path: rewrite(path, cuts=lambda cuts: {"layers": [[], []]}),
    "nothing said": lambda path: save_file({}, path),
    "nested too deep": lambda path: save_file(
        {}, path, metadata={"sparse_jax": "[" * 100_000}
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_not_used(name, stopped, tmp_path, caplog):
    run = stopped.copied(tmp_path / "run")
    DAMAGES[name](run / "checkpoints" / "3" / "0.safetensors")
    with caplog.at_level(logging.WARNING):
        assert stopped.resumed(run) == stopped.expected[1]
    (line,) = caplog.messages
    assert line.startswith(f"the checkpoint {run / 'checkpoints' / '3'} is damaged (")
    assert "\n" not in line
    assert not (run / "checkpoints" / "3").exists()


def test_a_checkpoint_of_another_run_is_not_used(stopped, tmp_path, caplog):
    other = Stopped(tmp_path, seed=1)
    run = stopped.copied(tmp_path / "mixed")
    shutil.rmtree(run / "checkpoints" / "3")
    shutil.copytree(other.path / "checkpoints" / "3", run / "checkpoints" / "3")
    assert stopped.resumed(run) == stopped.expected[1]
    assert "it belongs to another run, or config.json was changed" in caplog.text
    # Nor are the rows of another run.
    run = stopped.copied(tmp_path / "rows")
    shutil.copy(other.path / "metrics.jsonl", run / "metrics.jsonl")
    with pytest.raises(InputError, match="must have a checkpoint that can be read"):
        stopped.resumed(run)
    assert "it does not belong to the rows in metrics.jsonl" in caplog.text


def test_a_run_whose_last_rows_are_lost_goes_on_before_them(stopped, tmp_path):
    run = stopped.copied(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    assert stopped.resumed(run) == stopped.expected[1]


def write_orbax(folder, position):
    """Rewrites a checkpoint as earlier versions did."""
    import orbax.checkpoint as ocp

    record = read_record(folder)
    arrays = read_arrays(folder, record)
    stored = {str(i): array for i, array in enumerate(arrays)}
    told = {
        "position": position,
        "cuts": record.cuts,
        "arrays": {n: [list(a.shape), str(a.dtype)] for n, a in stored.items()},
        "checksums": {n: zlib.crc32(a.tobytes()) for n, a in stored.items()},
    }
    shutil.rmtree(folder)
    args = ocp.args.Composite(
        trained=ocp.args.StandardSave(stored), told=ocp.args.JsonSave(told)
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(folder, args=args)


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, 3),
        ({"batches": 2}, 2),
        ({"is_selected": False}, 2),
        ({"skipped": 1}, 2),
        ({"batches": 3, "skipped": 3}, 2),
    ],
)
def test_a_checkpoint_of_an_earlier_version_is_read(changes, step, stopped, tmp_path):
    run = stopped.copied(tmp_path / "run")
    position = {"batches": 3, "skipped": 0, "is_selected": True, **changes}
    write_orbax(run / "checkpoints" / "3", position)
    assert stopped.resumed(run) == stopped.expected[3 - step]


def edited(rng, value):
    """Returns a JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != name}
        return rest if rng.random() < 0.2 else {**value, name: edited(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], edited(rng, value[i]), *value[i + 1 :]]
    return rng.choice(
        [None, True, False, 0, 1, -1, 2**70, 0.5, float("nan"), float("inf"), "",
         "\x1b[2J", [], {}, [value], {"a": value}, [[]] * 3, "x" * 5000]
    )  # fmt: skip


def mutated(rng, content):
    """Returns the bytes of a file with something wrong."""
    kind, at = rng.randrange(6), rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 2:
        other = rng.choice(
            [b"[" * 20_000, b"9" * 5000, b"\xff", b"\n", b"\0", b"1e999"]
        )
        return content[:at] + other + content[at:]
    if kind == 3:
        end = at + rng.randrange(1, 60)
        return content[:at] + content[end:]
    lines = content.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind == 4:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines[i : i + 1] = []
    return b"\n".join(lines)


def mutate(rng, run):
    """Changes one file of a run directory at random."""
    files = [path for path in run.rglob("*") if path.is_file()]
    path = rng.choice(sorted(files))
    content = path.read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(mutated(rng, content))
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            names = list(json.loads(file.metadata()["sparse_jax"]))
        rewrite(path, **{rng.choice(names): lambda value: edited(rng, value)})
    elif path.suffix == ".jsonl":
        lines = content.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(edited(rng, json.loads(lines[i]))).encode()
        path.write_bytes(b"\n".join([*lines, b""]))
    else:
        path.write_text(json.dumps(edited(rng, json.loads(content))))


def survives(stopped, seed, folder):
    """Changes something, and checks that a resumed run loses nothing in silence."""
    run = stopped.copied(folder)
    mutate(random.Random(seed), run)
    try:
        found = stopped.resumed(run)
    except InputError as error:
        assert len(str(error)) < 600, seed
        assert str(error).isprintable(), seed
    else:
        assert found in stopped.expected, seed
    shutil.rmtree(run)


def test_no_change_to_a_file_changes_what_a_run_resumes_from(stopped, tmp_path):
    for seed in range(200):
        survives(stopped, seed, tmp_path / "run")

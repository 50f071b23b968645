"""Runs that go on from an adapter: where they start, and what they write."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import tiny_settings, write_files

from sparse_jax import (
    Adapter,
    InputError,
    apply_adapter,
    evaluate_adapter,
    finetune,
    from_pretrained,
    load_adapter,
    save_adapter,
)
from sparse_jax.training.start import with_start

QUERY = "layers/attention/query/kernel"
SIFT = {"method": "sift", "density": 0.1, "where": ("attention/query/kernel",)}
LORA = {"method": "lora", "rank": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def train(files, output, **options):
    finetune(tiny_settings(**files, output=output, **options))
    return str(output)


@pytest.fixture(scope="module")
def old(files, tmp_path_factory):
    """A run of SIFT, and one of LoRA."""
    folder = tmp_path_factory.mktemp("old")
    sift = train(files, folder / "sift", **SIFT, max_steps=3)
    return {"sift": sift, "lora": train(files, folder / "lora", **LORA, max_steps=3)}


def merged(files, run):
    adapter = load_adapter(run)
    model, params = from_pretrained(
        files["model"], labels=adapter.labels, key=jax.random.key(0)
    )
    return apply_adapter(params, adapter, model=model)[0]


def reports(run):
    return json.loads(Path(run, "metrics.json").read_text())["eval"]


def first_loss(run):
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return next(row["loss"] for row in map(json.loads, lines) if "tokens" in row)


@pytest.mark.slow
def test_sift_on_sift_holds_both(files, old, tmp_path):
    more = {**SIFT, "score": "magnitude", "where": ("attention/(query|key)/kernel",)}
    run = train(files, tmp_path / "run", **more, adapter=old["sift"], max_steps=2)
    before, after = load_adapter(old["sift"]), load_adapter(run)
    assert (before.word, after.word) == ("sift", "combined")
    for first, both in zip(before.support[QUERY], after.support[QUERY], strict=True):
        assert np.isin(first, both).all() and first.size < both.size
    assert "layers/attention/key/kernel" in after.support
    # Entries that the second run did not choose are as the first left them.
    rows = [np.asarray(merged(files, r)["layers"]["attention"]["query"]["kernel"])
            for r in (old["sift"], run)]  # fmt: skip
    was, now = (row.reshape(2, -1) for row in rows)
    base = from_pretrained(files["model"], num_labels=2, key=jax.random.key(0))[1]
    start = np.asarray(base["layers"]["attention"]["query"]["kernel"]).reshape(2, -1)
    kept = (was != start) & (was == now)
    assert kept.any() and ((now != start) & (was == start)).any()
    assert evaluate_adapter(run, data=str(files["data"])) == reports(run)


@pytest.mark.slow
def test_an_adapter_without_updates_to_come_is_where_the_run_starts(
    files, old, tmp_path
):
    options = {**SIFT, "learning_rate": 1e-30, "max_steps": 1}
    run = train(files, tmp_path / "run", **options, adapter=old["sift"])
    for one, other in zip(
        jax.tree.leaves(merged(files, old["sift"])),
        jax.tree.leaves(merged(files, run)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-7)
    assert first_loss(run) < first_loss(old["sift"])


@pytest.mark.slow
def test_lora_goes_on_from_its_arrays(files, old, tmp_path):
    options = {**LORA, "learning_rate": 1e-30, "max_steps": 1}
    run = train(files, tmp_path / "run", **options, adapter=old["lora"])
    before, after = load_adapter(old["lora"]), load_adapter(run)
    assert after.word == "lora" and after.method == before.method
    for site, pair in before.added.items():
        for part, array in pair.items():
            np.testing.assert_allclose(after.added[site][part], array, rtol=1e-6)
    assert evaluate_adapter(run, data=str(files["data"])) == reports(run)


@pytest.mark.slow
def test_lora_keeps_its_settings(files, old, tmp_path, caplog):
    options = {**LORA, "rank": 3, "max_steps": 1}
    run = train(files, tmp_path / "run", **options, adapter=old["lora"])
    assert load_adapter(run).method == load_adapter(old["lora"]).method
    assert "the settings of the adapter are used: LoRA(" in caplog.text


def test_a_head_for_other_labels_is_left_out(files, old, tmp_path, caplog):
    adapter = replace(load_adapter(old["sift"]), labels=("0", "1"))
    save_adapter(tmp_path / "other.safetensors", adapter)
    options = {**SIFT, "learning_rate": 1e-30, "max_steps": 1}
    run = train(
        files, tmp_path / "run", **options, adapter=str(tmp_path / "other.safetensors")
    )
    head = [one.dense["classifier/kernel"] for one in (load_adapter(run), adapter)]
    assert not np.allclose(*head)
    assert "the head of the adapter is dropped: it is for sst2 with 0, 1" in caplog.text
    assert "To keep it, name the labels of its outputs as `id2label`" in caplog.text
    assert "newly initialized" in caplog.text


def test_a_head_that_goes_on_is_not_called_new(files, old, tmp_path, caplog):
    train(files, tmp_path / "run", **SIFT, adapter=old["sift"], max_steps=1)
    assert "newly initialized" not in caplog.text


def test_a_run_that_goes_on_is_resumed(files, old, tmp_path, monkeypatch):
    options = {**SIFT, "score": "random", "adapter": old["sift"], "save_every": 1}
    whole = train(files, tmp_path / "whole", **options, max_steps=3)
    settings = tiny_settings(**files, output=tmp_path / "run", **options, max_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(
            "sparse_jax.training.stop_signals.StopSignals.requested", stop_after(2)
        )
        with pytest.raises(KeyboardInterrupt):
            finetune(settings)
    finetune(settings, resume=True)
    name = "adapter.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == Path(whole, name).read_bytes()


@pytest.mark.parametrize("name", ["adapter", "avoid"])
@pytest.mark.quick(1)
def test_a_run_is_not_resumed_with_another_adapter(
    name, files, old, tmp_path, monkeypatch
):
    path = tmp_path / "start.safetensors"
    adapter = load_adapter(old["sift"])
    save_adapter(path, adapter)
    given = {name: str(path) if name == "adapter" else (str(path),)}
    settings = tiny_settings(**files, output=tmp_path / "run", **SIFT, **given)
    with monkeypatch.context() as patch:
        patch.setattr(
            "sparse_jax.training.stop_signals.StopSignals.requested", stop_after(1)
        )
        with pytest.raises(KeyboardInterrupt):
            finetune(settings)
    values = {leaf: values + 1 for leaf, values in adapter.values.items()}
    save_adapter(path, replace(adapter, values=values))
    with pytest.raises(InputError, match=f"`{name}` must be what it was in the run"):
        finetune(settings, resume=True)


def test_lora_keeps_what_else_its_adapter_trained(files, old, tmp_path):
    adapter, leaf = load_adapter(old["lora"]), "layers/attention/query/bias"
    dense = {**adapter.dense, leaf: np.full((2, 16), 0.5, np.float32)}
    method = replace(adapter.method, dense=(*adapter.method.dense, "query/bias$"))
    path = tmp_path / "start.safetensors"
    save_adapter(path, replace(adapter, dense=dense, method=method))
    run = train(files, tmp_path / "run", **LORA, adapter=str(path), max_steps=1)
    after = load_adapter(run)
    assert after.word == "lora" and (after.dense[leaf] == 0.5).all()
    assert evaluate_adapter(run, data=str(files["data"])) == reports(run)


def test_another_dtype_under_lora_is_reported(files, old, tmp_path, caplog):
    adapter = load_adapter(old["lora"])
    adapter = replace(adapter, settings={**adapter.settings, "dtype": "bfloat16"})
    save_adapter(tmp_path / "half.safetensors", adapter)
    path = str(tmp_path / "half.safetensors")
    train(files, tmp_path / "run", **LORA, adapter=path, max_steps=1)
    assert "was trained on parameters in bfloat16, and these are in" in caplog.text


def test_layers_with_fewer_entries_take_none_to_avoid():
    positions = lambda *rows: {"w": np.array(rows, np.int32)}
    one, two, earlier = (
        Adapter(support, {"w": np.zeros(support["w"].shape, np.float32)})
        for support in (
            positions([4, 5], [4, 5]),
            positions([4, 5], [6, 7]),
            positions([0, 1], [2, 3]),
        )
    )
    params = {"w": jax.numpy.zeros((2, 8))}
    both = with_start(one, two, params, [earlier]).support["w"]
    assert both.tolist() == [[2, 3, 4, 5], [4, 5, 6, 7]]


def stop_after(number):
    """Returns a `requested` that asks for a stop in one of its calls."""
    calls = []

    def requested(self):
        calls.append(self)
        return 2 if len(calls) >= number else 0

    return requested


REFUSED = {
    "lora on sift": (
        "sift",
        LORA,
        "`method` must train entries of the base",
    ),
    "sift on lora": (
        "lora",
        SIFT,
        "`method` must be that of the ad.* LoRA, got S",
    ),
    "another dtype": ("sift", {**SIFT, "dtype": "bfloat16"}, "must be bfloat16"),
    "another base": ("other", SIFT, "`model` must be .* Its leaves are those of the"),
    "no arrays at a site": ("torn", LORA, "must have arrays at the site `attention/"),
    "avoided": ("avoided", SIFT, "must train no entry of those to avoid, got some of"),
    "another stack": ("whole", SIFT, "positions in layers of .*the same `stack`"),
    "no adapter": ("none", SIFT, "`adapter` must be an adapter file, or the folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_cannot_go_on_from_is_refused(name, files, old, tmp_path):
    word, options, message = REFUSED[name]
    path = old.get(word, str(tmp_path / "other.safetensors"))
    if word == "other":
        adapter = replace(load_adapter(old["sift"]), base_hash="ab" * 32)
        save_adapter(path, adapter)
    if word == "avoided":
        path = old["sift"]
        options = {**options, "avoid": (path,)}
    if word == "whole":
        positions = {QUERY: np.array([3], np.int32)}
        values = {QUERY: np.ones(1, np.float32)}
        adapter = replace(load_adapter(old["sift"]), method="")
        save_adapter(path, replace(adapter, support=positions, values=values))
    if word == "torn":
        adapter = load_adapter(old["lora"])
        _, *sites = adapter.added
        added = {site: adapter.added[site] for site in sites}
        save_adapter(path, replace(adapter, added=added))
    with pytest.raises(InputError, match=message):
        train(files, tmp_path / "run", **options, adapter=path)
    assert not (tmp_path / "run").exists()


def test_a_run_warns_of_a_new_head_that_is_left_frozen(files, tmp_path, caplog):
    options = {"method": "lora", "rank": 1, "dense": ("bias$",), "max_steps": 1}
    train(files, tmp_path / "run", **options)
    assert (
        "not trained: classifier/kernel, pooler/kernel. `dense` replaces the head, and "
        "has to match it too: add '^classifier/' and '^pooler/'" in caplog.text
    )

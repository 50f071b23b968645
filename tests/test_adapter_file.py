"""An adapter file holds what was trained, to the bit, and says when it does not fit."""

import json
import os
import time
from dataclasses import replace
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sparse_jax import (
    Adapter,
    InputError,
    LoRA,
    apply_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from sparse_jax.adapter.use import swap
from sparse_jax.models.hf.tensors import LazyTensor, write_tensors


def make_params(dtype=jnp.bfloat16):
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape).astype(dtype)
    return {
        "layers": {"query": {"kernel": draw(0, (2, 4, 3))}},
        "word": draw(1, (5, 2)),
        "classifier": draw(2, (3,)),
    }


def make_adapter(params):
    support = {
        "layers/query/kernel": np.array([[0, 7], [3, 11]], np.int32),
        "word": np.array([2, 9], np.int32),
    }
    like = params["word"].dtype
    return Adapter(
        support=support,
        values={name: np.full(s.shape, 9, like) for name, s in support.items()},
        dense={"classifier": np.full(3, 2, like)},
        method="sift",
        settings={"density": 0.1},
        base_model="bert",
        base_hash="abcdef" * 10,
        task="mrpc",
        labels=("no", "yes"),
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_an_adapter_comes_back_as_it_was(tmp_path):
    adapter = make_adapter(make_params())
    size = save_adapter(tmp_path / "adapter.safetensors", adapter)
    assert size == (tmp_path / "adapter.safetensors").stat().st_size
    found = load_adapter(tmp_path)
    assert_same(found.support, adapter.support)
    assert_same(found.values, adapter.values)
    assert_same(found.dense, adapter.dense)
    words = ("method", "word", "settings", "base_model", "base_hash", "task", "labels")
    assert [getattr(found, w) for w in words] == [getattr(adapter, w) for w in words]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_only_the_support_and_the_dense_leaves_change():
    params = make_params()
    changed, _ = apply_adapter(params, make_adapter(params))
    first, second = np.asarray(changed["layers"]["query"]["kernel"]).reshape(2, -1)
    assert np.flatnonzero(first == 9).tolist() == [0, 7]
    assert np.flatnonzero(second == 9).tolist() == [3, 11]
    assert np.flatnonzero(np.asarray(changed["word"]) == 9).tolist() == [2, 9]
    np.testing.assert_array_equal(changed["classifier"], [2, 2, 2])


def test_swapping_back_restores_every_bit():
    params = make_params()
    changed, undo = swap(params, make_adapter(params))
    assert_same(swap(changed, undo)[0], params)


def test_whoever_may_read_other_new_files_may_read_what_is_written(tmp_path):
    before = os.umask(0o027)
    try:
        save_adapter(tmp_path / "a.safetensors", make_adapter(make_params()))
        zeros = LazyTensor((2,), np.dtype(np.float32), lambda: np.zeros(2, np.float32))
        write_tensors({"w": zeros}, tmp_path)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()]
    assert modes == [0o640, 0o640]


def test_bfloat16_takes_at_most_six_and_a_half_bytes_an_entry(tmp_path):
    k = 4000
    support = {"w": np.sort(np.random.default_rng(0).choice(1 << 20, k, replace=False))}
    values = {"w": np.ones(k, jnp.bfloat16)}
    adapter = Adapter({"w": support["w"].astype(np.int32)}, values)
    assert 6 * k < save_adapter(tmp_path / "a.safetensors", adapter) <= 6.5 * k


def test_lora_is_attached_or_merged():
    params = {"layers": {"query": {"kernel": jnp.zeros((2, 3, 4))}}}
    pair = {
        "a": np.ones((2, 3, 1), np.float32),
        "b": np.full((2, 1, 4), 0.5, np.float32),
    }
    method = LoRA(rank=1, where="query")
    adapter = Adapter(added={"query": pair}, method=method)
    kept, attachment = apply_adapter(params, adapter)
    layer = jax.tree.map(lambda leaf: leaf[0], attachment.trained)
    x = jnp.ones((1, 3))
    y = attachment.response("query", lambda x: jnp.zeros((1, 4)), x, layer, None)
    np.testing.assert_array_equal(y, np.full((1, 4), 3.0))  # 2 * 3 * 0.5
    merged = merge_adapter(params, adapter)["layers"]["query"]["kernel"]
    np.testing.assert_array_equal(merged, np.ones((2, 3, 4)))
    assert_same(kept, params)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def scribble(path):
    path.write_bytes(b"not a file of tensors")


def rename_format(path):
    save_file({"w": np.zeros(1)}, path, metadata={"format": "pt"})


def other_format(path):
    metadata = {"sparse_jax": '{"format": "3"}'}
    save_file({"w": np.zeros(1)}, path, metadata=metadata)


def forget_metadata(path):
    save_file({"w": np.zeros(1)}, path)


def forget_method(path):
    save_file(
        {"w": np.zeros(1)},
        path,
        metadata={"sparse_jax": '{"format": "sparse_jax adapter 1"}'},
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "must be a complete safetensors file"),
        (scribble, "must be a complete safetensors file"),
        (rename_format, "must be an adapter of sparse_jax, .* of something else"),
        (forget_metadata, "must be an adapter of sparse_jax, .* passed as `model`"),
        (other_format, "must be an adapter of format 'sparse_jax adapter 2', got '3'"),
        (forget_method, "must name its method"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_a_file_that_is_no_adapter_is_an_error(tmp_path, spoil, message):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, make_adapter(make_params()))
    spoil(path)
    with pytest.raises(InputError, match=message):
        load_adapter(path)


def test_a_folder_without_an_adapter_says_what_it_lacks(tmp_path):
    message = "neither `adapter.safetensors` nor `adapter_config.json`. A run writes"
    with pytest.raises(InputError, match=message):
        load_adapter(tmp_path)


def test_arrays_stay_in_the_file_until_they_are_used(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, make_adapter(make_params()))
    loaded = load_adapter(path)
    held = [*loaded.support.values(), *loaded.values.values()]
    assert not any(array.flags.owndata for array in held)
    # A write stays in memory.
    held[0][...] = 0
    load_adapter(path)


def test_an_unverified_adapter_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, make_adapter(make_params()))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert load_adapter(path, verify=False).support
    with pytest.raises(InputError, match="checksum is that of other content"):
        load_adapter(path)
    # What the header says is checked all the same.
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match="must be a complete safetensors file"):
        load_adapter(path, verify=False)


def test_a_large_adapter_is_saved_and_loaded_in_a_fifth_of_a_second(tmp_path):
    """1.28 million entries, checks included; 8.4 MB are 6.5 bytes an entry."""
    support = np.arange(0, 16 * 160_000, 2, dtype=np.int32).reshape(8, -1)
    support -= support[:, :1]
    values = np.random.default_rng(0).normal(size=support.shape).astype(jnp.bfloat16)
    adapter = Adapter(support={"w": support}, values={"w": values})
    path = tmp_path / "a.safetensors"
    # Of the processor, as other programs run on the same machine.
    times = [time.process_time()]
    assert save_adapter(path, adapter) <= 6.5 * 1_280_000 == 6.5 * adapter.entries
    times.append(time.process_time())
    load_adapter(path)
    times.append(time.process_time())
    assert np.diff(times).max() < 0.2


def test_a_file_says_its_version_and_license(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, replace(make_adapter(make_params()), license="mit"))
    with safe_open(path, framework="numpy") as file:
        words = json.loads(file.metadata()["sparse_jax"])
    assert words["version"] == version("sparse_jax")
    assert load_adapter(path).license == "mit"
    # Earlier versions wrote neither.
    for name in ("version", "license", "base_leaves", "digest"):
        del words[name]
    save_file(load_file(path), path, metadata={"sparse_jax": json.dumps(words)})
    assert load_adapter(path).license == ""
    words |= {"format": "sparse_jax adapter 9", "version": "7.1"}
    save_file(load_file(path), path, metadata={"sparse_jax": json.dumps(words)})
    with pytest.raises(InputError, match="'sparse_jax adapter 9' of sparse_jax 7.1"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ([3, 2], "must hold ascending int32 positions"),
        ([2, 2], "must hold ascending int32 positions"),
        ([-1, 2], "must hold ascending int32 positions"),
        ([1, 2, 3], "as many positions as values"),
        ([2, 10], "must hold positions below 10"),
    ],
)
def test_a_support_that_does_not_fit_is_an_error(tmp_path, monkeypatch, word, message):
    adapter = make_adapter(make_params())
    support = {**adapter.support, "word": np.array(word, np.int32)}
    adapter = replace(adapter, support=support)
    path = tmp_path / "adapter.safetensors"
    # How large an array is only its model says.
    if "below" not in message:
        with pytest.raises(InputError, match="`adapter` must "):
            save_adapter(path, adapter)
    with monkeypatch.context() as patch:
        patch.setattr("sparse_jax.adapter.file._require_support", lambda *args: None)
        save_adapter(path, adapter)
    with pytest.raises(InputError, match=message):
        apply_adapter(make_params(), load_adapter(tmp_path))


def test_another_base_is_an_error_that_shows_both_hashes():
    with pytest.raises(
        InputError, match=r"abcdefabcdef\.\.\.,.* got SHA-256 0123456789"
    ):
        params = make_params()
        apply_adapter(params, make_adapter(params), base_hash="0123456789" * 6)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (make_params(jnp.float32), "must be float32.* got bfloat16"),
        ({"layers": make_params()["layers"]}, "must have the leaf `classifier`"),
    ],
)
def test_a_model_that_does_not_fit_is_an_error(params, message):
    with pytest.raises(InputError, match=message):
        apply_adapter(params, make_adapter(make_params()))

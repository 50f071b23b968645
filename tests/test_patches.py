"""Patches of a checkpoint: the names, indices and values that a server replaces."""

import json
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, tiny_config
from tiny_text import text_settings, tiny_decoder, write_chats, write_decoder

from sparse_jax import (
    Adapter,
    InputError,
    LoRA,
    Settings,
    apply_adapter,
    finetune,
    from_pretrained,
    load_adapter,
    merge_adapter,
    save_pretrained,
)
from sparse_jax.interchange.patches import (
    WeightPatch,
    apply_patches,
    load_patches,
    patch_updates,
    patches_of,
    save_patches,
)
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.read_config import read_config
from sparse_jax.params.names import map_named
from sparse_jax.training.stop_signals import StopSignals

CONFIGS = {
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_positions": 64, "rotary_dim": 4},
    "bloom": {"hidden_size": 24, "n_head": 3},
    "phi3": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 20,
    },
}  # fmt: skip
SIZES = {"vocab_size": 61, "n_layer": 2, "n_head": 4}
# GPT-2, BLOOM and Phi-3 have query, key and value in one tensor, in BLOOM by head, in
# Phi-3 of unequal sizes, and GPT-2 has its kernels upright.
MODELS = ("bert", "modernbert", "llama", *CONFIGS)


def model_of(name, folder):
    if name == "llama":
        model = tiny_decoder()[0]
        return replace(model, config=replace(model.config, tied=True))
    if name in FAMILIES:
        return Model(SequenceClassifier, FAMILIES[name], tiny_config(name))
    theirs = {"model_type": name, **SIZES, **CONFIGS[name]}
    (folder / "config.json").write_text(json.dumps(theirs))
    return Model(CausalLM, *read_config(folder))


def drawn(model, dtype="float32"):
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(draw, model.abstract(jnp.dtype(dtype)))


def sparse_adapter(params, seed=1, *, dense=()):
    """Returns an adapter of 3 entries of every leaf and layer, and of whole leaves."""
    support, values, whole = {}, {}, {}
    positions = np.random.default_rng(0)
    random = np.random.default_rng(seed)

    def collect(leaf, array):
        rows = array.shape[0] if leaf.startswith("layers/") else 1
        size = array.size // rows
        if leaf in dense:
            whole[leaf] = random.normal(size=array.shape).astype(array.dtype)
            return
        draw = lambda: np.sort(positions.choice(size, min(3, size), replace=False))
        found = np.stack([draw() for _ in range(rows)]).astype(np.int32)
        support[leaf] = found if leaf.startswith("layers/") else found[0]
        new = random.normal(size=support[leaf].shape)
        values[leaf] = new.astype(array.dtype)

    map_named(collect, params)
    return Adapter(support, values, whole, word="sift", base_model="base")


@pytest.fixture
def llama(tmp_path):
    """A model, an adapter of it, and a folder with its patches."""
    model = model_of("llama", tmp_path)
    adapter = sparse_adapter(drawn(model, "bfloat16"))
    save_patches(tmp_path / "patch", adapter, model, update=10)
    return model, adapter, tmp_path / "patch"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.quick(3)
def test_a_patched_checkpoint_is_the_merged_model(name, dtype, tmp_path):
    model = model_of(name, tmp_path)
    params = drawn(model, dtype)
    adapter = sparse_adapter(params, dense=("layers/attention/key/bias",))
    save_pretrained(model, params, tmp_path / "base")
    save_pretrained(model, merge_adapter(params, adapter), tmp_path / "merged")
    save_patches(tmp_path / "patch", adapter, model)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    apply_patches(tensors, load_patches(tmp_path / "patch"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors.keys() == merged.keys()
    for tensor, array in merged.items():
        assert array.tobytes() == tensors[tensor].tobytes(), tensor


def test_kernels_lie_as_pytorch_has_them():
    model = tiny_decoder()[0]
    support = {"layers/mlp/up/kernel": np.array([[1, 30]] * 4, np.int32)}
    values = {"layers/mlp/up/kernel": np.array([[5.0, 6.0]] * 4, np.float32)}
    patch = patches_of(Adapter(support, values), model)[2]
    # Entries (0, 1) and (1, 6) of [in, out] = [16, 24] are (1, 0) and (6, 1).
    assert patch.name == "model.layers.2.mlp.up_proj.weight"
    assert (patch.shape, patch.dtype) == ((24, 16), "float32")
    assert (patch.indices.tolist(), patch.values.tolist()) == ([16, 97], [5.0, 6.0])
    assert patch.indices.dtype == np.int32


def test_a_tied_table_has_one_name(llama):
    model, _, folder = llama
    assert model.config.tied
    names = [patch.name for patch in load_patches(folder)]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_later_updates_take_the_bytes_of_their_values(tmp_path):
    model = model_of("llama", tmp_path)
    params = drawn(model, "bfloat16")
    leaf = "layers/mlp/up/kernel"
    places = np.tile(np.arange(384, dtype=np.int32), (4, 1))
    adapters = [
        Adapter({leaf: places}, {leaf: np.full((4, 384), n, jnp.bfloat16)})
        for n in (1.0, 2.0, 3.0)
    ]
    sizes = [
        save_patches(tmp_path / "patch", adapter, model, update=10 * n)
        for n, adapter in enumerate(adapters)
    ]
    header = 450
    assert sizes[1] == sizes[2] < 2 * 4 * 384 + header
    assert sizes[0] - sizes[1] < 4 * 4 * 384 + header
    assert patch_updates(tmp_path / "patch") == [0, 10, 20]
    for n, adapter in enumerate(adapters):
        patches = load_patches(tmp_path / "patch", 10 * n)
        assert all((patch.values == n + 1).all() for patch in patches)
        merged = merge_adapter(params, adapter)
        save_pretrained(model, params, tmp_path / f"base {n}")
        tensors = load_file(tmp_path / f"base {n}" / "model.safetensors")
        apply_patches(tensors, patches)
        up = np.asarray(merged["layers"]["mlp"]["up"]["kernel"][3])
        assert (tensors["model.layers.3.mlp.up_proj.weight"] == up.T).all()


def test_an_update_is_written_again(llama):
    model, adapter, folder = llama
    later = replace(adapter, values={n: v + 1 for n, v in adapter.values.items()})
    save_patches(folder, later, model, update=10)
    assert patch_updates(folder) == [10]
    first = load_patches(folder)[0]
    expected = {p.name: p.values for p in patches_of(later, model)}[first.name]
    assert (first.values == expected).all()


def test_another_support_is_refused(llama):
    model, adapter, folder = llama
    fewer = lambda arrays: {name: array[..., 1:] for name, array in arrays.items()}
    moved = fewer(adapter.support)
    with pytest.raises(InputError, match="of the same run, got others by `indices`"):
        other = replace(adapter, support=moved, values=fewer(adapter.values))
        save_patches(folder, other, model, update=20)
    other = replace(adapter, base_model="other")
    with pytest.raises(InputError, match="of the same run, got others by `base_model`"):
        save_patches(folder, other, model, update=20)


def test_an_adapter_that_adds_arrays_is_refused(tmp_path):
    pair = {"a": np.ones((4, 16, 1), np.float32), "b": np.ones((4, 1, 16), np.float32)}
    adapter = Adapter(added={"attention/query": pair}, method=LoRA(rank=1, where="que"))
    with pytest.raises(InputError, match="to be a patch, got 'lora', which adds arr"):
        save_patches(tmp_path / "patch", adapter, tiny_decoder()[0])
    assert not (tmp_path / "patch").exists()


def test_values_that_are_not_finite_are_refused(tmp_path):
    adapter = Adapter({"norm/scale": np.array([1], np.int32)}, {})
    adapter = replace(adapter, values={"norm/scale": np.array([np.nan], np.float32)})
    with pytest.raises(InputError, match="`model.norm.weight` in `adapter` must"):
        save_patches(tmp_path / "patch", adapter, tiny_decoder()[0])
    assert not (tmp_path / "patch").exists()


OUTSIDE = {
    # Of 16 rows and 24 columns; the tensor has 24 rows and 16 columns.
    "a position": (
        {"layers/mlp/up/kernel": np.array([[384]] * 4, np.int32)},
        {},
        "must hold positions below 384",
    ),
    "a shape": (
        {},
        {"norm/scale": np.ones((4, 4), np.float32)},
        r"`norm/scale` must be float32\[16\] as in the model, got float32\[4, 4\]",
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_does_not_fit_the_model_is_refused(name, tmp_path):
    support, dense, message = OUTSIDE[name]
    values = {leaf: np.ones(x.shape, np.float32) for leaf, x in support.items()}
    adapter = Adapter(support, values, dense)
    with pytest.raises(InputError, match=message):
        save_patches(tmp_path / "patch", adapter, tiny_decoder()[0])
    assert not (tmp_path / "patch").exists()


def rewritten(folder, file, change):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def truncated(folder):
    path = folder / "values-00000010.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def with_manifest(**changes):
    def spoil(folder):
        path = folder / "patch.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def spoiled(change):
    return lambda folder: rewritten(folder, "values-00000010.safetensors", change)


NORM = "model.norm.weight"
NAN = np.array([np.nan] * 3, jnp.bfloat16)
DAMAGES = {
    "no manifest": (lambda f: (f / "patch.json").unlink(), "a folder of patches with"),
    "no JSON": (lambda f: (f / "patch.json").write_text("{"), "a folder of patches wi"),
    "another format": (with_manifest(format="other"), "of format 'sparse_jax patch 1'"),
    "no shapes": (with_manifest(shapes=None), "must name shapes, indices and updates"),
    "odd shapes": (with_manifest(shapes={"a": [-1]}), "must name shapes, indices and"),
    "odd updates": (with_manifest(updates=["a"]), "must name shapes, indices and upd"),
    "no updates": (with_manifest(updates=[]), "`update` must be one of the 0"),
    "missing values": (
        with_manifest(updates=[11]),
        "11.safetensors` must be a comp",
    ),
    "truncated": (truncated, "must be a complete safetensors file"),
    "a tensor less": (
        spoiled(lambda t: t.pop(NORM)),
        "must hold the indices and values",
    ),
    "fewer values": (
        spoiled(lambda t: t.update({NORM: NAN[:2]})),
        "`model.norm.weight` in .* must have as many values as indices",
    ),
    "NaN": (spoiled(lambda t: t.update({NORM: NAN})), "must have finite values"),
    "other indices": (
        lambda f: rewritten(
            f, "indices.safetensors", lambda t: t.update({NORM: t[NORM] + 1})
        ),
        "must hold the indices and values",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line(llama, name):
    *_, folder = llama
    spoil, message = DAMAGES[name]
    spoil(folder)
    with pytest.raises(InputError, match=message) as info:
        load_patches(folder)
    assert "\n" not in str(info.value)


ONE = np.ones(2, np.float32)
REFUSED = {
    "repeated": (ONE, [1, 1], "ascending, distinct indices"),
    "out of range": (ONE, [1, 4], r"indices in \[0, 4\)"),
    "negative": (ONE, [-1, 2], r"indices in \[0, 4\)"),
    "too few": (ONE[:1], [1, 2], "as many values as indices"),
    "NaN": (ONE * np.nan, [1, 2], "finite values"),
    "another dtype": (ONE.astype(np.float16), [1, 2], r"`w` as float16\[2, 2\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_patch_that_a_server_refuses_changes_nothing(name):
    values, indices, message = REFUSED[name]
    tensors = {"v": np.zeros(2, np.float32), "w": np.zeros((2, 2), np.float32)}
    good = WeightPatch("v", (2,), ONE[:1], np.array([0], np.int32))
    bad = WeightPatch("w", (2, 2), values, np.array(indices, np.int32))
    with pytest.raises(InputError, match=message):
        apply_patches(tensors, [good, bad])
    assert not tensors["v"].any() and not tensors["w"].any()


def test_the_checkpoint_must_have_the_tensor():
    patch = WeightPatch("w", (2, 2), ONE, np.array([0, 1], np.int32))
    with pytest.raises(InputError, match="`tensors` must have `w` .*, got None"):
        apply_patches({}, [patch])


@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_a_run_writes_patches_while_it_trains(dtype, tmp_path):
    base, output = write_decoder(tmp_path / "base"), tmp_path / "run"
    data = write_chats(tmp_path / "chats.jsonl")
    settings = text_settings(
        base, data, output, method="sift", density=0.05, patch_every=2, max_steps=5,
        epochs=2, dtype=dtype,
    )  # fmt: skip
    finetune(settings)
    assert patch_updates(output / "patches") == [2, 4, 5]
    model, params = from_pretrained(base, head=CausalLM, dtype=jnp.dtype(dtype))
    save_pretrained(model, params, tmp_path / "start")
    params, _ = apply_adapter(params, load_adapter(output), model=model)
    save_pretrained(model, params, tmp_path / "merged")
    tensors = load_file(tmp_path / "start" / "model.safetensors")
    # One update after the other, as a server takes them.
    for update in patch_updates(output / "patches"):
        apply_patches(tensors, load_patches(output / "patches", update))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(tensors[name].tobytes() == merged[name].tobytes() for name in merged)


@pytest.mark.slow
def test_a_resumed_run_patches_again_and_a_new_one_starts_over(tmp_path, monkeypatch):
    base, output = write_decoder(tmp_path / "base"), tmp_path / "run"
    data = write_chats(tmp_path / "chats.jsonl")
    more = {"method": "sift", "density": 0.05, "where": ("query", "down")}
    more |= {"patch_every": 2, "save_every": 1}
    settings = text_settings(base, data, output, max_steps=5, epochs=2, **more)
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "requested", stop_after(4))
        with pytest.raises(KeyboardInterrupt):
            finetune(settings)
    before = [p.values for p in load_patches(output / "patches", 2)]
    finetune(settings, resume=True)
    assert patch_updates(output / "patches") == [2, 4, 5]
    finetune(settings, overwrite=True, patch_every=None)
    assert not (output / "patches").exists()
    finetune(settings, overwrite=True)
    after = [p.values for p in load_patches(output / "patches", 2)]
    assert all(map(np.array_equal, before, after))


def stop_after(number):
    """Returns a `requested` that asks for a stop in one of its calls."""
    calls = []

    def requested(self):
        calls.append(self)
        return signal.SIGINT if len(calls) >= number else 0

    return requested


def test_a_method_that_adds_arrays_has_no_patches():
    with pytest.raises(InputError, match="`patch_every` must be left out with meth"):
        Settings(
            model="m", task="causal", data="d", output="o", method="lora", patch_every=2
        )

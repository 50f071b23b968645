"""An adapter is applied whole or not at all, on the base that it was trained on."""

import json
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load, save
from tiny_adapters import (
    RUNS,
    as_format_1,
    damaged,
    misworded,
    reshaped,
    run_adapter,
    with_words,
    words_of,
)
from tiny_models import tiny_config, tiny_params

from sparse_jax import (
    Adapter,
    Compact,
    InputError,
    LoRA,
    Sparse,
    apply_adapter,
    from_pretrained,
    load_adapter,
    save_adapter,
    save_peft,
)
from sparse_jax.methods.registry import METHODS
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.pretrained import base_config

MODEL = Model(SequenceClassifier, BERT, tiny_config("bert"))
QUERY = "layers/attention/query/kernel"


@pytest.fixture(scope="module")
def params():
    return tiny_params("bert", SequenceClassifier)


def applied(params, adapter):
    """Returns what an adapter means: the method, parameters and added arrays."""
    method = adapter.method
    means = (type(method), *(getattr(method, n, None) for n in ("scale", "activation")))
    changed, attachment = apply_adapter(params, adapter)
    assert attachment.trained.added.keys() == adapter.added.keys()
    leaves = jax.tree_util.tree_leaves_with_path(changed)
    leaves += jax.tree_util.tree_leaves_with_path(adapter.added)
    return means, {str(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.mark.parametrize("method", RUNS)
def test_what_a_run_writes_is_whole(params, tmp_path, method):
    adapter = run_adapter(params, method)
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    assert applied(params, load_adapter(tmp_path)) == applied(params, adapter)


def without(name, **more):
    """Returns a change that takes a site, a part or a leaf out of a dictionary."""

    def change(adapter):
        field = more["of"]
        kept = dict(getattr(adapter, field))
        kept.pop(name)
        return replace(adapter, **{field: kept})

    return change


def part(site, name, make):
    """Returns a change of one added array."""

    def change(adapter):
        parts = {**adapter.added[site], name: make(adapter.added[site][name])}
        return replace(adapter, added={**adapter.added, site: parts})

    return change


def shorter(adapter):
    """Leaves out the last entry of every layer of a leaf."""
    fields = {
        field: {**arrays, QUERY: arrays[QUERY][:, :-1]}
        for field, arrays in (("support", adapter.support), ("values", adapter.values))
    }
    return replace(adapter, **fields)


def moved(field, old, new):
    """Returns a change of one name in a dictionary."""

    def change(adapter):
        arrays = dict(getattr(adapter, field))
        arrays[new] = arrays.pop(old)
        return replace(adapter, **{field: arrays})

    return change


def renamed_leaf(adapter):
    """Puts the entries of one leaf under the name of another."""
    new = "layers/mlp/down/kernel"
    adapter = moved("support", QUERY, new)(adapter)
    return moved("values", QUERY, new)(adapter)


def more_dense(adapter):
    leaf = {"embeddings/norm/bias": np.ones(32, np.float32)}
    return replace(adapter, dense={**adapter.dense, **leaf})


def another(word):
    """Returns a change of the method, with its usual settings."""
    head = ("^classifier/",)
    return lambda adapter: replace(adapter, method=METHODS[word].make({}, head))


def more_layers(array):
    return np.concatenate([array, array[:1]])


EDITS = [
    ("lora", without("attention/query", of="added"), "have arrays at the site `atte"),
    ("lora", moved("added", "attention/key", "attention/kex"), "at the site `attenti"),
    ("lora", moved("added", "attention/key", "mlp/up"), "the site `attention/key`"),
    ("lora", lambda a: replace(a, added={}), "must have the arrays that lora adds"),
    ("lora", lambda a: replace(a, dense={}), "must have the leaf `classifier/bias`"),
    ("lora", without("classifier/kernel", of="dense"), "leaf `classifier/kernel`, whi"),
    ("lora", more_dense, "settings train, got the leaf `embeddings/norm/bias`"),
    ("lora", part("attention/query", "b", lambda x: x[:1]), r"be float32\[2, 3, 32"),
    ("lora", part("attention/query", "a", more_layers), r"got float32\[3, 32, 3\]"),
    ("lora", part("attention/query", "a", np.transpose), r"got float32\[3, 32, 2\]"),
    ("lora", part("attention/query", "a", np.float16), r"got float16\[2, 32, 3\]"),
    ("lora", another("dora"), "have `a` and `b` and `m` at the site `attention/key`"),
    ("lora", another("sift"), "must have no arrays at the site `attention/key`"),
    ("lora", another("full"), "must have no arrays at the site `attention/key`"),
    ("dora", another("lora"), "must have arrays at the site `attention/key`"),
    ("series", another("parallel"), "no arrays at the site `attention/output`"),
    ("ia3", another("prefix"), "must have no arrays at the site `attention/key`"),
    ("ia3", moved("added", "mlp/down", "mlp/up"), "have arrays at the site `mlp/down`"),
    ("prefix", another("ia3"), "must have arrays at the site `attention/key`"),
    ("sift", another("full"), "must have the leaf `embeddings/norm/bias`, which its"),
    ("sift", another("lora"), "must have the arrays that lora adds, and has none"),
    ("sift", shorter, r"attention/query/kernel.support` must be int32\[2, 82\]"),
    ("sift", renamed_leaf, "must have the leaf `layers/attention/query/kernel`, which"),
    ("full", another("bitfit"), "settings train, got the leaf `embeddings/norm/scale`"),
    ("full", without("pooler/bias", of="dense"), "must have the leaf `pooler/bias`"),
    ("bitfit", another("full"), "must have the leaf `embeddings/norm/scale`, which"),
    ("bitfit", another("head"), "settings train, got the leaf `embeddings/norm/bias`"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "edit", "message"), EDITS)
def test_an_adapter_that_is_not_whole_is_refused(params, method, edit, message):
    with pytest.raises(InputError, match=message):
        apply_adapter(params, edit(run_adapter(params, method)))


def test_rules_of_a_run_choose_the_leaves_that_have_to_be_there(params):
    adapter = run_adapter(params, "sift", density=0.1, where=("mlp/up/kernel",))
    assert [*adapter.support] == ["layers/mlp/up/kernel"]
    apply_adapter(params, adapter)
    method = replace(adapter.method, where=["mlp/"])
    with pytest.raises(InputError, match="must have the leaf `layers/mlp/down/bias`"):
        apply_adapter(params, replace(adapter, method=method))


def test_a_leaf_that_the_checkpoint_lacks_has_to_be_there(params):
    adapter = run_adapter(params, "lora")
    apply_adapter(params, adapter, new=["classifier/bias"])
    message = "must have the leaf `pooler/bias`, which the checkpoint of its base lacks"
    with pytest.raises(InputError, match=message):
        apply_adapter(params, adapter, new=["classifier/bias", "pooler/bias"])
    # The pooler is part of the head, and may have been trained with it.
    pooler = {"pooler/bias": np.ones(32, np.float32)}
    adapter = replace(adapter, dense={**adapter.dense, **pooler})
    apply_adapter(params, adapter, new=["classifier/bias", "pooler/bias"])


def test_an_adapter_made_by_hand_has_all_parts_of_its_sites(params):
    method = LoRA(rank=4, where="mlp")
    added = method.added(params, jax.random.key(0))
    adapter = Adapter(added=jax.tree.map(np.asarray, added), method=method)
    apply_adapter(params, adapter)
    with pytest.raises(InputError, match="must be the one that added its arrays, got"):
        apply_adapter(params, Adapter(added=adapter.added))
    with pytest.raises(InputError, match="must have `a` and `b` at the site `mlp/up`"):
        part = {"a": adapter.added["mlp/up"]["a"]}
        apply_adapter(params, replace(adapter, added={**added, "mlp/up": part}))


BAD_VALUES = {
    "values": ("sift", QUERY, f"{QUERY}.values"),
    "dense": ("head", "classifier/kernel", "classifier/kernel"),
}


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", BAD_VALUES)
def test_numbers_that_are_not_finite_are_refused(params, tmp_path, field, number):
    method, leaf, name = BAD_VALUES[field]
    adapter = run_adapter(params, method)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter)
    data, arrays = path.read_bytes(), getattr(adapter, field)
    arrays[leaf].reshape(-1)[5] = number
    message = f"`{name}` in `adapter` must hold finite numbers, got 1 of"
    with pytest.raises(InputError, match=message):
        save_adapter(path, adapter)
    assert path.read_bytes() == data
    words = words_of(data)
    del words["digest"]
    about = {"sparse_jax": json.dumps(words)}
    path.write_bytes(save({**load(data), name: arrays[leaf]}, metadata=about))
    with pytest.raises(InputError, match=f"`{name}` in `.*` must hold finite numbers"):
        load_adapter(path)


def test_added_arrays_that_are_not_finite_are_refused(params, tmp_path):
    adapter = run_adapter(params, "lora")
    adapter = part("attention/query", "b", lambda x: np.full_like(x, np.inf))(adapter)
    message = "`added/attention/query/b` in `adapter` must hold finite numbers"
    with pytest.raises(InputError, match=message):
        save_adapter(tmp_path / "adapter.safetensors", adapter)


@pytest.mark.parametrize("word", ["settings", "method_settings"])
def test_a_changed_setting_is_told_by_the_checksum(params, tmp_path, word):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, run_adapter(params, "lora"))
    words = words_of(path.read_bytes())
    name = {"settings": "seed", "method_settings": "alpha"}[word]
    words[word][name] = 2
    path.write_bytes(with_words(path.read_bytes(), words))
    with pytest.raises(InputError, match="its checksum is that of other content"):
        load_adapter(path)


@pytest.mark.parametrize("method", RUNS)
def test_a_file_of_format_1_means_the_same(params, tmp_path, method):
    path, adapter = tmp_path / "adapter.safetensors", run_adapter(params, method)
    save_adapter(path, adapter)
    path.write_bytes(as_format_1(path.read_bytes()))
    found = load_adapter(path)
    assert (found.method, found.word) == (adapter.method, method)
    assert applied(params, found) == applied(params, adapter)


def test_a_file_of_before_checksums_still_loads(params, tmp_path):
    path, adapter = tmp_path / "adapter.safetensors", run_adapter(params, "lora")
    save_adapter(path, adapter)
    words = words_of(as_format_1(path.read_bytes()))
    # The first files had neither this word nor these settings.
    del words["base_config"]
    for name in ("alpha", "rslora", "dropout"):
        del words["settings"][name]
    path.write_bytes(with_words(path.read_bytes(), words))
    found = load_adapter(path)
    assert found.base_config == {}
    assert found.method.scale == 2.0
    apply_adapter(params, found, base_hash="ab" * 32, model=MODEL)


WORDS = {
    "text": ("5" * 5000, "Exceeds the limit"),
    "deep": ("[" * 100_000, "recursion"),
    "null": ("null", "got NoneType"),
    "a list": ("[]", "got list"),
    "settings": ({"settings": []}, r"`settings` in .* must be an object, got \[\]"),
    "labels": (
        {"labels": [1, 2]},
        r"`labels` in .* must be different texts, got \[1, 2",
    ),
    "twice": ({"labels": ["a", "a"]}, "`labels` in .* must be different texts"),
    "method": ({"method": []}, r"`method` in .* must be text, got \[\]"),
    "no settings": (
        {"method_settings": None},
        "`method` must be .* got the name 'lora'",
    ),
    "no object": ({"method_settings": 1}, "`method_settings` in .* an object or null"),
    "hash": ({"base_hash": {"a": 1}}, "`base_hash` in .* must be text, got {'a': 1}"),
    "base": ({"base_config": 3}, "`base_config` in .* must be an object, got 3"),
}
OF_METHOD = {
    "alpha": ("x", "`alpha` in .* must be a number, got 'x'"),
    "dropout": (True, "must be a number, got True"),
    "rank": (2.5, "must be a whole number from 0 to 1048576, got 2.5"),
    "density": (0.1, "must have only what `LoRA` has, got 'density'"),
    "rslora": (1, "must be true or false, got 1"),
    "where": ([["query"]], "must be a regular expression, or a list of them, got"),
}
SETTINGS = {
    "batch_size": (10**9, "must be a whole number from 0 to 1048576, got 1000000000"),
    "max_length": ("9", "must be a whole number .*, got '9'"),
    "seed": (2**32, r"must be in \[0, 2\*\*32\), got 4294967296"),
    "base_labels": (["a", 1], r"must be a list of texts, got \['a', 1\]"),
    "drop_unlabeled": ("no", "must be true or false, got 'no'"),
    "dtype": ("int8", "must be one of float32, bfloat16, float16, float64, got 'int8'"),
    "template": ({}, "must be text, got {}"),
}


@pytest.mark.parametrize("name", [*WORDS, *SETTINGS, *OF_METHOD])
def test_words_of_a_wrong_type_are_one_line(params, tmp_path, name):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, run_adapter(params, "lora"))
    data = path.read_bytes()
    words = words_of(data)
    del words["digest"]
    value, message = {**WORDS, **SETTINGS, **OF_METHOD}[name]
    if name in OF_METHOD:
        words["method_settings"][name] = value
    elif name in SETTINGS:
        words["settings"][name] = value
    else:
        words = value if isinstance(value, str) else {**words, **value}
    path.write_bytes(with_words(data, words))
    with pytest.raises(InputError, match=message):
        load_adapter(path)


def test_settings_have_to_be_json(params, tmp_path):
    adapter = run_adapter(params, "sift")
    adapter = replace(adapter, settings={"learning_rate": np.float32(0.1)})
    with pytest.raises(InputError, match="must be values of JSON to be saved"):
        save_adapter(tmp_path / "a", adapter)


@pytest.mark.parametrize("name", ["w.support", "w.values", "added/w"])
def test_a_leaf_may_not_have_a_name_that_the_file_uses(tmp_path, name):
    adapter = Adapter(dense={name: np.ones(2, np.float32)})
    with pytest.raises(InputError, match="must have no leaf that begins with 'added/'"):
        save_adapter(tmp_path / "a", adapter)


CONFIGS = {
    "hidden_act": "relu",
    "layer_norm_eps": 1e-5,
    "num_heads": 2,
    "max_positions": 19,
    "type_vocab_size": 1,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_weights_that_compute_something_else_are_another_base(params, name):
    adapter = run_adapter(params, "lora")
    adapter = replace(adapter, base_config=base_config(MODEL))
    apply_adapter(params, adapter, model=MODEL)
    config = replace(MODEL.config, **{name: CONFIGS[name]})
    message = f"which has `{name}`={getattr(MODEL.config, name)!r} in its configuration"
    with pytest.raises(InputError, match=message):
        apply_adapter(params, adapter, model=replace(MODEL, config=config))


def test_names_and_dropout_are_no_part_of_a_base():
    same = {"label_names": ("a", "b", "c"), "hidden_dropout": 0.5, "pad_id": 3}
    other = replace(MODEL, config=replace(MODEL.config, **same))
    assert base_config(other) == base_config(MODEL)
    assert base_config(other, training=True) != base_config(MODEL, training=True)


def test_labels_in_another_order_are_told(params):
    adapter = run_adapter(params, "lora")
    names = lambda *labels: replace(MODEL.config, label_names=labels)
    apply_adapter(params, adapter, model=replace(MODEL, config=names(*adapter.labels)))
    message = "the labels of the adapter, no, maybe, yes, got yes, maybe, no"
    with pytest.raises(InputError, match=message):
        other = replace(MODEL, config=names("yes", "maybe", "no"))
        apply_adapter(params, adapter, model=other)


def test_half_an_adapter_is_not_written_for_peft(params, tmp_path):
    adapter = without("attention/query", of="added")(run_adapter(params, "lora"))
    with pytest.raises(InputError, match="arrays at the site `attention/query`"):
        save_peft(tmp_path / "peft", adapter, MODEL)


def test_a_new_leaf_is_stored_whole_however_it_is_trained(params):
    method = Sparse(density=0.1, where="^classifier/", score="random")
    tuner = Compact(lambda *args: (0.0, 1), method, optax.sgd(0.1))
    state = tuner.init(params, jax.random.key(0))
    state, _ = tuner.select(state, None, jax.random.key(0))
    adapter = tuner.adapter(state, new=["classifier/bias"])
    assert [*adapter.support] == [*adapter.values] == ["classifier/kernel"]
    assert [*adapter.dense] == ["classifier/bias"]


def test_a_single_number_keeps_its_shape(tmp_path):
    save_adapter(tmp_path / "a", Adapter(dense={"scale": np.array(2, np.float32)}))
    assert load_adapter(tmp_path / "a").dense["scale"].shape == ()


def test_numbers_of_two_bytes_are_checked(tmp_path):
    bad = np.array([1, np.nan], jnp.bfloat16)
    with pytest.raises(InputError, match="got 1 of 2 that are not"):
        save_adapter(tmp_path / "a", Adapter(dense={"w": bad}))


def test_another_dtype_is_warned_of(params, caplog, monkeypatch):
    # A command that ran before may have sent such lines to standard error alone.
    monkeypatch.setattr(logging.getLogger("sparse_jax"), "propagate", True)
    adapter = run_adapter(params, "lora")
    settings = {**adapter.settings, "dtype": "bfloat16"}
    apply_adapter(params, adapter)
    assert not caplog.text
    apply_adapter(params, replace(adapter, settings=settings))
    assert "trained on parameters in bfloat16, and these are in float32" in caplog.text


def test_an_adapter_of_peft_is_told(params, tmp_path):
    adapter = run_adapter(params, "lora")
    save_peft(tmp_path / "peft", adapter, MODEL)
    message = "got the PEFT adapter in .*peft`, which has an `adapter_config.json`"
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        with pytest.raises(InputError, match=f"`adapter` .* {message}"):
            load_adapter(path)
    with pytest.raises(InputError, match=f"`model` .* {message}"):
        from_pretrained(tmp_path / "peft")


@pytest.mark.parametrize("damage", [damaged, misworded, reshaped])
@pytest.mark.parametrize("method", RUNS)
def test_a_damaged_file_is_refused_or_means_the_same(params, tmp_path, method, damage):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, run_adapter(params, method))
    data = path.read_bytes()
    meaning = applied(params, load_adapter(path))
    refused = 0
    for seed in range(10):
        path.write_bytes(damage(data, np.random.default_rng(seed)))
        try:
            assert applied(params, load_adapter(path)) == meaning
        except InputError as error:
            refused += 1
            assert len(str(error)) < 1000
    assert refused > 5

"""Every method comes back from its file, with its settings."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapters_laws import MODEL, attach, shaken
from tiny_adapters import as_format_1, with_words, words_of
from tiny_models import jax_batch, padded_batch, tiny_params

from sparse_jax import (
    IA3,
    Adapter,
    DoRA,
    InputError,
    LoRA,
    Method,
    Parallel,
    Prefix,
    Series,
    Settings,
    apply_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.training.build import method_of

BATCH = jax_batch(padded_batch("bert"))
# method -> options
RUNS = {
    "lora": {"rank": 2, "alpha": 3.0, "rslora": True},
    "dora": {"rank": 2, "alpha": 8.0},
    "series": {"size": 3, "activation": "tanh"},
    "parallel": {"size": 3, "where": ("mlp",)},
    "ia3": {},
    "prefix": {"prefix_length": 3},
}


@pytest.fixture(scope="module")
def params():
    return tiny_params("bert", SequenceClassifier)


def settings_of(method, **options):
    return Settings(model="m", task="cola", output="o", method=method, **options)


def trained(params, method, options):
    """Returns a method and an adapter of it as a run would save it."""
    made = method_of(settings_of(method, **options), ())
    added = shaken(made.added(params, jax.random.key(0)))
    return made, added, Adapter(added=jax.tree.map(np.asarray, added), method=made)


@pytest.mark.parametrize(("method", "options"), RUNS.items(), ids=RUNS)
@pytest.mark.quick(1)
def test_a_method_comes_back_from_its_file(params, tmp_path, method, options):
    made, added, adapter = trained(params, method, options)
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    found = load_adapter(tmp_path)
    assert (found.method, found.word) == (made, method)
    before = MODEL(params, BATCH, attachment=attach(made, added), unroll=1)
    applied, attachment = apply_adapter(params, found)
    after = MODEL(applied, BATCH, attachment=attachment, unroll=1)
    np.testing.assert_array_equal(after, before)
    if method in ("series", "parallel", "prefix"):
        with pytest.raises(InputError, match="must be linear"):
            merge_adapter(params, found)
    else:
        merged = MODEL(merge_adapter(params, found), BATCH, unroll=1)
        np.testing.assert_allclose(merged, before, rtol=0, atol=1e-5)


# What a method says of itself comes back, also what no option of a run says.
OWN = {
    "lora": LoRA(rank=4, alpha=1.0),
    "rslora": LoRA(rank=4, rslora=True, dropout=0.25, where=["query", "^mlp/up$"]),
    "dora": DoRA(rank=4, alpha=1.0, where="key"),
    "parallel": Parallel(size=4, scale=4.0, activation=jax.nn.silu),
    "series": Series(size=4, scale=0.5),
    "ia3": IA3(where="value", feedforward="^mlp/up$"),
    "prefix": Prefix(length=4, dense="^classifier/"),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.quick(1)
def test_the_method_itself_says_what_its_arrays_mean(params, tmp_path, name):
    method = OWN[name]
    added = shaken(method.added(params, jax.random.key(0)))
    dense = {f"classifier/{n}": np.asarray(x) for n, x in params["classifier"].items()}
    adapter = Adapter(
        dense=dense if method.dense else {},
        added=jax.tree.map(np.asarray, added),
        method=method,
    )
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    found = load_adapter(tmp_path)
    assert found.method == method
    before = MODEL(params, BATCH, attachment=attach(method, added), unroll=1)
    applied, attachment = apply_adapter(params, found)
    after = MODEL(applied, BATCH, attachment=attachment, unroll=1)
    np.testing.assert_array_equal(after, before)


def test_the_scale_of_lora_is_what_it_was_trained_with(params, tmp_path):
    method = LoRA(rank=4, alpha=1.0, where="query")
    query = {"a": np.ones((2, 32, 4), np.float32), "b": np.ones((2, 4, 32), np.float32)}
    adapter = Adapter(added={"attention/query": query}, method=method)
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    merged = merge_adapter(params, load_adapter(tmp_path))
    kernel = lambda tree: tree["layers"]["attention"]["query"]["kernel"]
    # 1.0 / 4 * (four times one by one)
    np.testing.assert_allclose(kernel(merged) - kernel(params), 1.0, atol=1e-6)


def test_a_method_without_a_setting_is_refused_by_name(params, tmp_path):
    _, _, adapter = trained(params, "lora", {})
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter)
    data = path.read_bytes()
    for name in ("rank", "alpha", "rslora", "dropout", "where", "dense", "stack"):
        words = words_of(data)
        del words["digest"], words["method_settings"][name]
        path.write_bytes(with_words(data, words))
        with pytest.raises(InputError, match=f"must have `{name}`, which `LoRA` needs"):
            load_adapter(path)


ADDING = ["lora", "dora", "series", "parallel", "prefix", "ia3"]


@pytest.mark.parametrize("word", ADDING)
def test_a_word_alone_does_not_say_what_arrays_mean(word):
    message = f"`method` must be the method .* got the name '{word}'. Pass"
    with pytest.raises(InputError, match=message):
        Adapter(method=word)
    with pytest.raises(
        InputError, match="`method` must be a method, got <class .*LoRA"
    ):
        Adapter(method=LoRA)
    with pytest.raises(InputError, match="got the name 'vera'. Pass `LoRA"):
        Adapter(method="vera", added={"up": {}})


def test_a_word_is_enough_where_nothing_is_added(params, tmp_path):
    adapter = Adapter(dense={"pooler/bias": np.ones(32, np.float32)}, method="full")
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    found = load_adapter(tmp_path)
    assert (found.word, found.method) == ("full", Method())
    changed, _ = apply_adapter(params, found)
    assert changed["pooler"]["bias"].sum() == 32


def edited(tmp_path, adapter, **changes):
    """Returns the path of a file that says something else about an adapter."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter)
    words = words_of(path.read_bytes())
    del words["digest"]
    path.write_bytes(with_words(path.read_bytes(), {**words, **changes}))
    return path


def test_a_file_of_an_unknown_method_is_refused(params, tmp_path):
    path = edited(tmp_path, trained(params, "ia3", {})[2], method="vera")
    with pytest.raises(
        InputError, match="`method` in .* lora, .* got 'vera'. Register"
    ):
        load_adapter(path)


def test_a_file_of_an_unknown_activation_is_refused(params, tmp_path):
    adapter = trained(params, "series", {"size": 3})[2]
    settings = {**adapter.method.to_settings(), "activation": "snake"}
    path = edited(tmp_path, adapter, method_settings=settings)
    with pytest.raises(InputError, match="`activation` in .* must be one of gelu,"):
        load_adapter(path)


def test_a_function_without_a_word_is_not_stored(params, tmp_path):
    method = Series(size=3, activation=lambda x: x)
    added = jax.tree.map(np.asarray, method.added(params, jax.random.key(0)))
    with pytest.raises(InputError, match="`activation` must be one of gelu, .* stored"):
        save_adapter(tmp_path / "a", Adapter(added=added, method=method))


@pytest.mark.parametrize(("method", "options"), RUNS.items(), ids=RUNS)
def test_a_file_of_format_1_means_what_it_meant(params, tmp_path, method, options):
    made, _, adapter = trained(params, method, options)
    path = tmp_path / "adapter.safetensors"
    # A decoder has no head that is trained beside what is added.
    save_adapter(path, replace(adapter, task="causal"))
    path.write_bytes(as_format_1(path.read_bytes()))
    assert load_adapter(path).method == made


def test_a_file_of_format_1_without_settings_is_refused(params, tmp_path):
    """Its arrays may have been trained with any."""
    adapter = trained(params, "lora", {"rank": 4})[2]
    changes = {"format": "sparse_jax adapter 1", "settings": {"alpha": 1.0}}
    with pytest.raises(
        InputError, match="must have `rank`, which its method lora need"
    ):
        load_adapter(edited(tmp_path, adapter, **changes))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sift", {"alpha": 4.0}, "`alpha` must be left out with method 'sift', got 4"),
        ("ia3", {"size": 4}, "`size` .* It belongs to series, parallel"),
        ("head", {"rslora": True}, "`rslora` .* It belongs to lora, dora"),
        ("full", {"dropout": 0.1}, "`dropout` .* It belongs to lora, dora"),
        ("lora", {"activation": "relu"}, "`activation` .* It belongs to series, par"),
        ("bitfit", {"where": ("a",)}, "lora, .* use `dense` to choose whole"),
        ("lora", {"prefix_length": 4}, "`prefix_length` .* It belongs to prefix"),
        ("lora", {"alpha": -1.0}, "`alpha` must be positive, got -1.0"),
        ("dora", {"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ("series", {"size": 0}, "`size` must be positive, got 0"),
        ("series", {"activation": "snake"}, "`activation` must be one of gelu,"),
    ],
)
def test_options_of_another_method_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        settings_of(method, **options)


def test_every_option_reaches_its_method():
    lora = method_of(settings_of("lora", rank=4, alpha=2.0, dropout=0.1), ())
    assert (lora.scale, lora.dropout, lora.where) == (
        0.5,
        0.1,
        ("^attention/(query|key|value|output)$",),
    )
    series = method_of(settings_of("series", activation="tanh"), ("^classifier/",))
    assert (series.size, series.activation) == (64, jnp.tanh)
    assert series.dense == ("^classifier/",)
    assert series.where == ("^attention/output$", "^mlp/down$")
    assert method_of(settings_of("prefix"), ()).length == 16
    assert method_of(settings_of("parallel", size=8), ()).where == ("^mlp/down$",)
    assert method_of(settings_of("ia3", where=("value",)), ()).where == ("value",)

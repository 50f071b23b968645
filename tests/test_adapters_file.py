"""Every method comes back from its file, with its settings."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapters_laws import MODEL, attach, shaken
from tiny_models import jax_batch, padded_batch, tiny_params

from sparse_jax import (
    Adapter,
    InputError,
    Settings,
    apply_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from sparse_jax.adapter.rebuild import method_of_adapter
from sparse_jax.methods.registry import METHODS
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
    settings = settings_of(method, **options)
    made = method_of(settings, ())
    added = shaken(made.added(params, jax.random.key(0)))
    return made, added, Adapter(
        added=jax.tree.map(np.asarray, added),
        method=method,
        settings={name: getattr(settings, name) for name in METHODS[method].options},
    )  # fmt: skip


@pytest.mark.parametrize(("method", "options"), RUNS.items(), ids=RUNS)
def test_a_method_comes_back_from_its_file(params, tmp_path, method, options):
    made, added, adapter = trained(params, method, options)
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    found = load_adapter(tmp_path)
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


def test_a_file_of_an_unknown_method_is_refused(params):
    _, _, adapter = trained(params, "ia3", {})
    with pytest.raises(InputError, match="`method` of the adapter .* lora, .* 'vera'"):
        apply_adapter(params, replace(adapter, method="vera"))


def test_a_file_of_an_unknown_activation_is_refused(params):
    _, _, adapter = trained(params, "series", {"size": 3})
    adapter = replace(adapter, settings={"activation": "snake"})
    with pytest.raises(InputError, match="`activation` of the adapter must be one of"):
        method_of_adapter(adapter)


def test_lora_files_without_options_are_of_the_usual_scale():
    pair = {"a": np.ones((2, 3, 4)), "b": np.ones((2, 4, 3))}
    adapter = Adapter(added={"up": pair}, method="lora", settings={"rank": 4})
    method = method_of_adapter(adapter)
    assert (method.rank, method.scale) == (4, 2.0)


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

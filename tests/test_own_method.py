"""Your own method is trained, saved, loaded, merged, evaluated and exported."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from test_adapters_laws import BATCH, MODEL, classify
from tiny_models import tiny_params
from tiny_run import tiny_settings, write_data, write_model

import sparse_jax
from sparse_jax import (
    Adapter,
    Compact,
    Dense,
    InputError,
    Layerwise,
    Sparse,
    Static,
    save_adapter,
)
from sparse_jax.methods.registry import METHODS
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.training.build import method_of


@dataclass(frozen=True, kw_only=True)
class Shift(sparse_jax.Method):
    """Adds a trained vector, times a factor, to the output of some linear maps."""

    sites: tuple[str, ...] = ("attention/output",)
    factor: float

    def added(self, params, key):
        """Returns {site: {"shift": ...}}, shape=(L, out), zero."""
        del key
        biases = {site: self._bias(params, site) for site in self.sites}
        return {site: {"shift": jnp.zeros(x.shape)} for site, x in biases.items()}

    def response(self, site, module, x, added, strength=1.0, *, key=None):
        """Returns the output plus the vector."""
        del key
        if site not in added:
            return module(x)
        y, shift = module(x), added[site]["shift"]
        return y + strength * self.factor * jnp.broadcast_to(shift, y.shape)

    def merge(self, params, added):
        """Returns parameters with the vectors added to the biases."""
        layers = params[self.stack]
        for site, arrays in added.items():
            part, name = site.split("/")
            bias = self._bias(params, site) + self.factor * arrays["shift"]
            site = {**layers[part][name], "bias": bias}
            layers = {**layers, part: {**layers[part], name: site}}
        return {**params, self.stack: layers}

    def to_peft(self, added):
        """Returns a form with a name of its own."""
        del added
        part = sparse_jax.PeftPart("shift_vector", lambda shift: shift)
        config = {"peft_type": "SHIFT", "factor": self.factor}
        return sparse_jax.PeftForm(config, {"shift": part})

    def _bias(self, params, site):
        part, name = site.split("/")
        return params[self.stack][part][name]["bias"]


@pytest.fixture(autouse=True, scope="module")
def registered():
    sparse_jax.register_method("shift", Shift, learning_rate=0.5, factor=3.0)
    yield
    del METHODS["shift"]


@pytest.fixture(scope="module")
def params():
    return tiny_params("bert", SequenceClassifier)


def few_layers(loss, method, tx):
    return Layerwise(loss, method, tx, sampler=Static.of(0, 1, num_layers=2))


@pytest.fixture(scope="module", params=[Compact, few_layers])
def trained(request, params):
    """Returns a tuner and its state after two steps."""
    method = Shift(factor=2.0, sites=("attention/output", "mlp/down"), dense="^class")
    tuner = request.param(classify, method, optax.sgd(0.1))
    state = tuner.init(params, jax.random.key(0))
    step, labels = jax.jit(tuner.step), jnp.array([0, 2, 1])
    for _ in range(2):
        state, _ = step(state, labels, jax.random.key(0))
    return tuner, state


@pytest.mark.quick(1)
def test_what_compact_trained_is_saved_and_comes_back(params, trained, tmp_path):
    tuner, state = trained
    path = tmp_path / "adapter.safetensors"
    sparse_jax.save_adapter(path, tuner.adapter(state, task="cola"))
    found = sparse_jax.load_adapter(path)
    assert (found.method, found.word, found.task) == (tuner.method, "shift", "cola")
    assert np.abs(found.added["mlp/down"]["shift"]).min() > 0
    changed, attachment = sparse_jax.apply_adapter(params, found)
    after = MODEL(changed, BATCH, attachment=attachment, unroll=1)
    before = MODEL(state.params, BATCH, attachment=tuner.attach(state), unroll=1)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)
    merged = MODEL(sparse_jax.merge_adapter(params, found), BATCH, unroll=1)
    np.testing.assert_allclose(merged, before, rtol=0, atol=1e-5)
    assert np.abs(before - MODEL(params, BATCH, unroll=1)).max() > 0.01


def test_its_adapter_is_exported(params, trained, tmp_path):
    tuner, state = trained
    adapter = tuner.adapter(state)
    sparse_jax.save_peft(tmp_path, adapter, MODEL)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["factor"]) == ("SHIFT", 2.0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.bert.encoder.layer.1.output.dense.shift_vector"
    np.testing.assert_array_equal(tensors[name], adapter.added["mlp/down"]["shift"][1])


def test_a_run_by_its_word_or_its_object_is_evaluated(tmp_path):
    write_model(tmp_path / "model")
    write_data(tmp_path / "data")
    place = (tmp_path / "model", tmp_path / "data")
    by_word = tiny_settings(*place, tmp_path / "word", method="shift", max_steps=2)
    metrics = sparse_jax.finetune(replace(by_word, learning_rate=None))
    assert metrics["learning_rate"] == 0.5
    data = str(tmp_path / "data")
    assert sparse_jax.evaluate_adapter(tmp_path / "word", data=data) == metrics["eval"]
    adapter = sparse_jax.load_adapter(tmp_path / "word")
    assert adapter.method == Shift(factor=3.0, dense=("^classifier/", "^pooler/"))
    by_object = tiny_settings(*place, tmp_path / "word", method=Shift(factor=1.5))
    made = by_object.record()["method"]
    assert (made["name"], made["factor"]) == ("shift", 1.5)
    head = ("^classifier/",)
    assert method_of(by_object, head) == Shift(factor=1.5, dense=head)


def test_a_class_without_a_word_is_not_stored(params, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Other(Shift):
        """Has no word."""

    method = Other(factor=1.0)
    added = jax.tree.map(np.asarray, method.added(params, jax.random.key(0)))
    adapter = sparse_jax.Adapter(added=added, method=method)
    sparse_jax.apply_adapter(params, adapter)
    with pytest.raises(InputError, match="a registered class, got Other. Register it"):
        sparse_jax.save_adapter(tmp_path / "adapter.safetensors", adapter)


def test_a_field_that_no_file_can_hold_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Rounded(Shift):
        """Has fields of two types."""

        scale: int | float = 1
        turn: Callable[[float], float] = round
        half: float = field(default=0.5, init=False)

    with pytest.raises(InputError, match="`turn` must be a value of JSON to be stored"):
        Rounded(factor=1.0).to_settings()
    method = Rounded(factor=1.0, scale=0.5, turn=None)
    assert Rounded.from_settings(method.to_settings(), "here") == method


BAD_LINES = {
    "a name that is taken": (("lora", Shift, {}), "`word` must be new, .* got 'lora'"),
    "a name of two": (("my shift", Shift, {}), "`word` must be new, .* got 'my shift'"),
    "no method": (("other", dict, {}), "`kind` must be a dataclass .* got <class 'di"),
    "an object": (("other", Shift(factor=1), {}), "`kind` must be a dataclass and a"),
    "no module": (("other", "nowhere:X", {}), "`kind` must be a class, .* 'nowhere:X'"),
    "no class": (("other", "math:pi", {}), "`kind` must be a dataclass and a"),
    "nothing fixed": (("other", Shift, {"fixed": ["factor"]}), "`fixed` must be names"),
    "one fixed": (("other", Shift, {"fixed": "factor"}), "`fixed` .*, got 'factor'"),
    "no field": (("other", Shift, {"rate": 1}), "`rate` must be a field of `Shift`"),
    "no rule": (("other", Shift, {"dense": 3}), "`dense` must be a text, or a seque"),
    "a rate of text": (("other", Shift, {"learning_rate": "x"}), "`learning_rate` mus"),
    "no rate": (("other", Shift, {"learning_rate": math.nan}), "`learning_rate` must"),
    "below zero": (("other", Shift, {"learning_rate": -1}), "`learning_rate` must be"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_of_the_table_is_refused(name):
    (word, kind, given), message = BAD_LINES[name]
    before = {**METHODS}
    with pytest.raises(InputError, match=message):
        sparse_jax.register_method(word, kind, **{"learning_rate": 1e-3, **given})
    assert before == METHODS


@pytest.mark.parametrize("word", [None, 3, b"x", ["a"], "", "Capital", "two words"])
def test_what_is_no_name_is_refused(word):
    registrations = (
        lambda: sparse_jax.register_method(word, Shift, learning_rate=1e-3),
        lambda: sparse_jax.register_score(word, lambda gradient, param: param),
        lambda: sparse_jax.register_sampler(word, Static),
    )
    for register in registrations:
        with pytest.raises(InputError, match="`word` must be new, and of lower-case"):
            register()


@pytest.mark.parametrize("name", ["dense", "also_dense"])
def test_a_rule_that_is_a_text_is_one_rule(name):
    sparse_jax.register_method("own", Shift, learning_rate=1, factor=1, **{name: "b$"})
    try:
        head = [] if name == "dense" else ["^classifier/"]
        assert METHODS["own"].make({}, ["^classifier/"]).dense == ("b$", *head)
    finally:
        del METHODS["own"]


def test_an_adapter_of_compact_takes_six_bytes_an_entry_in_bfloat16(tmp_path):
    weight = jax.random.normal(jax.random.key(0), (256, 256)).astype(jnp.bfloat16)
    loss = lambda params, batch, key, attachment: (jnp.sum(params["w"] ** 2), 1)
    method = sparse_jax.Sparse(density=0.05, stack=None)
    tuner = Compact(loss, method, optax.sgd(0.1))
    state = tuner.init({"w": weight}, jax.random.key(0))
    with pytest.raises(InputError, match="must have its supports, got one of `init`"):
        tuner.adapter(state)
    state, _ = tuner.select(state, None, jax.random.key(0))
    state, _ = tuner.step(state, None, jax.random.key(0))
    adapter = tuner.adapter(state)
    size = sparse_jax.save_adapter(tmp_path / "a.safetensors", adapter)
    assert 6 * 3277 < size < 6.5 * 3277  # ceil(0.05 * 65536) entries
    found = sparse_jax.load_adapter(tmp_path / "a.safetensors")
    changed, _ = sparse_jax.apply_adapter({"w": weight}, found)
    assert changed["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(changed["w"], state.params["w"])


def one_leaf(method):
    loss = lambda params, x, key, attachment: (jnp.sum((x @ params["w"]) ** 2), len(x))
    tuner = Compact(loss, method, optax.sgd(0.1))
    return tuner, tuner.init({"w": jnp.ones(4)}, jax.random.key(0))


def test_a_failed_selection_makes_no_adapter():
    tuner, state = one_leaf(Sparse(density=0.5, stack=None))
    state, finite = tuner.select(state, jnp.full((1, 4), jnp.nan), jax.random.key(0))
    assert not finite
    with pytest.raises(InputError, match="`state` must have its supports"):
        tuner.adapter(state)


def test_a_leaf_that_is_not_there_is_not_new():
    tuner, state = one_leaf(Dense(dense="w", stack=None))
    with pytest.raises(InputError, match="`new` must name leaves .* got 'nope'"):
        tuner.adapter(state, new=["nope"])


def test_a_support_that_no_reader_takes_is_not_written(tmp_path):
    zeros = np.zeros(3, np.int32)
    adapter = Adapter({"w": zeros}, {"w": np.ones(3, np.float32)}, method="sift")
    with pytest.raises(InputError, match="`w.* in `adapter` must hold ascending int32"):
        save_adapter(tmp_path / "adapter.safetensors", adapter)

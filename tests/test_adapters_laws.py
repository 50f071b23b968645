"""What every method that adds arrays to the layers has to keep."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import jax_batch, padded_batch, tiny_config, tiny_params

from sparse_jax import Attachment, Compact, InputError
from sparse_jax.methods.bottlenecks import PFEIFFER, Parallel, Series
from sparse_jax.methods.ia3 import IA3
from sparse_jax.methods.lora import DoRA, LoRA
from sparse_jax.methods.prefix import Prefix
from sparse_jax.models.attachment import LayerValues
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier

MODEL = Model(SequenceClassifier, BERT, tiny_config("bert"))
BATCH = jax_batch(padded_batch("bert"))
L, D, F = 2, 32, 48
HEAD = "^classifier/"

# name -> method, numbers that it adds
METHODS = {
    "lora": (LoRA(rank=3, where="query|down", dense=HEAD), L * 3 * (2 * D + F + D)),
    "rslora": (LoRA(rank=4, alpha=2, rslora=True, dense=HEAD), L * 4 * 4 * 2 * D),
    "dora": (
        DoRA(rank=3, where="query|down", dense=HEAD),
        L * (3 * (2 * D + F + D) + 2 * D),
    ),
    "series": (
        Series(size=5, dense=HEAD, activation=jnp.tanh),
        L * 2 * (2 * D * 5 + D + 5),
    ),
    "series, pfeiffer": (
        Series(size=5, where=PFEIFFER, dense=HEAD),
        L * (2 * D * 5 + D + 5),
    ),
    "parallel": (
        Parallel(size=5, where="mlp", scale=2.0, dense=HEAD, activation=jax.nn.gelu),
        L * ((D + F) * 5 + F + 5 + (F + D) * 5 + D + 5),
    ),
    "ia3": (IA3(dense=HEAD), L * (2 * D + F)),
    "prefix": (Prefix(length=4, dense=HEAD), L * 2 * 4 * D),
}
MERGED = ("lora", "rslora", "dora", "ia3")
every_method = pytest.mark.parametrize("name", METHODS)
# Each way to compute once, where a whole model has to be compiled.
KINDS = sorted({*METHODS} - {"rslora", "series, pfeiffer"})
every_kind = pytest.mark.parametrize("name", KINDS)


def attach(method, added, strength=1.0):
    respond = lambda site, module, x, trained, key: method.response(
        site, module, x, trained["added"], strength
    )
    return Attachment(trained={"added": added}, response=respond)


def logits_of(method, params, added, strength=1.0):
    attachment = attach(method, added, strength)
    return MODEL(params, BATCH, attachment=attachment, unroll=1)


def shaken(added, seed=1):
    """Returns arrays none of whose entries is at its start."""
    leaves, treedef = jax.tree.flatten(added)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = lambda leaf, key: leaf + 0.2 * jax.random.normal(key, leaf.shape)
    return jax.tree.unflatten(treedef, map(draw, leaves, keys))


@pytest.fixture(scope="module")
def params():
    return tiny_params("bert", SequenceClassifier)


@pytest.fixture(scope="module")
def base(params):
    return np.asarray(MODEL(params, BATCH, unroll=1))


@every_kind
@pytest.mark.quick(1)
def test_the_start_is_the_base_and_strength_damps(name, params, base):
    method, _ = METHODS[name]
    jitted = jax.jit(functools.partial(logits_of, method))
    run = lambda added, strength: jitted(params, added, strength)
    added = method.added(params, jax.random.key(0))
    # Keys and values of a prefix have their share of the attention at once.
    atol = 1e-6 if name != "prefix" else 0.05
    np.testing.assert_allclose(run(added, 1.0), base, rtol=0, atol=atol)
    changed = shaken(added)
    if isinstance(method, DoRA):
        # The magnitude is not damped, so it stays at its start here.
        changed = {s: {**changed[s], "m": added[s]["m"]} for s in changed}
    np.testing.assert_allclose(run(changed, 0.0), base, rtol=0, atol=1e-6)
    full, quarter = (np.abs(run(changed, s) - base).max() for s in (1.0, 0.25))
    assert full > 0.01
    assert 0 < quarter < full


@every_method
def test_the_arrays_are_as_many_as_the_formula_says(name, params):
    method, count = METHODS[name]
    arrays = jax.tree.leaves(jax.eval_shape(method.added, params, jax.random.key(0)))
    assert sum(leaf.size for leaf in arrays) == count
    assert {(leaf.shape[0], str(leaf.dtype)) for leaf in arrays} == {(L, "float32")}


@pytest.mark.parametrize("name", MERGED)
def test_merged_parameters_compute_what_the_attached_ones_do(name, params, base):
    method, _ = METHODS[name]
    added = shaken(method.added(params, jax.random.key(0)))
    attached = logits_of(method, params, added)
    merged = MODEL(method.merge(params, added), BATCH, unroll=1)
    assert np.abs(attached - base).max() > 0.01
    np.testing.assert_allclose(merged, attached, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted({*METHODS} - {*MERGED}))
def test_a_method_that_is_not_linear_says_how_to_serve_it(name, params):
    method, _ = METHODS[name]
    added = method.added(params, jax.random.key(0))
    with pytest.raises(InputError, match="must be linear .* Keep it attached"):
        method.merge(params, added)
    assert method.merge(params, {}) is params


def classify(params, batch, key, attachment):
    logits = MODEL(params, BATCH, attachment=attachment, unroll=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch)
    return losses.sum(), losses.size


@every_kind
@pytest.mark.quick(1)
def test_steps_of_the_compact_tier_move_every_array_and_lower_the_loss(name, params):
    tuner = Compact(classify, METHODS[name][0], optax.sgd(0.1))
    state = tuner.init(params, jax.random.key(0))
    # At the start half of the arrays have no gradient, because the others are zero.
    state = state._replace(added=shaken(state.added))
    labels, step = jnp.array([0, 2, 1]), jax.jit(tuner.step)
    first, metrics = step(state, labels, jax.random.key(0))
    _, later = step(first, labels, jax.random.key(0))
    assert later["loss"] < metrics["loss"]
    moves = jax.tree.map(lambda a, b: np.abs(a - b), first.added, state.added)
    for move in jax.tree.leaves(moves):
        assert (move.reshape(L, -1).max(axis=1) > 1e-7).all()


@every_method
def test_bfloat16_stays_bfloat16(name, params):
    method, _ = METHODS[name]
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    added = jax.eval_shape(method.added, low, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(added)} == {jnp.dtype("float32")}
    site = sorted(added)[0].replace("memory", "key")
    arrays = jax.tree.map(lambda leaf: jnp.ones(leaf.shape[1:]), added)
    layer = jax.tree.map(lambda leaf: leaf[0], low["layers"])
    part, which = site.split("/")
    kernel, bias = layer[part][which]["kernel"], layer[part][which]["bias"]
    module = Linear(kernel, bias)
    x = jnp.ones((2, 4, kernel.shape[0]), jnp.bfloat16)
    y = method.response(site, module, x, arrays)
    assert (y.shape, y.dtype) == ((2, 4, kernel.shape[1]), jnp.bfloat16)
    assert method.response("mlp/norm", lambda x: x, x, arrays) is x


class Linear:
    """A linear map as layers have it."""

    def __init__(self, kernel, bias=None):
        self.kernel, self.bias = kernel, bias

    def __call__(self, x):
        y = x @ self.kernel
        return y if self.bias is None else y + self.bias.reshape(1, 1, -1)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2, where="qwery"),
        DoRA(rank=2, where="qwery"),
        Series(size=2, where="qwery"),
        Parallel(size=2, where="qwery"),
        IA3(where="qwery"),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_rule_without_a_site_names_the_nearest_sites(method, params):
    message = "`where` must match at least one site, got 'qwery'. .*`attention/query`"
    with pytest.raises(InputError, match=message):
        method.added(params, jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0), "`rank` must be at least 1, got 0"),
        (lambda: LoRA(rank=1, alpha=0), "`alpha` must be positive, got 0"),
        (lambda: DoRA(rank=1, dropout=1.0), r"`dropout` must be in \[0, 1\), got 1.0"),
        (lambda: Series(size=0), "`size` must be at least 1, got 0"),
        (lambda: Prefix(length=0), "`length` must be at least 1, got 0"),
        (lambda: Parallel(size=4, scale=-1.0), "`scale` must be positive, got -1.0"),
    ],
)
def test_wrong_numbers_are_refused_at_once(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_a_rank_above_the_sides_of_a_kernel_is_refused(kind, params):
    method = kind(rank=33, where="query")
    with pytest.raises(InputError, match="at most 32, .* `attention/query`, got 33"):
        method.added(params, jax.random.key(0))


def test_a_site_is_not_scaled_twice(params):
    with pytest.raises(InputError, match="`feedforward` must match no site .*mlp/down"):
        IA3(where="down").added(params, jax.random.key(0))


def test_a_prefix_needs_keys():
    layers = {"mixer": {"up": {"kernel": jnp.zeros((2, 3, 3))}}}
    with pytest.raises(InputError, match="`params` must match .* `mixer/up`"):
        Prefix(length=2).added({"layers": layers}, jax.random.key(0))


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="`stack` must name .* The subtrees are w"):
        LoRA(rank=2).added({"w": jnp.zeros(3)}, jax.random.key(0))


def test_dropout_before_lora_needs_a_key():
    method = LoRA(rank=2, where="up", dropout=0.5)
    # The model's own dropout is off, so that only LoRA's is left.
    off = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
    model = Model(SequenceClassifier, BERT, replace(tiny_config("bert"), **off))
    params = tiny_params("bert", SequenceClassifier)
    added = jax.tree.map(jnp.ones_like, method.added(params, jax.random.key(0)))
    attachment = Attachment(LayerValues(added), response=method.respond)
    run = lambda key: model(params, BATCH, key=key, attachment=attachment, unroll=1)
    first, second, none = (run(k) for k in (jax.random.key(1), jax.random.key(2), None))
    assert bool(jnp.any(first != none)) and bool(jnp.any(first != second))

"""The encoder, its heads and its sites."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import (
    FAMILIES,
    jax_batch,
    padded_batch,
    tiny_config,
    tiny_params,
)

from sparse_jax.errors import InputError
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.attend import Mask
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.encoder import Attention
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import MaskedLM, SequenceClassifier
from sparse_jax.models.modules import product
from sparse_jax.models.stack import default_unroll
from sparse_jax.params.names import leaf_names

SITES = [
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/output",
    "attention/norm",
    "mlp/up",
    "mlp/down",
    "mlp/norm",
]

both_families = pytest.mark.parametrize("name", ["bert", "roberta"])


def tiny(name, head=SequenceClassifier, **changes):
    """Returns a model, its parameters and a batch."""
    model = Model(head, FAMILIES[name], tiny_config(name, **changes))
    return model, tiny_params(name, head), jax_batch(padded_batch(name))


@both_families
def test_every_leaf_under_layers_is_stacked(name):
    model, params, _ = tiny(name)
    shapes = {leaf.shape[0] for leaf in jax.tree.leaves(params["layers"])}
    assert shapes == {2}
    assert params["layers"]["mlp"]["up"]["kernel"].shape == (2, 32, 48)
    assert params["layers"]["attention"]["query"]["bias"].shape == (2, 32)


@pytest.mark.parametrize(
    ("name", "head", "leaves"),
    [
        ("bert", SequenceClassifier, {"pooler/kernel", "classifier/kernel"}),
        (
            "roberta",
            SequenceClassifier,
            {"classifier/dense/kernel", "classifier/out_proj/kernel"},
        ),
        ("bert", MaskedLM, {"lm_head/dense/kernel"}),
    ],
)
def test_kernels_of_the_head_have_these_names(name, head, leaves):
    names = jax.tree.leaves(leaf_names(tiny(name, head)[1]))
    of_head = {n for n in names if not n.startswith(("embeddings/", "layers/"))}
    assert {n for n in of_head if n.endswith("/kernel")} == leaves


def test_new_layers_start_different():
    params = tiny("bert")[0].init(jax.random.key(0))
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    assert abs(float(kernel.std()) - 0.02) < 0.002


def test_scan_unrolled_and_checkpointed_layers_are_equal():
    model, params, batch = tiny("bert")

    def loss(params, unroll, checkpoint):
        logits = model(params, batch, unroll=unroll, checkpoint=checkpoint)
        return jnp.sum(logits**2)

    run = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    expected = run(params, None, False)
    for unroll, checkpoint in [(1, False), (1, True)]:
        found = run(params, unroll, checkpoint)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7),
            found,
            expected,
        )


def test_shallow_stacks_are_unrolled_on_a_cpu_and_deep_ones_are_not():
    assert [default_unroll(depth) for depth in (6, 30)] == [6, 1]
    assert default_unroll(6, checkpoint=True) == 1


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3)])
def test_a_product_and_its_gradients_are_those_of_matmul(shape):
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (3, 5))

    def gradients(function):
        total = lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel)))
        return jax.value_and_grad(total, (0, 1))(x, kernel)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        gradients(product),
        gradients(jnp.matmul),
    )


@both_families
def test_padding_does_not_change_the_logits(name):
    model, params, batch = tiny(name)
    run = jax.jit(model)
    pad = lambda x, value: jnp.pad(x, ((0, 0), (0, 6)), constant_values=value)
    longer = {
        "input_ids": pad(batch["input_ids"], model.config.pad_id),
        "attention_mask": pad(batch["attention_mask"], 0),
        "token_type_ids": pad(batch["token_type_ids"], 0),
    }
    np.testing.assert_allclose(
        run(params, longer), run(params, batch), rtol=0, atol=1e-5
    )


@both_families
def test_a_sequence_of_padding_only_gives_finite_logits(name):
    model, params, batch = tiny(name)
    batch = {
        "input_ids": jnp.full_like(batch["input_ids"], model.config.pad_id),
        "attention_mask": jnp.zeros_like(batch["attention_mask"]),
    }
    assert jnp.all(jnp.isfinite(model(params, batch)))


@pytest.mark.parametrize(
    "rates",
    [
        {"hidden_dropout": 0.5, "attention_dropout": 0.0, "classifier_dropout": 0.0},
        {"hidden_dropout": 0.0, "attention_dropout": 0.5, "classifier_dropout": 0.0},
        {"hidden_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.5},
    ],
    ids=["hidden", "attention", "classifier"],
)
def test_only_a_key_turns_dropout_on(rates):
    model, params, batch = tiny("bert", **rates)
    run = jax.jit(functools.partial(model, unroll=1))
    # Keys of this kind compile in a tenth of the time of the default ones.
    first_key, second_key = (jax.random.key(i, impl="rbg") for i in (1, 2))
    plain = run(params, batch)
    first, again = (run(params, batch, key=first_key) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, plain, atol=1e-5)
    assert not np.allclose(first, run(params, batch, key=second_key), atol=1e-5)
    np.testing.assert_array_equal(plain, run(params, batch, key=None))


def test_the_head_of_roberta_drops_entries_only_with_a_key():
    _, params, _ = tiny("roberta")
    config = tiny_config("roberta", classifier_dropout=0.5)
    module = Model(SequenceClassifier, FAMILIES["roberta"], config).bind(params)
    x = jnp.ones((2, 32))
    np.testing.assert_array_equal(*module.classifier(x))
    dropped = module.classifier(x, key=jax.random.key(0, impl="rbg"))
    assert not np.array_equal(*dropped)


@pytest.mark.parametrize(("name", "drops"), [("bert", True), ("distilbert", False)])
def test_distilbert_drops_nothing_of_what_attention_returns(name, drops):
    config = tiny_config(name, hidden_dropout=0.5, attention_dropout=0.0)
    layer = Attention(config, nnx.Rngs(0))
    x = jnp.ones((1, 2, config.hidden_size))
    mask = Mask(jnp.ones((1, 1, 1, 2), bool))
    respond = lambda site, f, x: f(x)
    key = jax.random.key(0)
    first, second = (layer(x, mask, one, respond) for one in (key, None))
    assert bool(jnp.any(first != second)) == drops


def test_attention_with_a_key_and_tiny_dropout_is_attention():
    model, params, batch = tiny(
        "bert", hidden_dropout=0.0, attention_dropout=1e-9, classifier_dropout=0.0
    )
    key = jax.random.key(0, impl="rbg")
    dropped = jax.jit(model)(params, batch, key=key)
    np.testing.assert_allclose(dropped, model(params, batch), rtol=0, atol=1e-6)


def test_rates_of_zero_make_a_key_harmless():
    model, params, batch = tiny(
        "bert", hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0
    )
    with_key = model(params, batch, key=jax.random.key(0))
    np.testing.assert_array_equal(with_key, model(params, batch))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_an_attachment_sees_every_site_with_its_input(name):
    model, params, batch = tiny(name)
    seen = {}

    def response(site, module, x, trained, key):
        y = module(x)
        seen[site] = (x.shape, None if y is None else y.shape, trained.shape)
        return y

    attachment = Attachment(jnp.zeros((2, 5)), response=response)
    jax.eval_shape(lambda: model(params, batch, attachment=attachment))
    # A layer of its own remembers nothing.
    assert seen.pop("attention/memory") == ((3, 9, 32), None, (5,))
    assert list(seen) == SITES
    assert seen["mlp/up"] == ((3, 9, 32), (3, 9, 48), (5,))
    assert seen["mlp/down"] == ((3, 9, 48), (3, 9, 32), (5,))


@pytest.mark.parametrize("site", SITES)
def test_a_response_is_added_at_its_site_in_its_layer(site):
    model, params, batch = tiny("bert")
    # Doubling the output of a site equals doubling its kernel and bias.
    factors = jnp.array([1.0, 2.0])
    response = lambda name, module, x, factor, key: (
        module(x) * factor if name == site else module(x)
    )
    attached = model(
        params,
        batch,
        attachment=Attachment(factors, response=response),
        unroll=1,
    )
    block, linear = site.split("/")
    leaves = params["layers"][block][linear]
    params["layers"][block][linear] = jax.tree.map(
        lambda leaf: leaf * factors.reshape(2, *[1] * (leaf.ndim - 1)), leaves
    )
    np.testing.assert_allclose(attached, model(params, batch), rtol=0, atol=1e-6)


def test_an_attachment_replaces_the_weights_of_each_layer():
    model, params, batch = tiny("bert")
    trained = params["layers"]
    hidden = {**params, "layers": jax.tree.map(jnp.zeros_like, trained)}
    attachment = Attachment(trained, weights=lambda layer_params, trained: trained)
    np.testing.assert_array_equal(
        model(hidden, batch, attachment=attachment), model(params, batch)
    )


def test_gradients_reach_what_an_attachment_trains():
    model, params, batch = tiny("bert")
    response = lambda site, module, x, bias, key: (
        module(x) + bias[None, None] if site == "attention/value" else module(x)
    )

    def loss(trained):
        return model(
            params, batch, attachment=Attachment(trained, response=response)
        ).sum()

    gradient = jax.grad(loss)(jnp.zeros((2, 32)))
    assert bool(jnp.all(jnp.abs(gradient).sum(axis=1) > 0))


@both_families
@pytest.mark.parametrize("head", [SequenceClassifier, MaskedLM])
def test_bfloat16_parameters_compute_in_bfloat16_and_give_float32(name, head):
    model, params, batch = tiny(name, head)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    dtypes = set()

    def response(site, module, x, trained, key):
        y = module(x)
        dtypes.update((x.dtype, x.dtype if y is None else y.dtype))
        return y

    logits = model(half, batch, attachment=Attachment(response=response))
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, model(params, batch), rtol=0, atol=0.05)


def test_a_float32_response_keeps_the_dtype_of_the_stack():
    model, params, batch = tiny("bert")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    response = lambda site, module, x, factor, key: (
        module(x) if site == "attention/memory" else module(x) * factor
    )
    attachment = Attachment(jnp.ones(2), response=response)
    assert model(half, batch, attachment=attachment, unroll=1).dtype == jnp.float32


@both_families
def test_masked_lm_scores_only_the_positions_asked_for(name):
    model, params, batch = tiny(name, MaskedLM)
    positions = jnp.array([[0, 8], [3, 1], [2, 2]])
    logits = model(params, batch)
    assert logits.shape == (3, 9, 50)
    expected = jnp.take_along_axis(logits, positions[:, :, None], axis=1)
    chosen = model(params, batch, positions=positions)
    np.testing.assert_allclose(chosen, expected, rtol=0, atol=1e-6)


def test_roberta_counts_tokens_from_the_pad_id():
    ids = jnp.array([[0, 7, 8, 2, 1, 1]])
    found = FAMILIES["roberta"].position_ids(ids, 1)
    assert found.tolist() == [[2, 3, 4, 5, 1, 1]]


@both_families
def test_the_longest_sequence_is_finite_and_one_more_is_not(name):
    model, params, _ = tiny(name)
    ids = jnp.full((1, model.config.max_positions + 1), 5)
    run = jax.jit(functools.partial(model, unroll=1))
    longer = run(params, {"input_ids": ids, "attention_mask": ids})
    longest = {"input_ids": ids[:, :-1], "attention_mask": ids[:, :-1]}
    assert jnp.all(jnp.isfinite(run(params, longest)))
    assert jnp.all(jnp.isnan(longer))


def test_equal_models_are_one_static_argument():
    first, params, batch = tiny("bert")
    second = Model(SequenceClassifier, FAMILIES["bert"], tiny_config("bert"))
    assert first == second and hash(first) == hash(second)
    run = jax.jit(lambda model, params, batch: model(params, batch), static_argnums=0)
    run(first, params, batch)
    run(second, params, batch)
    assert run._cache_size() == 1


def test_abstract_parameters_have_the_shapes_of_new_ones():
    model, _, _ = tiny("bert")
    params = model.init(jax.random.key(0), jnp.bfloat16)
    describe = lambda leaf: (leaf.shape, leaf.dtype)
    expected = jax.tree.map(describe, model.abstract(jnp.bfloat16))
    assert jax.tree.map(describe, params) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "`num_heads` must divide `hidden_size`, got 5"),
        ({"hidden_act": "mish"}, "`hidden_act` must be one of gelu, .*got 'mish'"),
        ({"num_labels": 0}, "`num_labels` must be a whole number from 1"),
        ({"label_names": ("a",)}, "`label_names` must have one name for each of the 3"),
    ],
)
def test_a_configuration_that_cannot_be_built_says_why(changes, message):
    with pytest.raises(InputError, match=message):
        tiny_config("bert", **changes)


def test_roberta_has_512_usable_positions():
    config = EncoderConfig(
        vocab_size=50265,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        max_positions=514 - 2,
        position_offset=2,
        pad_id=1,
    )
    model = Model(SequenceClassifier, FAMILIES["roberta"], config)
    table = model.abstract()["embeddings"]["position"]["embedding"]
    assert (config.max_positions, table.shape) == (512, (514, 768))


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_a_batch_that_lacks_an_array_is_refused(name):
    model = Model(SequenceClassifier, FAMILIES["bert"], tiny_config("bert"))
    batch = {
        "input_ids": jnp.ones((1, 3), int),
        "attention_mask": jnp.ones((1, 3), int),
    }
    del batch[name]
    with pytest.raises(InputError, match=f"got no `{name}` beside"):
        jax.eval_shape(model, model.abstract(), batch)

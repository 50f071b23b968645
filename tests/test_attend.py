"""Attention in parts is attention at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_text import tiny_decoder

from sparse_jax.models import attend as module
from sparse_jax.models.attend import Mask, attend, recompute_scores

BATCH, LENGTH, HEADS, GROUPS, WIDTH = 2, 13, 4, 2, 8


def arrays():
    """Returns queries, keys, values, a bias of the keys, one of all, and a mask."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    padded = np.arange(LENGTH) >= np.array([[0], [4]])
    causal = np.tri(LENGTH, dtype=bool)
    return {
        "q": draw(BATCH, LENGTH, HEADS, WIDTH),
        "k": draw(BATCH, LENGTH, GROUPS, WIDTH),
        "v": draw(BATCH, LENGTH, GROUPS, WIDTH),
        "of keys": draw(1, HEADS, 1, LENGTH),
        "of all": draw(BATCH, HEADS, LENGTH, LENGTH),
        "causal": jnp.asarray(causal & padded[:, None])[:, None],
        "of tokens": jnp.asarray(padded)[:, None, None],
    }


@pytest.mark.parametrize("mask", ["causal", "of tokens"])
@pytest.mark.parametrize(
    ("bias", "cap"), [(None, None), ("of keys", None), ("of all", None), (None, 0.5)]
)
@pytest.mark.quick(1)
def test_attention_in_parts_is_attention_at_once(bias, cap, mask, monkeypatch):
    found = arrays()

    # A few of the first rows see no key; what they mix is nobody's concern.
    seen = found["causal"].any(axis=-1)[:, 0, :, None, None]

    def total(q, k, v):
        options = (found.get(bias), Mask(found[mask]), 0.0, None)
        mixed = attend(q, k, v, *options, cap=cap)
        return jnp.sum(jnp.where(seen, jnp.sin(mixed), 0)), mixed

    grad = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    args = found["q"], found["k"], found["v"]
    (_, whole), grads = grad(*args)
    # 13 queries in parts of 5, of which the last has two that are padding.
    monkeypatch.setattr(module, "_FEWEST_QUERIES", 6)
    monkeypatch.setattr(module, "_MOST_SCORES", 1)
    (_, parts), grads_of_parts = grad(*args)
    where = np.broadcast_to(seen, whole.shape)
    np.testing.assert_allclose(parts[where], whole[where], rtol=1e-5, atol=1e-6)
    for one, other in zip(grads, grads_of_parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_parts_hold_fewer_scores(monkeypatch):
    length = 512
    q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    mask = jnp.tri(length, dtype=bool)[None, None]

    def temporaries():
        total = lambda q: jnp.sum(attend(q, q, q, None, Mask(mask), 0.0, None))
        compiled = jax.jit(jax.grad(total)).lower(q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    at_once = temporaries()
    monkeypatch.setattr(module, "_MOST_SCORES", 1)
    assert temporaries() < at_once / 2


@pytest.mark.parametrize(
    ("keys", "again", "keeps"),
    [(32, True, False), (31, True, True), (32, False, True)],
    ids=["many keys", "fewer than 4 for each number of a head", "not in a loop"],
)
def test_scores_are_kept_for_the_backward_pass(keys, again, keeps):
    def mix(q, k):
        with recompute_scores(again):
            return attend(q, k, k, None, Mask(jnp.ones((1, 1, 1, keys), bool)), 0, None)

    q, k = jnp.ones((2, 16, HEADS, WIDTH)), jnp.ones((2, keys, HEADS, WIDTH))
    _, pull = jax.vjp(mix, q, k)
    scores = 2 * HEADS * 16 * keys
    assert any(leaf.size == scores for leaf in jax.tree.leaves(pull)) is keeps


def test_layers_in_a_loop_keep_no_scores(monkeypatch):
    model, params = tiny_decoder()
    rows, length = 4, model.config.max_positions
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 10, (rows, length)))
    batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}

    def gradient():
        total = lambda params: jnp.sum(jnp.sin(model(params, batch, unroll=1)))
        compiled = jax.jit(jax.grad(total)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    again, memory = gradient()
    monkeypatch.setattr(module, "_MANY_KEYS", length)
    kept, more = gradient()
    for one, other in zip(*map(jax.tree.leaves, (again, kept)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    scores = 4 * rows * model.config.num_heads * length**2  # bytes of a layer
    assert more - memory > 3 * scores


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("bias", [None, "of all"])
def test_recomputed_scores_have_the_same_gradients(bias, cap, monkeypatch):
    monkeypatch.setattr(module, "_MANY_KEYS", 1)
    found = arrays()

    def total(again, q, k, v):
        options = (found.get(bias), Mask(found["of tokens"]), 0.0, None)
        with recompute_scores(again):
            return jnp.sum(jnp.sin(attend(q, k, v, *options, cap=cap)))

    args = found["q"], found["k"], found["v"]
    for argnum in (1, 2, 3):
        kept, again = (jax.grad(total, argnum)(a, *args) for a in (False, True))
        np.testing.assert_allclose(again, kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "recomputed"),
    [({"unroll": 1}, 1), ({"unroll": 4}, 0), ({"checkpoint": True}, 1)],
    ids=["scores in a loop", "nothing of unrolled layers", "the layer alone"],
)
def test_what_a_stack_recomputes(options, recomputed):
    model, params = tiny_decoder()
    ids = jnp.ones((1, model.config.max_positions), jnp.int32)
    batch = {"input_ids": ids, "attention_mask": ids}
    traced = jax.make_jaxpr(lambda params: model.hidden(params, batch, **options))
    assert str(traced(params)).count("prevent_cse=") == recomputed

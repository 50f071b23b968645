"""With 64-bit types enabled everything works as Optax does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax import (
    LANE,
    Compact,
    Dense,
    DoRA,
    GradientNorm,
    Importance,
    Layerwise,
    LoRA,
    Prefix,
    Sparse,
    ist,
    sift,
)
from sparse_jax.models.heads import SequenceClassifier
from tests.tiny_models import FAMILIES, Model, tiny_config

SIZES = {"num_layers": 4, "num_active": 2}


def layered(inner, **options):
    tx = ist(inner, layer_of="^w$", key=jax.random.key(0), **SIZES, **options)
    update = lambda updates, state, params: tx.update(
        updates, state, params, value_fn=lambda strength: strength.mean()
    )
    return optax.GradientTransformation(tx.init, update)


ADAM = optax.adam(0.1)
LANES = {"granularity": LANE, "where": "w", "stacked": "w", "reselect_every": 2}
TRANSFORMS = {
    "adafactor": sift(optax.adafactor(0.1), 0.1),
    "prodigy": sift(optax.contrib.prodigy(1.0), 0.1),
    "schedule": sift(optax.adam(optax.cosine_decay_schedule(0.1, 9)), 0.1),
    "dense": sift(ADAM, 0.1, where="w", dense="b"),
    "several": sift(ADAM, 0.1, select_batches=2),
    "again": sift(ADAM, 0.1, stacked="w", reselect_every=2),
    "random": sift(ADAM, 0.1, score="random", key=jax.random.key(0)),
    "original": sift(ADAM, 0.1, compat="torch-sift"),
    "masking": sift(density=0.1),
    "lanes": sift(ADAM, 0.1, **LANES),
    "ist": layered(ADAM, probe_every=1, restart=True),
    "ist of prodigy": layered(optax.contrib.prodigy(1.0)),
    "norms": layered(ADAM, sampler=GradientNorm(**SIZES)),
    "cyclic": layered(sift(ADAM, 0.1), sampler="cyclic"),
}


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.quick(3)
def test_an_update_keeps_the_types_of_the_state(tx, dtype):
    with jax.enable_x64(True):
        shapes = {"w": (4, 128, 2), "b": (6,), "s": ()}
        params = {
            name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()
        }
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(params)


def test_float64_weights_are_trained_in_float64():
    with jax.enable_x64(True):
        w = jnp.array([1.0, 2.0, 3.0, 4.0])
        grad = jnp.array([0.1, -0.4, 0.3, 1e-9])
        tx = sift(optax.adamw(1e-9, weight_decay=0.1), density=0.5)
        update, state = tx.update(grad, tx.init(w), w)
        # By hand: the first step of Adam is g / (|g| + 1e-8), and the decay 0.1 w.
        step = grad / (abs(grad) + 1e-8) + 0.1 * w
        expected = jnp.where(jnp.array([False, True, True, False]), -1e-9 * step, 0.0)
        assert update.dtype == jnp.float64 and state.support.tolist() == [1, 2]
        np.testing.assert_allclose(update, expected, rtol=1e-12)


def loss_of(params, batch, key, attachment):
    model = Model(SequenceClassifier, FAMILIES["bert"], tiny_config("bert"))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(params, inputs, key=key, attachment=attachment, unroll=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.astype(jnp.result_type(float)).sum(), batch["labels"].shape[0]


METHODS = {
    "sift": Sparse(density=0.1, where="(query|down)/kernel", dense="classifier"),
    "lora": LoRA(rank=2, dense="classifier"),
    "dora": DoRA(rank=2),
    "prefix": Prefix(length=2),
    "full": Dense(dense=".*"),
}
SAMPLERS = {
    "all layers": None,
    "ist": Importance(num_layers=2, num_active=1, num_probes=2, probe_every=1),
    "norms": GradientNorm(num_layers=2, num_active=1),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.quick(3)
def test_the_compact_tier_keeps_the_types_of_its_state(method, sampler):
    kind = Compact if sampler is None else Layerwise
    options = {} if sampler is None else {"sampler": sampler, "max_norm": 1.0}
    with jax.enable_x64(True):
        tuner = kind(loss_of, method, optax.adamw(1e-3), accumulate=2, **options)
        model = Model(SequenceClassifier, FAMILIES["bert"], tiny_config("bert"))
        ids = jax.ShapeDtypeStruct((2, 3, 5), jnp.int32)
        labels = jax.ShapeDtypeStruct((2, 3), jnp.int32)
        batch = {"input_ids": ids, "attention_mask": ids, "labels": labels}
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(tuner.init, model.abstract(jnp.bfloat16), key)
        chosen, _ = jax.eval_shape(tuner.select, state, batch, key)
        after, metrics = jax.eval_shape(tuner.step, chosen, batch, key)
        assert types(after) == types(chosen)
        assert metrics["loss"].dtype == jnp.float32

"""Methods that add arrays, a few layers at a time: the gradients of the whole."""

import jax
import numpy as np
import optax
import pytest
from test_adapters_laws import METHODS, L, classify, every_kind, shaken
from tiny_models import tiny_params

from sparse_jax import Compact, Importance, Layerwise
from sparse_jax.models.heads import SequenceClassifier


@every_kind
@pytest.mark.quick(1)
def test_an_active_layer_moves_as_if_all_were(name):
    method, tx = METHODS[name][0], optax.sgd(0.1)
    params = tiny_params("bert", SequenceClassifier)
    sampler = Importance(num_layers=L, num_active=1, num_probes=2, probe_every=1)
    labels, key = np.array([0, 2, 1]), jax.random.key(0)

    def step(tuner):
        state = tuner.init(params, key)
        state = state._replace(added=shaken(state.added))
        return jax.jit(tuner.step)(state, labels, key)

    state, metrics = step(Layerwise(classify, method, tx, sampler=sampler))
    expected, _ = step(Compact(classify, method, tx))
    (layer,) = metrics["active"]
    start = shaken(method.added(params, key))
    for ours, theirs, before in zip(
        *map(jax.tree.leaves, (state.added, expected.added, start)), strict=True
    ):
        np.testing.assert_allclose(ours[layer], theirs[layer], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(ours[1 - layer], before[1 - layer])

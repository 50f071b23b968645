"""Layers of several kinds in one stack: tiers and meshes agree."""

import functools

import jax
import numpy as np
import optax
import pytest
from test_sharding import MESHES, random_batch
from tiny_text import CONFIG, random_params

from sparse_jax import Compact, Layerwise, LoRA, Static
from sparse_jax.errors import InputError
from sparse_jax.methods.sparse import Sparse
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import DecoderConfig, LayerKind
from sparse_jax.models.families.gemma import GEMMA3
from sparse_jax.models.functional import Model
from sparse_jax.sharding.mesh import make_mesh, mesh_of
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.runner import MeshRunner
from sparse_jax.training.objective import make_token_loss

NEAR, FAR = LayerKind(sliding_window=4, rope_theta=1e2), LayerKind(rope_theta=1e4)
SIZES = {
    name: getattr(CONFIG, name)
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_size", "intermediate_size", "max_positions")
}  # fmt: skip
MODEL = Model(
    CausalLM,
    GEMMA3,
    DecoderConfig(
        **SIZES, kinds=(NEAR, FAR), layer_kinds=(0, 0, 1, 0), norms_heads=True,
        has_post_norms=True, norm_offset=1.0, tied=True, logit_softcap=5.0,
    ),
)  # fmt: skip
METHODS = {
    "sift": Sparse(density=0.1, where="^layers/(attention/query|mlp/up)/kernel"),
    "lora": LoRA(rank=2, where="^attention/(query|value)$"),
}
EVERY = Static.of(0, 1, 2, 3, num_layers=4)
TWO = Static.of(1, 2, num_layers=4)


@functools.cache
def run(name, sampler, mesh):
    """Returns the losses and the last values of three updates."""
    mesh = mesh_of(None) if mesh is None else make_mesh(MESHES[mesh])
    placement = Placement.of(MODEL.abstract(), mesh)
    options = {"shards": placement.shards("layers"), "data_axes": placement.data_axes}
    args = make_token_loss(MODEL), METHODS[name], optax.adam(1e-2)
    if sampler is None:
        tuner = Compact(*args, **options)
    else:
        tuner = Layerwise(*args, sampler=sampler, **options)
    runner = MeshRunner(tuner, placement)
    params = jax.device_put(random_params(MODEL), placement.params)
    batch = placement.put(random_batch(), 1)
    state = runner.init(params, jax.random.key(0))
    state, finite = runner.select(state, batch, jax.random.key(1))
    assert finite
    losses = []
    for step in range(3):
        state, metrics = runner.step(state, batch, jax.random.key(step))
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, (state.params, state.added))


@pytest.mark.parametrize("name", ["sift", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((None, None), (EVERY, None)),
        ((TWO, None), (TWO, "all")),
        pytest.param((None, None), (None, "all"), marks=pytest.mark.slow),
    ],
    ids=["slots", "slots on a mesh", "mesh"],
)
@pytest.mark.slow
def test_an_update_has_the_same_numbers(first, second, name):
    losses, values = run(name, *first)
    assert losses[-1] < losses[0]
    others, found = run(name, *second)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    jax.tree.map(close, found, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_kinds": (0, 1, 2, 0)}, r"have each of 0 to 1 for 2 `kinds`"),
        ({"layer_kinds": (0, 0, 0, 0)}, r"got \(0, 0, 0, 0\)"),
        ({"layer_kinds": None}, r"got None"),
        ({"layer_kinds": (0, 1)}, r"one kind for each of the 4 layers, got 2"),
        ({"kinds": (FAR,), "layer_kinds": (0,) * 4}, r"None for one, got \(0, 0"),
    ],
)
def test_every_layer_has_a_kind(changes, message):
    kinds = {"kinds": (NEAR, FAR), "layer_kinds": (0, 0, 1, 0)}
    with pytest.raises(InputError, match=f"`layer_kinds` must .*{message}"):
        DecoderConfig(**SIZES, **{**kinds, **changes})

"""Runs on a mesh of eight simulated devices: the numbers of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from tiny_text import CONFIG, tiny_decoder

from sparse_jax import ENTRY, Compact, Importance, Layerwise, LoRA
from sparse_jax.errors import InputError
from sparse_jax.methods.dense import Dense
from sparse_jax.methods.sparse import Sparse
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.hf.pretrained import save_pretrained
from sparse_jax.models.next_token import summed_token_loss
from sparse_jax.params.names import map_named
from sparse_jax.sharding.mesh import MeshShape, make_mesh, mesh_of, parse_mesh
from sparse_jax.sharding.placement import Placement, load_placed
from sparse_jax.sharding.rules import specs_of
from sparse_jax.sharding.runner import MeshRunner
from sparse_jax.supports.positions import fetch, shards_of
from sparse_jax.training.objective import make_token_loss

MESHES = {
    "data": MeshShape(data=8),
    "fsdp": MeshShape(fsdp=8),
    "fsdp, tensor": MeshShape(fsdp=4, tensor=2),
    "all": MeshShape(data=2, fsdp=2, tensor=2),
    "sequence": MeshShape(data=2, tensor=2, sequence=2),
    "sequence, fsdp": MeshShape(fsdp=2, sequence=4),
}
# One matrix of each direction. Every sparse leaf has a program of its own; "sift with
# words" has all of them.
WHERE = "^layers/(attention/query|mlp/down)/kernel"
METHODS = {
    "sift": Sparse(density=0.1, where=WHERE),
    "sift with words": Sparse(density=0.05, where="kernel|embedding", dense="norm"),
    "magnitude": Sparse(density=0.1, where=WHERE, score="magnitude"),
    "random": Sparse(density=0.1, where=WHERE, score="random"),
    "lora": LoRA(rank=2, where="^attention/(query|value)$"),
    "full": Dense(dense=".*"),
}
ONE_LEAF = Sparse(density=0.1, where="^layers/mlp/up/kernel")


def random_batch(accumulate=1):
    random = np.random.default_rng(0)
    ids = random.integers(0, CONFIG.vocab_size, (16, 12)).astype(np.int32)
    lengths = random.integers(6, 13, 16)[:, None]
    mask = (np.arange(12) < lengths).astype(np.int32)
    weights = (mask * (np.arange(12) > 2)).astype(np.float32)
    batch = {"input_ids": ids, "attention_mask": mask, "weights": weights}
    if accumulate > 1:
        batch = {k: v.reshape(accumulate, -1, 12) for k, v in batch.items()}
    return batch


def tuner_of(method, placement=None, dtype=jnp.float32, sampler=None, **options):
    model, params = tiny_decoder()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    # At 1e-2 the last of 50 updates multiply a difference in rounding by five each: one
    # ulp in the params becomes 3e-5 in the loss. In float64 meshes agree to 2e-14.
    loss, tx = make_token_loss(model), optax.adamw(5e-3)
    if placement is not None:
        options["shards"] = placement.shards("layers")
        options["data_axes"] = placement.data_axes
    if sampler is None:
        return Compact(loss, method, tx, **options), params
    return Layerwise(loss, method, tx, sampler=sampler, **options), params


@functools.cache
def on_one(method, steps, **options):
    """Returns losses and the last state of one device."""
    return on_mesh(method, steps, None, **options)


def on_mesh(method, steps, shape, kind=AxisType.Auto, **options):
    """Returns losses and the last state of a mesh, of one device without a shape."""
    mesh = mesh_of(None) if shape is None else make_mesh(shape, axis_type=kind)
    placement = Placement.of(tiny_decoder()[0].abstract(), mesh)
    tuner, params = tuner_of(method, placement, **options)
    params = jax.device_put(params, placement.params)
    accumulate = options.get("accumulate", 1)
    put = lambda batch: placement.put(batch, accumulate)
    return run(MeshRunner(tuner, placement), params, put, steps, options)


def run(runner, params, put, steps, options):
    batch = put(random_batch(options.get("accumulate", 1)))
    state = runner.init(params, jax.random.key(0))
    state, finite = runner.select(state, batch, jax.random.key(1))
    assert finite
    losses = []
    for step in range(steps):
        state, metrics = runner.step(state, batch, jax.random.key(step))
        losses.append(float(metrics["loss"]))
    return losses, state


def supports_of(state):
    """Returns the positions in whole leaves, by name."""
    found = {}

    def add(name, support, leaf):
        if not isinstance(support, optax.MaskedNode):
            layout = ENTRY.sharded(shards_of(leaf, name.startswith("layers/")))
            found[name] = layout.to_positions(fetch(support), leaf.shape)[0]

    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    map_named(add, state.support, state.params, is_leaf=is_masked)
    return found


def assert_same(one, other, tolerance=1e-5):
    np.testing.assert_allclose(one[0], other[0], rtol=tolerance, atol=tolerance)
    first, second = supports_of(one[1]), supports_of(other[1])
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=30 * tolerance
        ),
        one[1].params,
        other[1].params,
    )


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        pytest.param("data", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("fsdp", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("fsdp, tensor", AxisType.Auto, marks=pytest.mark.slow),
        ("all", AxisType.Auto),
        ("sequence", AxisType.Auto),
        pytest.param("sequence, fsdp", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("all", AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
@pytest.mark.quick(1)
def test_sift_on_a_mesh_has_the_numbers_of_one_device(mesh, kind):
    method = METHODS["sift"]
    one, many = on_one(method, 50), on_mesh(method, 50, MESHES[mesh], kind)
    assert_same(one, many)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("sift with words", marks=pytest.mark.slow),
        pytest.param("magnitude", marks=pytest.mark.slow),
        "random",
        "lora",
        "full",
    ],
)
@pytest.mark.quick(1)
def test_every_method_on_a_mesh_has_the_numbers_of_one_device(name):
    # Trained words amplify rounding, from 1e-7 by a factor of ten in ten updates: after
    # 25 (jax 0.12) or 44 (jax 0.10) of them it reaches the fourth digit.
    steps = 20 if name in ("sift with words", "full") else 50
    method = METHODS[name]
    assert_same(on_one(method, steps), on_mesh(method, steps, MESHES["all"]))


SAMPLERS = {
    "sift, ist": METHODS["sift"],
    "lora, ist": METHODS["lora"],
}


@pytest.mark.parametrize(
    "name", ["sift, ist", pytest.param("lora, ist", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_layers_on_a_mesh_are_those_of_one_device(name):
    sampler = Importance(num_layers=4, num_active=2, num_probes=3, probe_every=2)
    method = SAMPLERS[name]
    one = on_one(method, 50, sampler=sampler)
    many = on_mesh(method, 50, MESHES["all"], sampler=sampler)
    assert_same(one, many)
    for first, second in zip(
        jax.tree.leaves(one[1].opt_state.sampler),
        jax.tree.leaves(many[1].opt_state.sampler),
        strict=True,
    ):
        if jnp.issubdtype(first.dtype, jax.dtypes.prng_key):
            first, second = map(jax.random.key_data, (first, second))
        np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.slow
def test_coarse_weights_keep_masters_on_the_mesh():
    options = {"dtype": jnp.bfloat16}
    one = on_one(ONE_LEAF, 3, **options)
    many = on_mesh(ONE_LEAF, 3, MESHES["all"], **options)
    # Gradients are rounded to bfloat16 before they are summed.
    np.testing.assert_allclose(one[0], many[0], rtol=2e-2)
    masters = many[1].masters["layers"]["mlp"]["up"]["kernel"]
    support = many[1].support["layers"]["mlp"]["up"]["kernel"]
    assert masters.dtype == jnp.float32
    assert masters.sharding.spec == support.sharding.spec
    split = on_mesh(ONE_LEAF, 3, MESHES["all"], split_masters=True, **options)
    assert split[0] == many[0]
    halves = split[1].masters["layers"]["mlp"]["up"]["kernel"]
    assert halves.dtype == jnp.int16
    assert halves.sharding.spec == support.sharding.spec
    jax.tree.map(np.testing.assert_array_equal, split[1].params, many[1].params)
    same = split[1].opt_state, many[1].opt_state
    jax.tree.map(np.testing.assert_array_equal, *same)


@pytest.mark.slow
def test_micro_batches_are_cut_over_the_mesh():
    one = on_one(ONE_LEAF, 3, accumulate=2)
    many = on_mesh(ONE_LEAF, 3, MESHES["all"], accumulate=2)
    assert_same(one, many)


# Bytes of an entry in the text of a program.
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}


def collectives(text):
    """Returns (kind, bytes of what comes out) of every collective of a program."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = []
    for shapes, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text):
        size = 0
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size += BYTES[dtype] * int(np.prod([int(d) for d in dims.split(",") if d]))
        found.append((kind, size))
    return found


def compiled_step(method, shape):
    """Returns the compiled step of a method on a mesh, and a state."""
    mesh = make_mesh(shape)
    placement = Placement.of(tiny_decoder()[0].abstract(), mesh)
    tuner, params = tuner_of(method, placement)
    runner = MeshRunner(tuner, placement)
    batch, key = placement.put(random_batch()), jax.random.key(0)
    state = runner.init(jax.device_put(params, placement.params), key)
    state, _ = runner.select(state, batch, key)
    where = placement.state(tuner.roles(state.params), state), placement.at(jax.P())
    with jax.set_mesh(mesh):
        step = jax.jit(tuner.step, donate_argnums=0, out_shardings=where)
        return step.lower(state, batch, key).compile(), state


@pytest.mark.parametrize("name", ["sift", "lora", "full"])
@pytest.mark.quick(1)
def test_replicas_exchange_what_is_trained_and_no_more(name):
    program, state = compiled_step(METHODS[name], MESHES["data"])
    trained = {
        "sift": sum(leaf.size for leaf in jax.tree.leaves(state.support)),
        "lora": sum(leaf.size for leaf in jax.tree.leaves(state.added)),
        "full": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }[name]
    found = collectives(program.as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    payload = sum(size for _, size in found)
    assert 4 * trained <= payload < 1.1 * 4 * trained


def test_no_weight_has_a_second_copy_on_the_mesh():
    program, state = compiled_step(METHODS["sift"], MESHES["fsdp, tensor"])
    shard = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves((state.params, state.opt_state))
    )
    assert program.memory_analysis().alias_size_in_bytes >= shard
    for leaf in jax.tree.leaves(state.opt_state):
        if leaf.ndim == 3:
            assert leaf.sharding.spec[1] in (("fsdp", "tensor"), ("tensor", "fsdp"))


@pytest.mark.slow
def test_supports_that_are_too_short_are_made_again(monkeypatch):
    monkeypatch.setattr("sparse_jax.sharding.runner._HEADROOM", 0.01)
    monkeypatch.setattr("sparse_jax.supports.entries._REGISTER", 1)
    one, many = on_one(ONE_LEAF, 2), on_mesh(ONE_LEAF, 2, MESHES["fsdp"])
    assert_same(one, many)


def test_selecting_again_compiles_nothing_again(monkeypatch):
    mesh = make_mesh(MESHES["all"])
    placement = Placement.of(tiny_decoder()[0].abstract(), mesh)
    tuner, params = tuner_of(ONE_LEAF, placement)
    runner, key = MeshRunner(tuner, placement), jax.random.key(0)
    batch = placement.put(random_batch())
    state = runner.init(jax.device_put(params, placement.params), key)
    # The second selection begins with shorter supports.
    for _ in range(2):
        state, _ = runner.select(state, batch, key)
    monkeypatch.setattr(Compact, "begin", None)
    state, finite = runner.select(state, batch, key)
    assert finite and int(state.count) == 0


def test_a_selection_has_no_moments_beside_it(monkeypatch):
    placement = Placement.of(tiny_decoder()[0].abstract(), mesh_of(None))
    tuner, params = tuner_of(METHODS["sift"], placement)
    runner, key = MeshRunner(tuner, placement), jax.random.key(0)
    state = runner.init(jax.device_put(params, placement.params), key)
    choose, are_gone = runner._choose, []

    def noted(*args):
        moments = jax.tree.leaves(state.opt_state)
        are_gone.append([leaf.is_deleted() for leaf in moments])
        return choose(*args)

    monkeypatch.setattr(runner, "_choose", noted)
    for value, was_finite in ((jnp.nan, False), (1.0, True)):
        scale = state.params["norm"]["scale"].at[0].set(value)
        state = state._replace(params={**state.params, "norm": {"scale": scale}})
        state, finite = runner.select(state, placement.put(random_batch()), key)
        assert finite == was_finite
        assert int(state.count) == (0 if finite else -1)
    assert are_gone[0] and all(map(all, are_gone))
    state, metrics = runner.step(state, placement.put(random_batch()), key)
    assert not metrics["is_skipped"]


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_selects_nothing():
    mesh = make_mesh(MESHES["all"])
    placement = Placement.of(tiny_decoder()[0].abstract(), mesh)
    tuner, params = tuner_of(METHODS["sift"], placement)
    runner, key = MeshRunner(tuner, placement), jax.random.key(0)
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(jnp.nan)
    state = runner.init(jax.device_put(params, placement.params), key)
    _, finite = runner.select(state, placement.put(random_batch()), key)
    assert not finite


def test_leaves_that_an_axis_does_not_divide_are_whole():
    shapes = {
        "layers": {
            "up": {"kernel": jax.ShapeDtypeStruct((2, 8, 6), np.float32)},
            "down": {"kernel": jax.ShapeDtypeStruct((2, 6, 8), np.float32)},
        },
        "lm_head": {"kernel": jax.ShapeDtypeStruct((8, 8), np.float32)},
        "norm": {"scale": jax.ShapeDtypeStruct((), np.float32)},
    }
    specs, whole = specs_of(shapes, {"fsdp": 4, "tensor": 2})
    assert specs["layers"]["up"]["kernel"] == jax.P(None, "fsdp", "tensor")
    assert specs["norm"]["scale"] == jax.P()
    assert whole == {}
    specs, whole = specs_of(shapes, {"fsdp": 4, "tensor": 4})
    assert specs["layers"]["up"]["kernel"] == jax.P(None, "fsdp", None)
    assert specs["lm_head"]["kernel"] == jax.P("fsdp", "tensor")
    # 384 bytes in 4 parts of 96, where 16 parts of 24 would do.
    assert whole == {"layers/up/kernel": 72, "layers/down/kernel": 72}


def test_what_is_not_divided_is_told(caplog, tmp_path):
    model, params = tiny_decoder()
    save_pretrained(model, params, tmp_path)
    # Ten words in two parts, but not in four.
    for tensor, told in ((2, ""), (4, "does not divide embeddings/word/embedding, ")):
        shape = MeshShape(data=8 // tensor, tensor=tensor)
        caplog.clear()
        load_placed(make_mesh(shape), tmp_path, head=CausalLM)
        assert told in caplog.text
        assert bool(told) == ("more than its share" in caplog.text)


def test_an_axis_that_divides_nothing_is_refused():
    shapes = {"layers": {"up": {"kernel": jax.ShapeDtypeStruct((2, 6, 6), np.int8)}}}
    with pytest.raises(InputError, match="got fsdp=4, which divides no leaf"):
        specs_of(shapes, {"fsdp": 4, "tensor": 1})


@pytest.mark.parametrize(
    "text", ["", "data", "data=0", "data=2,data=2", "x=2", "data=-1"]
)
def test_a_mesh_is_written_as_sizes_of_its_axes(text):
    assert parse_mesh(" tensor=2, data=3") == MeshShape(data=3, tensor=2)
    with pytest.raises(InputError, match="`mesh` must be sizes of data, fsdp, tensor"):
        parse_mesh(text)


def test_a_mesh_has_all_devices():
    with pytest.raises(InputError, match="as many devices as there are, 8, got data=2"):
        make_mesh(MeshShape(data=2))


def test_a_batch_is_divided_by_the_devices_that_share_it():
    placement = Placement.of(tiny_decoder()[0].abstract(), make_mesh(MESHES["all"]))
    placement.require_batch(8)
    with pytest.raises(InputError, match="must be a multiple of 4, the devices that"):
        placement.require_batch(6)
    with pytest.raises(InputError, match="`batch_size` / 4 must be a multiple of 4"):
        placement.require_batch(8, accumulate=4)


def test_a_row_is_divided_by_the_devices_that_share_it():
    mesh = make_mesh(MeshShape(tensor=2, sequence=4))
    placement = Placement.of(tiny_decoder()[0].abstract(), mesh)
    placement.require_batch(8, length=12)
    message = (
        r"`max_length` must be a multiple of 4, the devices that share a row \(seq"
    )
    with pytest.raises(InputError, match=message):
        placement.require_batch(8, length=14)


@pytest.mark.parametrize("most_logits", [2**24, 100])
@pytest.mark.quick(1)
def test_no_device_has_the_activations_of_whole_rows(most_logits):
    """Along "sequence" a device holds its tokens; of keys and values it has all."""
    model, params = tiny_decoder()
    rows, length, width = 2, 64, CONFIG.hidden_size
    ids = jnp.zeros((rows, length), jnp.int32)
    batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}

    def loss(params):
        hidden = model.hidden(params, batch)
        weights = jnp.ones(ids.shape)
        options = {"most_logits": most_logits}
        return summed_token_loss(model, params, hidden, ids, weights, **options)

    def text(shape):
        with jax.set_mesh(make_mesh(shape, devices=jax.devices()[: shape.size])):
            return jax.jit(jax.grad(loss)).lower(params).compile().as_text()

    whole = f"f32[{rows},{length},{width}]"
    assert whole in text(MeshShape(tensor=2))
    assert whole not in text(MeshShape(sequence=4))


def test_a_mesh_of_other_axes_is_refused():
    with pytest.raises(InputError, match="`mesh` must have the axes data, fsdp"):
        Placement.of({"w": jnp.ones(8)}, jax.make_mesh((8,), ("x",)))

"""Updates inside the backward pass: the same numbers, one layer at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_checkpoint
import test_compact
import test_sharding
from test_skipping import bits
from tiny_text import text_settings, tiny_decoder, write_chats, write_decoder

from sparse_jax import (
    Compact,
    CompactState,
    Dense,
    InBackward,
    InputError,
    Layerwise,
    LoRA,
    Settings,
    Sparse,
    finetune,
)
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.params.names import leaves_by_name
from sparse_jax.planning.abstract import abstract_run, held_bytes
from sparse_jax.sharding.mesh import MeshShape
from sparse_jax.training.objective import make_loss, make_token_loss
from sparse_jax.transforms.adam_8bit import scale_by_adam_8bit
from sparse_jax.transforms.clipping import clip_by_previous_norm

BERT = Model(
    SequenceClassifier,
    test_compact.MODEL.family,
    replace(test_compact.CONFIG, hidden_dropout=0.1, attention_dropout=0.1),
)
WIDE = Model(
    SequenceClassifier,
    BERT.family,
    replace(test_compact.CONFIG, hidden_size=128, intermediate_size=128, num_layers=2),
)


def decay(values):
    """Leaves biases out of the decay, as runs do."""
    named = lambda path, leaf: "bias" not in jax.tree_util.keystr(path)
    return jax.tree.map_with_path(named, values)


WHERE = "^layers/.*(query|down)/kernel"
SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 6)
ADAMW = optax.adamw(SCHEDULE, weight_decay=0.1, mask=decay)
GIVEN = {"score": "magnitude", "where": WHERE}
SPARSE = Sparse(density=0.2, **GIVEN, dense="^classifier/|norm|bias$")
WORDS = Sparse(density=0.2, score="magnitude", where=f"{WHERE}|embedding|lm_head")
LANES = Sparse(density=0.1, **GIVEN, granularity="lane")
ROWS = Sparse(density=0.2, where=WHERE, granularity="row")
LORA = LoRA(rank=2, where="query", dense="^classifier/")
MOMENTUM = optax.sgd(SCHEDULE, momentum=0.9)
NORMS = Sparse(density=0.2, **GIVEN, dense="norm")
F32, BF16 = jnp.float32, jnp.bfloat16
# (model, method, transformation, dtype, checkpointing, split masters)
CASES = {
    "llama, adamw": (None, NORMS, ADAMW, F32, True, False),
    "llama, words and the head": (None, WORDS, MOMENTUM, BF16, False, True),
    "bert, dropout": (BERT, SPARSE, ADAMW, BF16, False, False),
    "bert, lanes": (WIDE, LANES, optax.lion(1e-3), BF16, True, True),
    "llama, rows": (None, ROWS, ADAMW, F32, True, False),
    "bert, lora": (BERT, LORA, ADAMW, F32, True, False),
    "llama, full": (None, Dense(dense=".*"), ADAMW, F32, False, False),
}


def setting_of(case):
    """Returns the loss of a case, its parameters, and what makes its batches."""
    model, _, _, dtype, checkpointing, _ = CASES[case]
    options = {"checkpointing": checkpointing, "unroll": 1}
    if model is None:
        model, params = tiny_decoder()
        loss, batches = make_token_loss(model, **options), decoder_batch
    else:
        params, batches = model.init(jax.random.key(0)), encoder_batch
        params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)
        loss = make_loss(model, **options)
    return loss, jax.tree.map(lambda x: x.astype(dtype), params), batches


def decoder_batch(seed):
    ids = np.random.default_rng(seed).integers(0, 10, (4, 12)).astype(np.int32)
    return {
        "input_ids": ids, "attention_mask": np.ones_like(ids),
        "weights": np.ones(ids.shape, np.float32),
    }  # fmt: skip


def encoder_batch(seed):
    return test_compact.make_batch(seed) | {"weights": jnp.ones(8)}


def selected(tuner, params, batch):
    """Returns a state before the first update, compiled at once."""

    def select(params):
        state = tuner.init(params, jax.random.key(1))
        return tuner.select(state, batch, jax.random.key(0))[0]

    return CompactState(*jax.jit(select)(params))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow)
        if case in ("bert, lora", "llama, full")
        else case
        for case in CASES
    ],
)
@pytest.mark.quick(1)
def test_updates_are_those_after_the_backward_pass(case):
    _, method, tx, dtype, _, split = CASES[case]
    loss, params, make = setting_of(case)
    runs = []
    start = selected(Compact(loss, method, tx, split_masters=split), params, make(0))
    for kind in (Compact, InBackward):
        tuner, state, losses = kind(loss, method, tx, split_masters=split), start, []
        step = jax.jit(tuner.step)
        for i in range(5):
            state, metrics = step(state, make(i), jax.random.key(i))
            losses.append(float(metrics["loss"]))
        runs.append((state, losses))
    (after, losses), (inside, same) = runs
    np.testing.assert_allclose(losses, same, rtol=1e-6)
    assert int(inside.count) == 5
    before = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(params)]
    found = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(inside.params)]
    assert any((one != other).any() for one, other in zip(before, found, strict=True))
    # Programs round sums in float32 as they fuse them, and Adam divides by small ones.
    exact = dtype == jnp.bfloat16
    for one, other in zip(*map(jax.tree.leaves, (after, inside)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = (np.asarray(leaf, np.float32) for leaf in (one, other))
        np.testing.assert_allclose(one, other, rtol=0 if exact else 1e-5, atol=1e-6)


def test_gradients_are_clipped_by_the_norm_of_the_update_before():
    loss, params, make = setting_of("llama, adamw")
    # The first norm is above the limit, those of later updates partly.
    tx = optax.chain(clip_by_previous_norm(0.5), optax.sgd(0.1))
    args = (loss, replace(NORMS, dense="norm|embedding"), tx)
    start, runs = selected(Compact(*args), params, make(0)), []
    for kind in (Compact, InBackward):
        step, state, norms = jax.jit(kind(*args).step), start, []
        for i in range(4):
            state, metrics = step(state, make(i), jax.random.key(i))
            norms.append(float(metrics["gradient_norm"]))
            kept = state.opt_state[0].previous_norm
            assert kept == pytest.approx(norms[-1], rel=1e-6)
        runs.append((state, norms))
    (after, norms), (inside, same) = runs
    assert norms[0] > 0.5
    np.testing.assert_allclose(norms, same, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (after, inside)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_norm_that_is_not_finite_spoils_no_later_update():
    tx, grads = clip_by_previous_norm(1.0), {"w": jnp.array([3.0, 4.0])}
    _, state = tx.update(grads, tx.init(grads))
    _, state = tx.update({"w": jnp.array([jnp.nan, jnp.inf])}, state)
    clipped, state = tx.update(grads, state)
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-6)


# By an infinite one gradients would become NaN.
@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_largest_norm_that_is_not_positive_and_finite_is_refused(max_norm):
    rule = "positive" if max_norm <= 0 else "positive and finite"
    refused = pytest.raises(
        InputError, match=f"`max_norm` must be {rule}, got .* not to"
    )
    with refused:
        clip_by_previous_norm(max_norm)
    with refused:
        Layerwise(lambda *_: (0.0, 1), SPARSE, optax.sgd(0.1), sampler="uniform",
                  max_norm=max_norm)  # fmt: skip


@pytest.mark.slow
def test_moments_of_8_bits_have_blocks_within_layers():
    method = Sparse(density=0.5, **GIVEN)
    params = jax.tree.map(lambda x: 3 * x, WIDE.init(jax.random.key(0)))
    # Blocks of a small array would lie across layers where all are updated at once.
    adam = {F32: optax.scale_by_adam(), jnp.int8: scale_by_adam_8bit(min_size=4096)}
    ends = []
    for tx in adam.values():
        tx = optax.chain(tx, optax.scale(-1e-3))
        tuner = InBackward(make_loss(WIDE, unroll=1), method, tx)
        state = selected(tuner, params, encoder_batch(0))
        step = jax.jit(tuner.step)
        for i in range(5):
            state, _ = step(state, encoder_batch(i), jax.random.key(i))
        ends.append(state)
    exact, coded = ends
    name, leaves = "layers/mlp/down/kernel", leaves_by_name(coded.opt_state)
    own = {key: leaf for key, leaf in leaves.items() if key.endswith(name)}
    count, num_layers = 128 * 128 // 2, 2
    rows = {key.split("/")[1]: (leaf.shape[0], leaf.dtype) for key, leaf in own.items()}
    assert rows == {
        "mu": (2, jnp.int8), "nu": (2, jnp.uint8),
        "mu_scale": (2, jnp.float32), "nu_scale": (2, jnp.float32),
    }, rows  # fmt: skip
    values = lambda params: leaves_by_name(params)[name]
    moved = lambda state: values(state.params) - values(params)
    one, other = np.asarray(moved(exact)), np.asarray(moved(coded))
    assert np.count_nonzero(one) == num_layers * count
    # Codes are off by as much as rounding; the entries move as with exact moments.
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.99


def test_packed_gradients_of_all_layers_are_never_there():
    model, _ = tiny_decoder()
    config = replace(
        model.config, hidden_size=64, intermediate_size=128, num_layers=24, head_size=16
    )
    model, key, temporaries = replace(model, config=config), jax.random.key(0), []
    loss = make_token_loss(model, checkpointing=True, unroll=1)
    method = Sparse(density=0.5, where="^layers/mlp/(up|down)", score="magnitude")
    batch = jax.tree.map(lambda x: x[:1, :4], decoder_batch(0))
    for kind in (Compact, InBackward):
        tuner = kind(loss, method, optax.adam(1e-3))
        state = CompactState(*jax.eval_shape(tuner.init, model.abstract(), key))
        step = jax.jit(tuner.step, donate_argnums=0).lower(state, batch, key)
        memory = step.compile().memory_analysis()
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096
        temporaries.append(memory.temp_size_in_bytes)
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.support))
    # Moments, supports and weights are at least as large: no copy of them, either.
    assert temporaries[1] < gradients / 2 and gradients < temporaries[0], temporaries


def breaking(layer):
    """Returns a tuner whose gradient stops being finite in a layer, and a state."""

    class Breaking(Sparse):
        def response(self, site, module, x, added, strength=1.0, *, key=None):
            y = module(x)
            if site != "mlp/down":
                return y
            # The root of zero has an infinite gradient: where the kernel is zero.
            return y + 0 * jnp.sqrt(jnp.sum(jnp.abs(y)))

    model, params = tiny_decoder()
    down = params["layers"]["mlp"]["down"]
    down["kernel"] = down["kernel"].at[layer].set(0.0)
    where = "^layers/.*(query|up)/kernel"
    method = Breaking(density=0.2, where=where, dense="norm|emb", score="magnitude")
    tuner = InBackward(make_token_loss(model, unroll=1), method, optax.adamw(1e-2))
    return tuner, selected(tuner, params, None)


@pytest.mark.slow
def test_a_gradient_that_breaks_halfway_stops_there_and_is_reported():
    tuner, state = breaking(1)
    after, metrics = jax.jit(tuner.step)(state, decoder_batch(0), jax.random.key(0))
    assert metrics["is_skipped"] and jnp.isfinite(metrics["loss"])
    assert not jnp.isfinite(metrics["gradient_norm"])
    assert int(after.count) == 0
    pick = lambda layers: lambda tree: jax.tree.map(lambda x: x[layers], tree)
    low, high = pick(slice(0, 2)), pick(slice(2, 4))
    parts = lambda state: (
        state.params["layers"],
        state.opt_state[0].mu["leaves"]["layers"],
    )
    assert bits(low(parts(after))) == bits(low(parts(state)))
    outside = lambda state: state.params["embeddings"]
    assert bits(outside(after)) == bits(outside(state))
    for new, old in zip(*map(parts, (after, state)), strict=True):
        assert bits(high(new)) != bits(high(old))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after))


def test_a_mesh_has_the_numbers_of_one_device(monkeypatch):
    monkeypatch.setattr(test_sharding, "Compact", InBackward)
    method = test_sharding.METHODS["sift"]
    shape = test_sharding.MESHES["fsdp, tensor"]
    one = test_sharding.on_mesh(method, 5, None)
    many = test_sharding.on_mesh(method, 5, shape)
    test_sharding.assert_same(one, many)


RUN = {
    "model": "m", "task": "mrpc", "output": "o", "update_in_backward": True,
    "max_grad_norm": 0.0,
}  # fmt: skip
REFUSED = {
    "max_grad_norm": (1.0, "`clip_by` must be previous-norm with .update_in_backward."),
    "accumulate": (2, "`accumulate` must be left out with .update_in_backward., got 2"),
    "sampler": ("ist", "`sampler` must be left out with .update_in_backward."),
    "mesh": ("data=2,fsdp=2", "take the axis fsdp in place of data"),
    "method": (
        "head",
        "`method` must be left out with .update_in_backward., got 'head'",
    ),
    "optimizer": ("muon", "`optimizer` must be one of adamw, .* one layer at a time"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_gradients_at_once_is_refused(name):
    value, message = REFUSED[name]
    more = {"method": "lora"} if name == "optimizer" else {}
    with pytest.raises(InputError, match=message):
        Settings(**{**RUN, **more, name: value})


def test_an_optimizer_of_ones_own_is_refused():
    with pytest.raises(InputError, match="`optimizer` must be one of adamw"):
        Settings(**{**RUN, "max_grad_norm": 1.0}, optimizer=optax.sgd(0.1))


def test_sharded_weights_are_not_refused():
    assert Settings(**RUN, mesh="fsdp=4,tensor=2").update_in_backward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 2}, "`accumulate` must be left out where layers"),
        ({"data_axes": ("data",)}, "`data_axes` must be left out where layers"),
        (
            {"method": Sparse(density=0.1, stack=None)},
            "`stack` of the method must name",
        ),
    ],
)
def test_a_tuner_that_would_need_them_is_refused(options, message):
    given = {"method": Sparse(density=0.1), "tx": optax.sgd(0.1), **options}
    with pytest.raises(InputError, match=message):
        InBackward(lambda params, batch, key, attachment: (0.0, 1), **given)


def test_the_state_of_an_optimizer_that_read_whole_stacks_is_refused():
    model, params = tiny_decoder()
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    method = Dense(dense="^layers/mlp/up")
    args = (make_token_loss(model, unroll=1), method, tx)
    tuner = InBackward(*args)
    state = jax.eval_shape(Compact(*args).init, params, jax.random.key(0))
    with pytest.raises(InputError, match="`state` must be one of this tuner"):
        jax.eval_shape(tuner.step, state, decoder_batch(0), jax.random.key(0))


def test_a_model_that_runs_its_layers_itself_is_refused():
    def loss(params, batch, key, attachment):
        w = attachment.weights(params["layers"], attachment.trained)["w"]
        return jnp.sum(w), 1

    tuner = InBackward(loss, Sparse(density=0.5), optax.sgd(0.1))
    params = {"layers": {"w": jnp.ones((2, 4))}}
    state = tuner.begin(params, {"layers": {"w": jnp.array([[0, 1], [2, 3]])}}, {})
    with pytest.raises(InputError, match="`loss` must run the layers of a model once"):
        tuner.step(state, None, jax.random.key(0))


@pytest.mark.parametrize(
    "choices",
    [{"max_grad_norm": 0.0}, {"clip_by": "previous-norm", "moment_dtype": "int8"}],
    ids=["float32", "int8, clipped"],
)
def test_a_run_stopped_and_resumed_ends_like_one_that_was_not(
    choices, tmp_path, monkeypatch
):
    files = write_decoder(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl")
    options = {"method": "sift", "density": 0.1, "where": ("query",), "save_every": 1}
    options |= {"update_in_backward": True, "rank": None, **choices}
    settings = [
        text_settings(*files, tmp_path / name, **options) for name in ("whole", "stop")
    ]
    finetune(settings[0])
    test_checkpoint.stop_at(monkeypatch, settings[1], 3)
    finetune(replace(settings[1], resume=True))
    assert test_checkpoint.same_bytes(tmp_path / "whole", tmp_path / "stop")


def test_a_plan_counts_the_gradients_of_one_layer():
    model, held = tiny_decoder()[0], []
    options = {"model": "m", "task": "causal", "output": "o", "method": "sift"}
    options |= {"where": ("^layers/mlp/up",), "max_grad_norm": 0.0, "batch_size": 1}
    for inside in (False, True):
        settings = Settings(**options, update_in_backward=inside)
        run = abstract_run(model, settings, 8, MeshShape(), jax.devices()[:1])
        held.append(held_bytes(run))
    before, after = held
    assert before.pop("gradients") == 4 * after.pop("gradients") > 0
    assert before == after


def test_a_loss_that_changes_the_layers_before_it_runs_them_is_refused():
    loss, params, make = setting_of("llama, adamw")

    def cast(params, *args):
        layers = jax.tree.map(lambda leaf: 2 * leaf, params["layers"])
        return loss({**params, "layers": layers}, *args)

    tuner = InBackward(cast, SPARSE, optax.sgd(0.1))
    state = selected(tuner, params, make(0))
    with pytest.raises(InputError, match="`loss` must run the layers of its `params`"):
        tuner.step(state, make(0), jax.random.key(0))

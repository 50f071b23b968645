"""Adam with moments of 8 bits, beside Optax's with float32 moments."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType
from test_checkpoint import stop_at
from tiny_run import tiny_settings, write_data, write_model
from tiny_text import CONFIG

from sparse_jax import (
    Compact,
    Importance,
    InputError,
    Layerwise,
    Settings,
    Sparse,
    Uniform,
    finetune,
    load_adapter,
    scale_by_adam_8bit,
)
from sparse_jax.compact.selection import reselect
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model
from sparse_jax.planning.abstract import abstract_run
from sparse_jax.sharding.mesh import MeshShape
from sparse_jax.training.objective import make_token_loss
from sparse_jax.training.optimizer import make_optimizer, schedule_of
from sparse_jax.training.recipe_options import RecipeOptions
from sparse_jax.transforms.adam_8bit import decoded, encoded

# By what is special of it, a shape that has codes.
SHAPES = {
    "packed": (3, 5001),
    "one vector": (4999,),
    "of shards": (2, 8, 512),
    "lanes": (2, 3, 4, 700),
    "matrices": (2, 512, 24),
    "tall": (4096, 2),
    "many layers": (300, 40),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
STACKED = {"packed", "of shards", "lanes", "matrices", "many layers"}
RUN = {"model": "m", "task": "causal", "output": "o"}
# |mu| / sqrt(nu) of Adam is at most this, whatever the gradients.
LONGEST = 0.1 / (0.001 * (1 - 0.81 / 0.999)) ** 0.5


def tx_of(shape, **options):
    is_stacked = any(SHAPES[name] == shape for name in STACKED)
    # Every layer of "many layers" is small.
    options = {"min_size": min(4096, math.prod(shape[1:]) or 4096), **options}
    return scale_by_adam_8bit(stacked="w" if is_stacked else None, **options)


def gradients(shape, step, spread=1.0):
    """Gradients whose entries differ in size, and some of which are far out."""
    sizes, noise, rare = jax.random.split(jax.random.key(step), 3)
    sizes = jnp.exp(spread * jax.random.normal(jax.random.key(99), shape))
    far = 1 + 30 * (jax.random.uniform(rare, shape) > 0.999)
    return {"w": sizes * far * (jax.random.normal(noise, shape) + 0.3)}


def run(tx, shape, steps, gradients=gradients):
    """Returns the last update, and the state after it."""
    params = {"w": jnp.zeros(shape)}
    update = lambda step, last: tx.update(gradients(shape, step), last[1], params)
    start = (params, tx.init(params))
    step, state = jax.jit(lambda: jax.lax.fori_loop(0, steps, update, start))()
    return step["w"], state


def off(found, expected):
    """The root mean square of a difference, relative."""
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@every_shape
@pytest.mark.quick(1)
def test_updates_are_those_of_float32_moments_within_a_tenth(shape):
    found, state = run(tx_of(shape), shape, 60)
    expected, exact = run(optax.scale_by_adam(), shape, 60)
    assert state.mu["w"].dtype == jnp.int8 and state.nu["w"].dtype == jnp.uint8
    assert off(found, expected) < 0.1
    wide = decoded(state)
    # Right on average: what rounding adds to nu it takes away elsewhere.
    assert abs(float(jnp.mean(wide.nu["w"] / exact.nu["w"])) - 1) < 0.02


def test_the_second_moment_follows_after_gradients_far_out():
    # To the nearest code, nu would lose every change below half a code, fall with the
    # largest of its block, and be 40 % too small by then.
    def rare(shape, step):
        is_far = (jnp.arange(shape[1]) % 256 == step % 97)[None] & (step % 50 == 0)
        return {"w": gradients(shape, step, 0.7)["w"] * jnp.where(is_far, 100, 1)}

    _, state = run(scale_by_adam_8bit(stacked="w"), (1, 4096), 400, rare)
    _, exact = run(optax.scale_by_adam(), (1, 4096), 400, rare)
    ratio = jnp.log(decoded(state).nu["w"] / exact.nu["w"])
    assert abs(float(jnp.mean(ratio))) < 0.05
    assert float(jnp.std(ratio)) < 0.25


def test_a_planted_solution_is_found_as_with_float32_moments():
    planted = jax.random.normal(jax.random.key(0), (2, 4096))
    curvature = jnp.exp(2 * jax.random.normal(jax.random.key(1), (2, 4096)))

    def ends(tx, steps=200):
        def step(i, carry):
            values, state = carry
            noise = jax.random.normal(
                jax.random.fold_in(jax.random.key(2), i), (2, 4096)
            )
            gradient = curvature * (values["w"] - planted + 0.1 * noise)
            update, state = tx.update({"w": gradient}, state, values)
            return optax.apply_updates(values, update), state

        values = {"w": jnp.zeros((2, 4096))}
        values, _ = jax.lax.fori_loop(0, steps, step, (values, tx.init(values)))
        return values["w"]

    rate = optax.scale_by_learning_rate(optax.linear_schedule(0.05, 0, 200))
    found = ends(optax.chain(scale_by_adam_8bit(stacked="w"), rate))
    exact = ends(optax.chain(optax.scale_by_adam(), rate))
    assert off(exact, planted) < 0.05
    assert off(found, exact) < 0.02


def test_no_update_is_longer_than_adams_longest():
    # Gradients from 1e-12 to 1e8 side by side, which stop, come back and change signs.
    def wild(shape, step):
        sizes = 10 ** jax.random.uniform(jax.random.key(7), shape, minval=-12, maxval=8)
        sign = jax.random.rademacher(jax.random.key(step // 5), shape, jnp.float32)
        return {"w": sizes * sign * (step % 40 < 12)}

    shape, tx = (5000,), scale_by_adam_8bit(eps=0.0)

    def check(step, last):
        moved, state = tx.update(wild(shape, step), last[0])
        t = step + 1.0
        bound = LONGEST * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        longest = jnp.max(jnp.abs(moved["w"])) / bound
        return (
            state,
            jnp.maximum(last[1], longest),
            last[2] & jnp.all(state.nu["w"] > 0),
        )

    start = (tx.init({"w": jnp.zeros(shape)}), jnp.float32(0), jnp.array(True))
    _, longest, is_above_zero = jax.lax.fori_loop(0, 100, check, start)
    assert 0.1 < longest <= 1.0001
    assert is_above_zero


@every_shape
def test_zero_gradients_move_nothing(shape):
    zeros = lambda shape, step: {"w": jnp.zeros(shape)}
    step, state = run(tx_of(shape), shape, 3, zeros)
    arrays = [step, state.mu["w"], state.nu["w"], state.mu_scale["w"]]
    assert all(not np.any(array) for array in arrays)


def test_of_a_stack_every_layer_is_an_array_that_may_be_small():
    params = {"layers": jnp.ones((40, 512)), "other": jnp.ones((40, 512))}
    state = scale_by_adam_8bit(stacked="^layers").init(params)
    dtypes = {name: leaf.dtype for name, leaf in state.mu.items()}
    assert dtypes == {"layers": jnp.float32, "other": jnp.int8}
    assert state.mu_scale["layers"].shape == (40, 0)


def test_compiled_or_not_it_is_the_same():
    shape, tx = (2, 5001), scale_by_adam_8bit(stacked="w")
    params = {"w": jnp.zeros(shape)}
    plain = compiled = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(3):
        one, plain = tx.update(gradients(shape, i), plain, params)
        two, compiled = update(gradients(shape, i), compiled, params)
    np.testing.assert_allclose(one["w"], two["w"], rtol=0.05, atol=0.01)
    assert float(jnp.mean(plain.nu["w"] != compiled.nu["w"])) < 0.001


@pytest.mark.parametrize(
    ("shape", "most"),
    [((3, 2**16), 2 + 8 / 256), ((512, 24), 2 + 8 / 32), ((2, 100_003), 2.05)],
)  # fmt: skip
def test_a_value_costs_two_bytes_and_its_share_of_two_scales(shape, most):
    state = tx_of(shape).init({"w": jnp.zeros(shape)})
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - 4
    assert 2 < nbytes / math.prod(shape) <= most


def test_small_arrays_keep_the_moments_of_optax():
    params = {"a": jnp.ones(4095), "b": jnp.ones(()), "c": jnp.ones((3, 5))}
    tx, known = scale_by_adam_8bit(), optax.scale_by_adam()
    state, expected = tx.init(params), known.init(params)
    for _ in range(3):
        moved, state = tx.update(params, state, params)
        wanted, expected = known.update(params, expected)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5), moved, wanted
        )
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.mu)} == {"float32"}


@every_shape
@pytest.mark.quick(1)
def test_what_is_decoded_and_encoded_keeps_its_codes(shape):
    _, state = run(tx_of(shape), shape, 5)
    again = encoded(decoded(state), state)
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
        gap = jnp.abs(one.astype(jnp.float32) - two.astype(jnp.float32))
        assert float(jnp.max(gap)) <= 1
        assert float(jnp.mean(gap)) < 0.001


def test_gradients_may_be_bfloat16_and_updates_are_as_the_parameters():
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), gradients((5000,), 0))
    tx = scale_by_adam_8bit()
    state = tx.init({"w": jnp.zeros(5000)})
    step, new = tx.update(grads, state, {"w": jnp.zeros(5000)})
    assert (
        step["w"].dtype == jnp.float32
        and tx.update(grads, state)[0]["w"].dtype == jnp.bfloat16
    )
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)


def test_decay_rates_without_a_bound_are_refused():
    with pytest.raises(InputError, match=r"`b2` must be in \(b1\*\*2, 1\) .*got 0.8"):
        scale_by_adam_8bit(0.9, 0.8)


@pytest.mark.parametrize("word", ["lion", "sgd", "schedule_free_adamw"])
def test_optimizers_without_two_moments_are_refused(word):
    with pytest.raises(InputError, match="no 8-bit moments.*adamw, adam"):
        Settings(
            model="m", task="sst2", output="o", optimizer=word, moment_dtype="int8"
        )


def test_an_optimizer_by_name_has_them_and_decays_as_before():
    values = {"added": {}, "leaves": {"layers": {"kernel": jnp.ones((2, 5000))}}}
    grads = jax.tree.map(jnp.ones_like, values)
    for word, decay in (("adam", 0.0), ("adamw", 0.5)):
        steps = []
        for dtype in ("float32", "int8"):
            tx = make_optimizer(RecipeOptions(optimizer=word, moment_dtype=dtype))
            schedule = schedule_of(0.01, 10, weight_decay=decay)
            step, state = tx.update(grads, tx.init(values), values, schedule=schedule)
            steps.append(step["leaves"]["layers"]["kernel"])
        assert {
            str(leaf.dtype) for leaf in jax.tree.leaves(optax.tree.get(state, "mu"))
        } == {"int8"}
        np.testing.assert_allclose(*steps, rtol=1e-4)


def test_a_layer_at_a_time_is_float32():
    # Of 64 layers; arrays of all of them would have 4 bytes a value each.
    shape = (64, 20_000)
    tx = optax.chain(scale_by_adam_8bit(stacked="w"), optax.scale(-0.1))
    params = {name: jnp.zeros(shape) for name in ("w1", "w2")}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    args = (params, tx.init(params), params)
    memory = (
        jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()
    )
    size = 64 * 20_000
    # Four are the step, and two a copy of the codes, which a CPU makes.
    assert memory.temp_size_in_bytes < 2 * 7 * size
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000


@pytest.mark.slow
def test_entries_that_stay_keep_their_moments_when_others_are_chosen():
    shape, key = (8, 4096), jax.random.key(0)
    params, x = {"w": jnp.zeros(shape)}, jax.random.normal(key, shape)
    loss = lambda params, x, key, attachment: (jnp.sum(params["w"] * x), 1.0)
    tuner = Compact(loss, Sparse(density=0.5, stack=None), scale_by_adam_8bit())
    state = tuner.init(params, key)
    state, _ = tuner.select(state, x, key)
    for _ in range(3):
        state, _ = jax.jit(tuner.step)(state, x, key)
    other = x * (1 + jax.random.uniform(jax.random.key(1), shape))
    again, _ = jax.jit(functools.partial(reselect, tuner))(state, other, key)
    old, new = (
        dict(zip(np.asarray(one.support["w"]), np.asarray(nu), strict=True))
        for one in (state, again)
        for nu in [decoded(one.opt_state).nu["leaves"]["w"]]
    )
    stay, came = [*(old.keys() & new.keys())], [*(new.keys() - old.keys())]
    assert len(stay) > 10_000 and len(came) > 100
    found, expected = ([moments[place] for place in stay] for moments in (new, old))
    np.testing.assert_allclose(found, expected, rtol=0.2)
    assert not any(new[place] for place in came)


@pytest.mark.parametrize("sampler", [Uniform, Importance])
@pytest.mark.slow
def test_layers_that_take_turns_keep_codes(sampler):
    config = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=256)
    model = Model(CausalLM, LLAMA, config)
    params = model.init(jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (4, 12))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    batch["weights"] = np.ones(ids.shape, np.float32)
    method = Sparse(density=0.4, where="^layers/.*kernel", score="magnitude")
    few = sampler(num_layers=config.num_layers, num_active=1)
    losses = {}
    for tx in (optax.scale_by_adam(), scale_by_adam_8bit()):
        tx = optax.chain(tx, optax.scale(-3e-3))
        tuner = Layerwise(make_token_loss(model), method, tx, sampler=few)
        state = jax.jit(tuner.init)(params, jax.random.key(0))
        state, _ = jax.jit(tuner.select)(state, batch, jax.random.key(0))
        step = jax.jit(tuner.step)
        for number in range(8):
            state, metrics = step(state, batch, jax.random.key(number))
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(state.opt_state.rows)}
        losses[jnp.dtype("int8") in dtypes] = float(metrics["loss"])
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


# Of an entry layout, the axis of its shards; of whole arrays, any axis.
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 8, 1100), P(None, "fsdp", None)),
        ((2, 768, 64), P(None, "fsdp", None)),
        ((2, 64, 688), P(None, None, "fsdp")),
    ],
)
@pytest.mark.quick(1)
def test_blocks_do_not_reach_over_shards(shape, spec):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    tx = scale_by_adam_8bit(stacked="w")
    at = jax.NamedSharding(mesh, spec)
    params = {"w": jax.device_put(jnp.zeros(shape), at)}
    state = jax.jit(tx.init)(params)
    whole, lies = jax.NamedSharding(mesh, P()), lambda leaf: leaf.ndim == 3
    where = jax.tree.map(lambda leaf: at if lies(leaf) else whole, state)
    state = jax.device_put(state, where)
    grads = jax.device_put(gradients(shape, 0), {"w": at})
    update = jax.jit(tx.update, out_shardings=({"w": at}, where))
    text = update.lower(grads, state, params).compile().as_text()
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "permute(")
    assert not [kind for kind in kinds if kind in text]
    moved, new = update(grads, state, params)
    expected, alone = jax.jit(tx.update)(*jax.device_get((grads, state, params)))
    np.testing.assert_allclose(moved["w"], expected["w"], rtol=1e-5)
    np.testing.assert_allclose(new.nu_scale["w"], alone.nu_scale["w"], rtol=1e-6)


def test_codes_lie_where_their_weights_lie():
    changes = {"density": 0.2, "dtype": "bfloat16", "split_masters": True}
    changes |= {"batch_size": 8, "where": ("mlp/down/kernel",), "moment_dtype": "int8"}
    sizes = {"hidden_size": 128, "head_size": 32, "intermediate_size": 256}
    model = Model(CausalLM, LLAMA, dataclasses.replace(CONFIG, **sizes))
    args = (Settings(**RUN, **changes), 16, MeshShape(fsdp=4, tensor=2), jax.devices())
    run = abstract_run(model, *args)
    state = optax.tree.get(run.state.opt_state, "Adam8bitState")
    found = {}
    for field, tree in state._asdict().items():
        for leaf in jax.tree.leaves(tree) if field != "count" else []:
            assert leaf.sharding.spec[1] in (("fsdp", "tensor"), ("tensor", "fsdp"))
            found[field] = str(leaf.dtype)
    both = {"mu": "int8", "nu": "uint8"}
    assert found == {**both, "mu_scale": "float32", "nu_scale": "float32"}


@pytest.mark.parametrize("mesh", [None, pytest.param("fsdp=8", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_resumes_with_its_codes(mesh, tmp_path, monkeypatch):
    files = {
        "model": write_model(tmp_path / "model", hidden_size=128, intermediate_size=64),
        "data": write_data(tmp_path / "data"),
    }
    changes = {"density": 0.2, "where": ("query",), "moment_dtype": "int8"}
    changes |= {"save_every": 1, "learning_rate": 3e-3}
    whole = tiny_settings(**files, output=tmp_path / "whole", **changes)
    finetune(whole)
    cut = dataclasses.replace(whole, output=str(tmp_path / "cut"))
    stop_at(monkeypatch, cut, 2)
    finetune(dataclasses.replace(cut, resume=True, mesh=mesh))
    one, two = (load_adapter(tmp_path / name) for name in ("whole", "cut"))
    # Another mesh has other blocks.
    bound = {"rtol": 0, "atol": 3e-3 if mesh else 0}
    for leaf, values in one.values.items():
        np.testing.assert_allclose(values, two.values[leaf], **bound)

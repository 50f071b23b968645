"""Positions of two bytes: everything is as with positions of four."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_in_backward
from tiny_run import tiny_settings, write_files

from sparse_jax import (
    Compact,
    InputError,
    Sparse,
    Uniform,
    finetune,
    gather,
    load_adapter,
    scatter,
    sift,
)
from sparse_jax.compact.in_backward import InBackward
from sparse_jax.compact.layerwise import Layerwise
from sparse_jax.compact.selection import reselect
from sparse_jax.params.names import leaves_by_name
from sparse_jax.sharding.mesh import MeshShape, make_mesh
from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.layout import Shards
from sparse_jax.supports.scores import SCORES
from sparse_jax.supports.short_entries import SHORT_ENTRY

KEY = jax.random.key(0)
CHUNK = 65536
# name -> shape, ascending positions
CASES = {
    "one chunk": ((3, 4), [0, 5, 11]),
    "both sides of an edge": ((2, CHUNK), [CHUNK - 1, CHUNK]),
    "the first of the second chunk": ((2, CHUNK), [CHUNK]),
    "empty chunks between": ((7, CHUNK), [3, 5 * CHUNK + 3, 7 * CHUNK - 1]),
    "nothing in the last": ((4, CHUNK), [0, CHUNK + 1]),
    "a part of a chunk": ((CHUNK + 5,), [1, CHUNK + 4]),
    "all of a chunk": ((CHUNK + 7,), range(CHUNK)),
}
every_case = pytest.mark.parametrize(
    ("shape", "positions"), CASES.values(), ids=CASES.keys()
)


def short(positions, shape):
    return SHORT_ENTRY.from_positions(np.int32(positions), shape)[0]


def test_a_support_is_the_ends_of_its_chunks_and_sixteen_bits_a_position():
    support = short([1, CHUNK - 1, CHUNK + 9], (2, CHUNK))
    assert support.dtype == np.uint16
    assert support.tolist() == [2, 3, 0, 0, 1, CHUNK - 1, 9]
    # Above 65,535 an end has an upper half.
    support = short(range(CHUNK + 1), (2, CHUNK))
    assert support[:4].tolist() == [0, 1, 1, 1]


@every_case
def test_positions_come_back(shape, positions):
    values = np.arange(len(positions)) + 0.5
    support, packed = SHORT_ENTRY.from_positions(np.int32(positions), shape, values)
    wanted = SHORT_ENTRY.packed_shape(support.shape, shape)
    assert wanted == packed.shape == (len(positions),)
    back, same = SHORT_ENTRY.to_positions(support, shape, packed)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, positions)
    np.testing.assert_array_equal(same, values)


@every_case
def test_entries_are_read_and_written_as_at_positions(shape, positions):
    x = jax.random.normal(KEY, shape)
    support, where = short(positions, shape), jnp.int32(positions)
    packed = gather(x, support, granularity="entry16")
    np.testing.assert_array_equal(packed, gather(x, where))
    new = scatter(x, support, packed + 1, granularity="entry16")
    np.testing.assert_array_equal(new, scatter(x, where, packed + 1))


@pytest.mark.parametrize("layers", [None, [2, 0]], ids=["all layers", "some"])
def test_layers_of_a_stack_are_reached_by_their_own_positions(layers):
    stack = jax.random.normal(KEY, (3, 3, 50_000))
    count = 3 if layers is None else 2
    random = np.random.default_rng(0)
    draw = lambda: np.sort(random.choice(150_000, 7, replace=False))
    positions = np.int32([draw() for _ in range(count)])
    support = short(positions, stack.shape)
    assert support.shape == (count, 2 * 3 + 7)
    numbers = None if layers is None else jnp.array(layers)
    packed = jax.jit(SHORT_ENTRY.gather)(stack, support, numbers)
    np.testing.assert_array_equal(packed, ENTRY.gather(stack, positions, numbers))
    new = jax.jit(SHORT_ENTRY.scatter)(stack, support, packed + 1, numbers)
    wanted = ENTRY.scatter(stack, jnp.array(positions), packed + 1, numbers)
    np.testing.assert_array_equal(new, wanted)


@pytest.mark.parametrize("avoided", [None, [0, 70_000]], ids=["", "avoiding"])
def test_the_entries_are_those_of_long_positions(avoided):
    x = jax.random.normal(KEY, (2, 50_000)).at[0, 0].set(9.0)
    avoid = None if avoided is None else jnp.int32(avoided)
    args = (SCORES["magnitude"], None, x, 5_000, KEY)
    support, count = SHORT_ENTRY.choose(*args, avoid=avoid)
    wanted, same = ENTRY.choose(*args, avoid=avoid)
    assert support.dtype == jnp.uint16 and count == same
    found = SHORT_ENTRY.to_positions(np.asarray(support), x.shape)[0]
    np.testing.assert_array_equal(found, wanted)


def test_entries_of_an_old_support_are_found_in_the_new_one():
    shape = (4, CHUNK)
    old, new = (
        short(positions, shape)
        for positions in ([1, CHUNK + 1, 3 * CHUNK], [1, CHUNK + 2, 3 * CHUNK])
    )
    origin = SHORT_ENTRY.origins(old, new, shape)
    assert origin.stays.tolist() == [True, False, True]
    assert origin.place[jnp.array([0, 2])].tolist() == [0, 2]


SHARDS = Shards((("fsdp",), ("tensor",)), (4, 2))


@pytest.mark.parametrize("lead", [(), (2,)], ids=["array", "stack"])
def test_each_device_reaches_its_own_entries(lead):
    layout, long = SHORT_ENTRY.sharded(SHARDS), ENTRY.sharded(SHARDS)
    mesh = make_mesh(MeshShape(1, 4, 2))
    x = jax.random.normal(KEY, (*lead, 400, 1200))
    random = np.random.default_rng(0)
    draw = lambda _: np.sort(random.choice(480_000, 999, replace=False))
    positions = np.int32(
        np.reshape([*map(draw, range(2))][: len(lead) + 1], (*lead, -1))
    )
    values = np.float32(random.normal(size=positions.shape))
    support, packed = layout.from_positions(positions, x.shape, values)
    where = long.from_positions(positions, x.shape)[0]
    assert packed.shape == layout.packed_shape(support.shape, (400, 1200))
    np.testing.assert_array_equal(layout.to_positions(support, x.shape)[0], positions)
    spec = jax.NamedSharding(mesh, SHARDS.spec(bool(lead)))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, spec)
        read = jax.jit(layout.gather)(x, support)
        np.testing.assert_array_equal(read, jax.jit(long.gather)(x, where))
        new = jax.jit(layout.scatter)(x, support, packed)
        np.testing.assert_array_equal(new, jax.jit(long.scatter)(x, where, packed))
        if lead:
            return
        score, k = SCORES["magnitude"], 999
        room = layout.capacity(200, (400, 1200))
        choose = lambda x: layout.choose(score, None, x, k, KEY, capacity=room)
        chosen, counts = jax.jit(choose)(x)
        assert room == 256 + 2 * 2 and chosen.shape == (8, room)
    best, _ = ENTRY.choose(score, None, np.asarray(x), k, KEY)
    assert counts.sum() == k and counts.max() <= 256
    found = layout.to_positions(np.asarray(chosen), x.shape)[0]
    np.testing.assert_array_equal(found, best)


LAYERS = 4  # of the model below
METHOD = Sparse(density=0.2, where="^layers/.*(query|down)/kernel", dense="norm")
SHORT = replace(METHOD, granularity="entry16")
ADAM = optax.adamw(1e-2)
TUNERS = {
    "all layers": lambda *args: Compact(*args),
    "inside the backward pass": lambda *args: InBackward(*args),
    "some layers": lambda *args: Layerwise(
        *args, sampler=Uniform(num_layers=LAYERS, num_active=2), max_norm=1.0
    ),
}


def trained(make, method, again=False):
    """Returns a state after three updates, and their losses."""
    loss, params, batch = test_in_backward.setting_of("llama, adamw")
    tuner = make(loss, method, ADAM)
    assert jax.tree.leaves(params["layers"])[0].shape[0] == LAYERS
    state = jax.jit(tuner.init)(params, KEY)
    state, finite = jax.jit(tuner.select)(state, batch(0), KEY)
    assert finite
    step, losses = jax.jit(tuner.step), []
    for i in range(3):
        state, metrics = step(state, batch(i), jax.random.key(i))
        losses.append(float(metrics["loss"]))
        if again and i == 1:
            choose = jax.jit(lambda *args: reselect(tuner, *args))
            state, finite = choose(state, batch(5), KEY)
            assert finite
    return state, losses


@pytest.mark.parametrize("make", TUNERS.values(), ids=TUNERS)
def test_updates_are_those_of_long_positions(make):
    (long, losses), (state, same) = trained(make, METHOD), trained(make, SHORT)
    assert losses == same
    name = "layers/mlp/down/kernel"
    shape = state.params["layers"]["mlp"]["down"]["kernel"].shape
    support = leaves_by_name(state.support)[name]
    assert support.dtype == jnp.uint16
    found = SHORT_ENTRY.to_positions(np.asarray(support), shape)[0]
    np.testing.assert_array_equal(found, leaves_by_name(long.support)[name])
    trees = (tree._replace(support=()) for tree in (long, state))
    for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


def test_a_new_selection_carries_over_what_it_does_of_long_positions():
    (long, losses), (state, same) = (
        trained(TUNERS["all layers"], method, again=True) for method in (METHOD, SHORT)
    )
    assert losses == same
    trees = (long.params, state.params), (long.opt_state, state.opt_state)
    for pair in trees:
        jax.tree.map(np.testing.assert_array_equal, *pair)


def test_the_transformation_takes_it():
    params = {"w": jax.random.normal(KEY, (300, 300))}
    runs = []
    for granularity in ("entry", "entry16"):
        tx = sift(optax.adam(1e-2), 0.05, reselect_every=2, granularity=granularity)
        update, state, now = jax.jit(tx.update), tx.init(params), params
        for i in range(4):
            grads = {"w": jax.random.normal(jax.random.key(i), (300, 300))}
            updates, state = update(grads, state, now)
            now = optax.apply_updates(now, updates)
        runs.append(now["w"])
    np.testing.assert_array_equal(*runs)
    assert state.support["w"].shape == (2 * 2 + 4500,)


@pytest.mark.parametrize("layers", [None, np.int32([1, 0])], ids=["all", "some"])
@pytest.mark.parametrize("granularity", ["entry", "entry16"])
def test_arrays_of_numpy_are_read_and_written(granularity, layers):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    support = np.int32([[0, 5], [1, 2]])
    wanted = x[[[0], [1]] if layers is None else layers[:, None]]
    wanted = np.take_along_axis(wanted.reshape(2, 12), support, axis=1)
    if granularity == "entry16":
        support = short(support, x.shape)
    packed = np.asarray(gather(x, support, layers, granularity=granularity))
    np.testing.assert_array_equal(packed, wanted)
    new = scatter(x, support, packed, layers, granularity=granularity)
    np.testing.assert_array_equal(new, x)


WRONG = {
    "unsorted": ([3, 1], "ascending"),
    "twice": ([3, 3], "distinct"),
    "past the end": ([3, 12], "below 12"),
}


@pytest.mark.parametrize(("low", "message"), WRONG.values(), ids=WRONG)
def test_a_support_of_another_array_is_refused(low, message):
    support = jnp.array([2, 0, *low], jnp.uint16)
    with pytest.raises(InputError, match=message):
        gather(jnp.ones((3, 4)), support, granularity="entry16")


@pytest.mark.parametrize(
    ("shape", "positions"), [((3, 4), (0,)), ((2, 3, 4), (2, 0)), ((0, 3, 4), (0, 5))]
)
def test_a_support_may_hold_no_entries(shape, positions):
    none, x = np.zeros(positions, np.int32), jnp.ones(shape)
    support = short(none, shape)
    assert support.shape == (*positions[:-1], 2 + positions[-1])
    back = SHORT_ENTRY.to_positions(support, shape)[0]
    assert (support.dtype, back.dtype) == (np.uint16, np.int32)
    assert back.shape == positions
    if len(x):
        support = jnp.asarray(support)
        packed = gather(x, support, granularity="entry16")
        assert packed.shape == positions
        new = scatter(x, support, packed, granularity="entry16")
        np.testing.assert_array_equal(new, x)


def test_a_support_without_room_for_its_chunks_is_refused():
    with pytest.raises(InputError, match="`support` must be one of granularity"):
        gather(jnp.ones((7, CHUNK)), jnp.zeros(5, jnp.uint16), granularity="entry16")


def test_a_run_and_its_adapter_have_the_entries_of_long_positions(tmp_path):
    files = write_files(tmp_path)
    adapters = []
    for granularity in ("entry", "entry16"):
        output = tmp_path / granularity
        options = {"granularity": granularity, "save_every": 1, "density": 0.1}
        metrics = finetune(tiny_settings(**files, output=output, **options))
        adapters.append((load_adapter(output), metrics["eval"]))
    (long, one), (same, other) = adapters
    assert one == other
    assert same.method.granularity == "entry16"
    for name, support in long.support.items():
        assert same.support[name].dtype == np.int32
        np.testing.assert_array_equal(same.support[name], support)
        np.testing.assert_array_equal(same.values[name], long.values[name])

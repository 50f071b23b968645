"""Arrays sharded over a mesh: the same entries, without communication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sparse_jax import ENTRY, gather, scatter
from sparse_jax.supports.layout import Shards
from sparse_jax.supports.scores import SCORES
from sparse_jax.supports.top_k import top_k_support

SHAPE = (8, 16)
SHARDS = {
    "rows": Shards((("fsdp",), ()), (2, 1)),
    "columns": Shards(((), ("tensor",)), (1, 2)),
    "both": Shards((("fsdp",), ("tensor",)), (2, 2)),
    "columns first": Shards((("tensor",), ("fsdp",)), (2, 2)),
    "two axes on rows": Shards((("fsdp", "tensor"), ()), (4, 1)),
    "all axes": Shards((("data", "fsdp"), ("tensor",)), (4, 2)),
}
ARRAYS = {
    "normal": lambda random: random.normal(size=SHAPE),
    "ties": lambda random: random.integers(0, 3, SHAPE).astype(float),
    "zeros": lambda random: np.zeros(SHAPE),
    "not finite": lambda random: np.where(
        random.random(SHAPE) < 0.3, np.nan, random.normal(size=SHAPE)
    ),
    "in one shard": lambda random: np.pad(
        random.normal(size=(2, 3)), ((6, 0), (13, 0))
    ),
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )


def placed(mesh, x, spec):
    return jax.device_put(x, jax.NamedSharding(mesh, spec))


# Entries wanted; every program compiles for half a second.
WANTED = [
    ("normal", jnp.float32, 7),
    ("normal", jnp.bfloat16, 40),
    ("ties", jnp.float32, 40),
    ("zeros", jnp.bfloat16, 1),
    ("not finite", jnp.float32, 100),
    ("in one shard", jnp.float32, 7),
    ("normal", jnp.float32, 128),
]


def choose(x, k, layout, capacity):
    args = (SCORES["gradient"], x, x, k, jax.random.key(0))
    return layout.choose(*args, capacity=capacity)


@pytest.mark.parametrize(("name", "dtype", "k"), WANTED)
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.quick(3)
def test_a_sharded_array_has_the_support_of_the_whole(shards, name, dtype, k, mesh):
    shards = SHARDS[shards]
    layout = ENTRY.sharded(shards)
    x = jnp.asarray(ARRAYS[name](np.random.default_rng(0)), dtype)
    with jax.set_mesh(mesh):
        capacity = min(k, 128 // shards.number)
        select = jax.jit(lambda x: choose(x, k, layout, capacity))
        support, counts = select(placed(mesh, x, shards.spec()))
    (found,) = layout.to_positions(np.asarray(support), SHAPE)
    np.testing.assert_array_equal(found, top_k_support(x, k))
    assert counts.sum() == k
    # Unused places are past the end, distinct and in order.
    assert (np.diff(support, axis=1) > 0).all()


def test_a_full_shard_says_how_many_entries_it_lacks(mesh):
    layout = ENTRY.sharded(SHARDS["rows"])
    x = jnp.arange(128.0).reshape(SHAPE)
    with jax.set_mesh(mesh):
        select = jax.jit(lambda x: choose(x, 20, layout, 12))
        support, counts = select(placed(mesh, x, SHARDS["rows"].spec()))
    assert counts.tolist() == [0, 20]
    assert np.asarray(support)[1].tolist() == list(range(44, 56))


@pytest.mark.parametrize("shards", SHARDS)
def test_a_support_of_shards_and_positions_are_each_other_again(shards):
    layout, random = ENTRY.sharded(SHARDS[shards]), np.random.default_rng(0)
    rows = [np.sort(random.choice(128, 30, replace=False)) for _ in range(3)]
    positions, shape = np.stack(rows).astype(np.int32), (3, *SHAPE)
    numbers = np.arange(1, 91).reshape(3, 30)
    support, packed = layout.from_positions(positions, shape, numbers)
    assert (np.diff(support, axis=-1) > 0).all() and (packed > 0).sum() == 90
    again = layout.to_positions(support, shape, packed)
    np.testing.assert_array_equal(again[0], positions)
    np.testing.assert_array_equal(again[1], numbers)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layers", [None, (0, 2)])
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.quick(3)
def test_entries_of_shards_are_those_of_the_whole_stack(shards, layers, kind):
    shards, random = SHARDS[shards], np.random.default_rng(0)
    layout = ENTRY.sharded(shards)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    x = jnp.asarray(random.normal(size=(3, *SHAPE)), jnp.float32)
    rows = [np.sort(random.choice(128, 9, replace=False)) for _ in layers or range(3)]
    positions = np.stack(rows).astype(np.int32)
    numbers = None if layers is None else jnp.array(layers, jnp.int32)
    (support,) = layout.from_positions(positions, (3, *SHAPE))
    with jax.set_mesh(mesh):
        there = placed(mesh, x, shards.spec(stacked=True))
        support = placed(mesh, support, layout.spec(stacked=True))
        packed = np.asarray(jax.jit(layout.gather)(there, support, numbers))
        values = placed(mesh, 2 * packed + 1, layout.spec(stacked=True))
        new = jax.jit(layout.scatter)(there, support, values, numbers)
        assert new.sharding.spec == there.sharding.spec
    expected = np.asarray(gather(x, jnp.asarray(positions), numbers))
    found = layout.to_positions(np.asarray(support), (3, *SHAPE), packed)
    np.testing.assert_array_equal(found[1], expected)
    assert (packed[np.asarray(support) >= 128 // shards.number] == 0).all()
    wanted = jnp.asarray(2 * expected + 1)
    np.testing.assert_array_equal(
        new, scatter(x, jnp.asarray(positions), wanted, numbers)
    )


def test_nothing_is_communicated_but_counts(mesh):
    layout = ENTRY.sharded(SHARDS["both"])
    x = placed(mesh, jnp.ones((64, 64)), SHARDS["both"].spec())
    with jax.set_mesh(mesh):
        empty = layout.empty((64, 64), 8, capacity=8)
        support = placed(mesh, empty, layout.spec(stacked=False))
        packed = placed(mesh, jnp.ones((4, 8)), layout.spec(stacked=False))
        texts = [
            jax.jit(function).lower(*args).compile().as_text()
            for function, args in (
                (layout.gather, (x, support)),
                (layout.scatter, (x, support, packed)),
            )
        ]
        select = jax.jit(lambda x: choose(x, 50, layout, 32)).lower(x).compile()
    words = ("all-gather", "all-reduce", "all-to-all", "permute", "reduce-scatter")
    assert not any(word in text for text in texts for word in words)
    lines = [line for line in select.as_text().splitlines() if "all-" in line]
    assert lines
    assert all(" s32[] all-reduce(" in line for line in lines if " = " in line)

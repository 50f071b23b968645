"""Arrays cut over a mesh: the same entries as in one piece, without communication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sparse_jax.supports.sharded import (
    Cut,
    LocalSupport,
    gather_local,
    global_positions,
    local_tables,
    scatter_local,
    unused_tables,
)
from sparse_jax.supports.support import gather, scatter
from sparse_jax.supports.top_k import top_k_support, top_k_tables

SHAPE = (8, 16)
CUTS = {
    "rows": Cut((("fsdp",), ()), (2, 1)),
    "columns": Cut(((), ("tensor",)), (1, 2)),
    "both": Cut((("fsdp",), ("tensor",)), (2, 2)),
    "columns first": Cut((("tensor",), ("fsdp",)), (2, 2)),
    "two axes on rows": Cut((("fsdp", "tensor"), ()), (4, 1)),
    "all axes": Cut((("data", "fsdp"), ("tensor",)), (4, 2)),
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


@pytest.mark.parametrize(("name", "dtype", "k"), WANTED)
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_array_has_the_support_of_the_whole(cut, name, dtype, k, mesh):
    cut = CUTS[cut]
    x = jnp.asarray(ARRAYS[name](np.random.default_rng(0)), dtype)
    with jax.set_mesh(mesh):
        select = jax.jit(lambda x: top_k_tables(x, k, cut, min(k, 128 // cut.shards)))
        tables, counts = select(placed(mesh, x, cut.spec))
    found, _ = global_positions(np.asarray(tables), cut, SHAPE)
    np.testing.assert_array_equal(found, top_k_support(x, k))
    assert counts.sum() == k
    # Unused slots lie behind the end, distinct and in order.
    assert (np.diff(tables, axis=1) > 0).all()


def test_a_full_table_says_how_many_entries_it_lacks(mesh):
    cut = CUTS["rows"]
    x = jnp.arange(128.0).reshape(SHAPE)
    with jax.set_mesh(mesh):
        select = jax.jit(lambda x: top_k_tables(x, 20, cut, 12))
        tables, counts = select(placed(mesh, x, cut.spec))
    assert counts.tolist() == [0, 20]
    assert np.asarray(tables)[1].tolist() == list(range(44, 56))


@pytest.mark.parametrize("cut", CUTS)
def test_tables_and_positions_are_each_other_again(cut):
    cut = CUTS[cut]
    support = np.sort(np.random.default_rng(0).choice(128, 30, replace=False))
    tables, places = local_tables(support, cut, SHAPE)
    found, slots = global_positions(tables, cut, SHAPE)
    np.testing.assert_array_equal(found, support)
    np.testing.assert_array_equal(places.reshape(-1)[slots], np.arange(30))
    assert (places >= 0).sum() == 30


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layers", [None, (0, 2)])
@pytest.mark.parametrize("cut", CUTS)
def test_local_entries_are_those_of_the_whole_stack(cut, layers, kind):
    cut, random = CUTS[cut], np.random.default_rng(0)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    x = jnp.asarray(random.normal(size=(3, *SHAPE)), jnp.float32)
    chosen = [np.sort(random.choice(128, 9, replace=False)) for _ in range(3)]
    made = [local_tables(row, cut, SHAPE, 9) for row in chosen]
    rows = list(layers or range(3))
    tables = jnp.stack([made[row][0] for row in rows]).astype(jnp.int32)
    places = np.stack([made[row][1] for row in rows])
    numbers = None if layers is None else jnp.array(layers, jnp.int32)
    whole = jnp.stack([jnp.asarray(chosen[row], jnp.int32) for row in rows])
    with jax.set_mesh(mesh):
        support = LocalSupport(tables, cut)
        support = LocalSupport(placed(mesh, tables, support.spec), cut)
        there = placed(mesh, x, jax.P(None, *cut.spec))
        packed = np.asarray(jax.jit(gather_local)(there, support, numbers))
        values = placed(mesh, 2 * packed + 1, support.spec)
        new = jax.jit(scatter_local)(there, support, values, numbers)
        assert new.sharding.spec == there.sharding.spec
    expected = np.asarray(gather(x, whole, numbers))
    used = places >= 0
    np.testing.assert_array_equal(
        packed[used],
        np.concatenate([expected[i][places[i][used[i]]] for i in range(len(rows))]),
    )
    assert (packed[~used] == 0).all()
    np.testing.assert_array_equal(
        new, scatter(x, whole, jnp.asarray(2 * expected + 1), numbers)
    )


def test_nothing_is_communicated_but_counts(mesh):
    cut = CUTS["both"]
    x = placed(mesh, jnp.ones((64, 64)), cut.spec)
    with jax.set_mesh(mesh):
        support = unused_tables((64, 64), cut, 8, False)
        positions = placed(mesh, support.positions, support.spec)
        support = LocalSupport(positions, cut)
        packed = placed(mesh, jnp.ones((4, 8)), support.spec)
        texts = [
            jax.jit(function).lower(*args).compile().as_text()
            for function, args in (
                (gather_local, (x, support)),
                (scatter_local, (x, support, packed)),
            )
        ]
        select = jax.jit(lambda x: top_k_tables(x, 50, cut, 32)).lower(x).compile()
    words = ("all-gather", "all-reduce", "all-to-all", "permute", "reduce-scatter")
    assert not any(word in text for text in texts for word in words)
    lines = [line for line in select.as_text().splitlines() if "all-" in line]
    assert lines
    assert all(" s32[] all-reduce(" in line for line in lines if " = " in line)

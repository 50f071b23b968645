"""Rows, columns and rectangles of a matrix as what is chosen."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from tiny_run import tiny_settings, write_files

from sparse_jax import (
    Blocks,
    Compact,
    InputError,
    Sparse,
    evaluate_adapter,
    finetune,
    gather,
    load_adapter,
    scatter,
    sift,
)
from sparse_jax.supports.granularity import GRANULARITIES, granularity_named
from sparse_jax.supports.layout import Shards
from sparse_jax.supports.scores import SCORES

KEY = jax.random.key(0)
SHAPE = (8, 12)
KINDS = {
    "row": GRANULARITIES["row"],
    "column": GRANULARITIES["column"],
    "4x4": GRANULARITIES["4x4"],
    "2x3": Blocks(rows=2, columns=3),
}
every_kind = pytest.mark.parametrize("layout", KINDS.values(), ids=KINDS)


def blocks_of(layout, x):
    """Returns the entries of every block of a matrix, block by block."""
    rows, columns = layout.rows or x.shape[0], layout.columns or x.shape[1]
    return np.stack([
        x[i : i + rows, j : j + columns].ravel()
        for i in range(0, x.shape[0], rows) for j in range(0, x.shape[1], columns)
    ])  # fmt: skip


def test_means_that_bfloat16_cannot_tell_apart_are_told_apart():
    x = jnp.array([[1, 1], [1, 1.0078125]], jnp.bfloat16)  # means 1 and 1.00390625
    support, _ = KINDS["row"].choose(SCORES["magnitude"], None, x, 2, KEY)
    assert support.tolist() == [1]


@every_kind
def test_the_blocks_of_largest_mean_magnitude_are_chosen(layout):
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    blocks = blocks_of(layout, x)
    k = layout.size(0.3, SHAPE)
    number = math.ceil(0.3 * len(blocks))
    assert k == number * blocks.shape[1]
    for word, sign in (("gradient", -1), ("smallest-fisher", 1)):
        score = SCORES[word]
        support, count = layout.choose(score, score.added(jnp.array(x)), x, k, KEY)
        means = np.mean(np.abs(score.added(blocks)), axis=1)
        order = np.argsort(sign * means, kind="stable")[:number]
        np.testing.assert_array_equal(support, np.sort(order))
        assert count == k
    np.testing.assert_array_equal(
        gather(jnp.array(x), support, granularity=layout), blocks[np.sort(order)]
    )


@every_kind
def test_blocks_of_a_stack_are_written_and_read_again(layout):
    random = np.random.default_rng(0)
    stack = jnp.array(random.normal(size=(3, *SHAPE)), jnp.float32)
    number = len(blocks_of(layout, np.zeros(SHAPE)))
    support = np.stack([np.sort(random.permutation(number)[:2]) for _ in range(2)])
    layers = jnp.array([2, 0])
    packed = gather(stack, jnp.int32(support), layers, granularity=layout)
    for layer, rows, values in zip((2, 0), support, packed, strict=True):
        blocks = blocks_of(layout, np.asarray(stack[layer]))
        np.testing.assert_array_equal(values, blocks[rows])
    args = (jnp.int32(support), packed + 1, layers)
    new = scatter(stack, *args, granularity=layout)
    assert (
        np.asarray(new != stack).sum((1, 2)) == [packed[0].size, 0, packed[0].size]
    ).all()
    again = gather(new, jnp.int32(support), layers, granularity=layout)
    np.testing.assert_array_equal(again, packed + 1)


# Of an array, and of layers with other blocks each; in one piece and in shards.
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("shards", [None, Shards((("fsdp",), ("tensor",)), (2, 2))])
def test_positions_of_entries_and_numbers_of_blocks_undo_each_other(lead, shards):
    layout, random = Blocks(shards, rows=2, columns=3), np.random.default_rng(0)
    whole = Blocks(rows=2, columns=3)
    number = lambda: np.sort(random.permutation(16)[:5]).astype(np.int32)
    support = np.stack([number(), number()]) if lead else number()
    values = random.normal(size=(*support.shape, 6)).astype(np.float32)
    positions, flat = whole.to_positions(support, (*lead, *SHAPE), values)
    assert (np.diff(positions) > 0).all() and positions.shape == (*lead, 30)
    there = layout.from_positions(positions, (*lead, *SHAPE), flat)
    back = layout.to_positions(there[0], (*lead, *SHAPE), there[1])
    np.testing.assert_array_equal(back[0], positions)
    np.testing.assert_array_equal(back[1], flat)
    if shards is None:
        np.testing.assert_array_equal(there[0], support)
        np.testing.assert_array_equal(there[1], values)


# layout -> room in the support of a shard
IN_SHARDS = {
    "2x3": (KINDS["2x3"], 2),
    "row": (KINDS["row"], 4),
    "column": (KINDS["column"], 3),
}


@pytest.mark.parametrize(("whole", "room"), IN_SHARDS.values(), ids=IN_SHARDS)
def test_shards_choose_and_reach_what_one_device_does(whole, room):
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=kinds)
    layout = whole.sharded(Shards((("fsdp",), ("tensor",)), (2, 4)))
    x = jax.random.normal(KEY, SHAPE)
    k = whole.size(0.3, SHAPE)
    expected, _ = whole.choose(SCORES["gradient"], x, x, k, KEY)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
        choose = functools.partial(layout.choose, SCORES["gradient"], k=k, key=KEY)
        choose = jax.jit(functools.partial(choose, capacity=room))
        support, counts = choose(placed, placed)
        packed = jax.jit(layout.gather)(placed, support)
        new = jax.jit(layout.scatter)(placed, support, packed + 1)
    assert counts.sum() == k and counts.max() <= room * packed.shape[-1]
    positions = layout.to_positions(np.asarray(support), SHAPE)[0]
    np.testing.assert_array_equal(
        positions, whole.to_positions(np.asarray(expected), SHAPE)[0]
    )
    moved = np.flatnonzero(np.asarray(new) != np.asarray(x))
    np.testing.assert_array_equal(moved, positions)


def loss(params, batch, key, attachment):
    """Returns a sum whose gradient is `batch`; layers run one after the other."""
    total = jnp.float32(0)
    for i in range(2):
        layer, own = (
            jax.tree.map(lambda leaf, i=i: leaf[i], tree)
            for tree in (params["layers"], attachment.trained)
        )
        w = attachment.weights(layer, own)["w"]
        total += jnp.sum(w.astype(jnp.float32) * batch["layers"]["w"][i])
    return total, 1


@pytest.mark.parametrize("granularity", ["row", "4x4"])
def test_both_tiers_train_the_same_blocks(granularity):
    draw = lambda seed: {
        "layers": {"w": jax.random.normal(jax.random.key(seed), (2, *SHAPE))}
    }
    rules, inner = {"density": 0.3, "granularity": granularity}, optax.adam(0.1)
    tx = sift(inner, **rules, stacked="layers", reselect_every=2)
    theirs = draw(0)
    opt, tuner = tx.init(theirs), Compact(loss, Sparse(**rules), inner)
    first, _ = tuner.select(tuner.init(theirs, KEY), draw(1), KEY)
    state = first
    for i in range(3):
        updates, opt = jax.jit(tx.update)(draw(i + 1), opt, theirs)
        theirs = optax.apply_updates(theirs, updates)
        if i < 2:
            state, _ = jax.jit(tuner.step)(state, draw(i + 1), KEY)
        if i == 1:
            near = functools.partial(np.testing.assert_allclose, rtol=1e-6)
            jax.tree.map(np.testing.assert_array_equal, state.support, opt.support)
            jax.tree.map(near, state.params, theirs)
            before = opt
    # Moments of a block in both selections went on, those of a new one started.
    old, new = (np.asarray(s.support["layers"]["w"][0]) for s in (before, opt))
    mu = opt.inner_state[0].mu["layers"]["w"][0]
    gradient = KINDS[granularity].gather(draw(3)["layers"]["w"][0], jnp.array(new))
    for i, block in enumerate(new):
        was = (
            before.inner_state[0].mu["layers"]["w"][0][list(old).index(block)]
            if block in old
            else 0
        )
        np.testing.assert_allclose(mu[i], 0.9 * was + 0.1 * gradient[i], rtol=1e-5)


def test_a_run_by_rows_has_an_adapter_of_entries(tmp_path):
    files = write_files(tmp_path)
    where = ["attention/query/kernel"]
    options = {"granularity": "row", "where": where, "sampler": "uniform"}
    metrics = finetune(tiny_settings(**files, output=tmp_path / "run", **options))
    adapter = load_adapter(tmp_path / "run")
    support = adapter.support["layers/attention/query/kernel"]
    rows = support.reshape(len(support), -1, 16)
    assert (np.diff(rows, axis=-1) == 1).all() and rows.shape[1] == 2
    found = evaluate_adapter(tmp_path / "run", data=str(files["data"]))
    assert found == metrics["eval"]


BAD = {
    "rows": (
        KINDS["4x4"], (6, 12),
        "`kernel` must have rows in multiples of 4 to be trained by 4x4 blocks, got 6 "
        "rows (shape [6, 12]). Choose smaller blocks, or leave it out of `where`.",
    ),
    "columns": (
        Blocks(rows=256, columns=256), (1536, 576),
        "`kernel` must have columns in multiples of 256 to be trained by 256x256 "
        "blocks, got 576 columns (shape [1536, 576]). Choose smaller blocks, or leave "
        "it out of `where`.",
    ),
    "a vector by rows": (
        KINDS["row"], (8,),
        "`kernel` must be a matrix to be trained by rows, got shape [8]. Choose "
        "kernels alone by `where`, such as 'kernel$'.",
    ),
    "a vector by columns": (
        KINDS["column"], (8,),
        "`kernel` must be a matrix to be trained by columns, got shape [8]. Choose "
        "kernels alone by `where`, such as 'kernel$'.",
    ),
    "several rows in shards": (
        Blocks(Shards(((), ("tensor",)), (1, 4)), rows=2, columns=None), (8, 12),
        "`kernel` must have all columns in one shard to be trained by blocks of 2 "
        "rows, got 12 columns in 4 shards. Choose smaller blocks, or a `mesh` that "
        "shards the other axis.",
    ),
    "blocks in shards": (
        Blocks(Shards((("fsdp",), ()), (4, 1)), rows=4, columns=4), (8, 12),
        "`kernel` must have rows in multiples of 4 to be trained by 4x4 blocks, got 8 "
        "rows in shards of 2 (shape [8, 12]). Choose smaller blocks, a smaller axis of "
        "`mesh`, or leave it out of `where`.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "shape", "message"), BAD.values(), ids=BAD)
def test_blocks_that_do_not_fill_a_matrix_are_refused(layout, shape, message):
    with pytest.raises(InputError) as error:
        layout.require("kernel", shape)
    assert str(error.value) == message


def test_a_word_and_its_blocks_are_the_same():
    assert granularity_named("4x4") == Blocks(rows=4, columns=4)
    with pytest.raises(InputError, match="'4x4', '256x256'"):
        granularity_named("3x3")

"""`sift`: the equation by hand, the limiting cases, and what its options promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax import LANE, InputError, sift

GRADIENT = jnp.array([[0.1, -0.5, 0.3], [0.2, 0.0, -0.4], [0.6, 0.05, 0.01]])
WEIGHT = jnp.arange(1.0, 10.0).reshape(3, 3)


def tree(dtype=jnp.float32):
    key = jax.random.key(0)
    leaf = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
    return {
        "layers": {"query": leaf(0, 4, 8, 8), "bias": leaf(1, 4, 8)},
        "embedding": leaf(2, 16, 8),
        "classifier": leaf(3, 8, 3),
    }


def gradients(i, like):
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(100 + i), len(leaves))
    draw = lambda key, leaf: jax.random.normal(key, leaf.shape, leaf.dtype)
    return jax.tree.unflatten(treedef, map(draw, keys, leaves))


def train(tx, params, steps, first=0):
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(first, first + steps):
        params, state = step(params, state, gradients(i, params))
    return params, state


def test_only_the_largest_gradients_move_the_weights():
    tx = sift(optax.sgd(1.0), density=0.34)  # ceil(0.34 * 9) = 4 entries
    updates, state = tx.update(GRADIENT, tx.init(WEIGHT), WEIGHT)
    np.testing.assert_array_equal(state.support, [1, 2, 5, 6])
    expected = [[0.0, 0.5, -0.3], [0.0, 0.0, 0.4], [-0.6, 0.0, 0.0]]
    np.testing.assert_array_equal(updates, jnp.array(expected))


def test_the_first_gradient_selects_once_and_for_all():
    tx = sift(optax.sgd(1.0), density=0.2)
    _, state = tx.update(GRADIENT, tx.init(WEIGHT), WEIGHT)
    updates, state = tx.update(GRADIENT[::-1], state, WEIGHT)
    np.testing.assert_array_equal(state.support, [1, 6])
    np.testing.assert_array_equal(np.flatnonzero(updates), [1, 6])


def test_full_density_is_inner():
    params = tree()
    ours, _ = train(sift(optax.adamw(1e-2), density=1.0), params, 5)
    theirs, _ = train(optax.adamw(1e-2), params, 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_weight_decay_moves_nothing_outside_the_support():
    params = tree()
    tx = sift(
        optax.adamw(1e-2, weight_decay=0.1), 0.05, where="query", stacked="layers"
    )
    after, state = train(tx, params, 20)
    moved = jax.tree.map(lambda a, b: a != b, params, after)
    assert int(moved["layers"]["query"].sum()) == 4 * 4  # ceil(0.05 * 64) = 4 a layer
    assert not moved["embedding"].any() and not moved["classifier"].any()
    for layer in range(4):
        np.testing.assert_array_equal(
            np.flatnonzero(moved["layers"]["query"][layer]),
            state.support["layers"]["query"][layer],
        )


def test_dense_leaves_are_trained_in_full_with_the_same_optimizer():
    params = tree()
    tx = sift(optax.adamw(1e-2), 0.05, where="query", dense="classifier")
    after, _ = train(tx, params, 4)
    expected, _ = train(optax.adamw(1e-2), params, 4)
    np.testing.assert_allclose(after["classifier"], expected["classifier"], rtol=1e-6)
    np.testing.assert_array_equal(after["embedding"], params["embedding"])


def test_stacked_layers_get_a_support_each():
    params = tree()
    _, stacked = train(sift(optax.sgd(0.1), 0.1, stacked="layers"), params, 1)
    alone = {str(i): params["layers"]["query"][i] for i in range(4)}
    grads = gradients(0, params)["layers"]["query"]
    tx = sift(optax.sgd(0.1), 0.1)
    _, state = tx.update({str(i): grads[i] for i in range(4)}, tx.init(alone), alone)
    expected = jnp.stack([state.support[str(i)] for i in range(4)])
    np.testing.assert_array_equal(stacked.support["layers"]["query"], expected)


def test_the_state_is_sixteen_bytes_per_entry_or_less():
    params = {"w": jnp.zeros((100, 100))}
    for dtype, most in ((jnp.float32, 12), (jnp.bfloat16, 16)):
        tx = sift(optax.adam(1e-3), density=0.05)
        state = tx.init(jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), params))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        scalars = 3 * 4
        assert size == most * 500 + scalars


def test_bfloat16_parameters_follow_their_float32_masters():
    params = {"w": jnp.full((8,), 1.0, jnp.bfloat16)}
    grads = {"w": jnp.full((8,), 1.0, jnp.bfloat16)}
    tx = sift(optax.sgd(1e-4), density=0.5)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(100):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    # Alone, each step of 1e-4 would be lost in bfloat16, whose spacing at 1 is 0.004.
    np.testing.assert_allclose(state.masters["w"], 0.99, rtol=1e-5)
    np.testing.assert_array_equal(params["w"][:4], jnp.bfloat16(0.99))
    np.testing.assert_array_equal(params["w"][4:], jnp.bfloat16(1.0))
    assert updates["w"].dtype == jnp.bfloat16


def test_several_gradients_are_summed_before_the_selection():
    params = {"w": jnp.zeros(4)}
    tx = sift(optax.sgd(1.0), density=0.25, select_batches=2)
    state = tx.init(params)
    updates, state = tx.update({"w": jnp.array([3.0, 2.0, 0.0, 0.0])}, state, params)
    np.testing.assert_array_equal(updates["w"], np.zeros(4))
    updates, state = tx.update({"w": jnp.array([-3.0, 2.0, 1.0, 0.0])}, state, params)
    np.testing.assert_array_equal(updates["w"], [0.0, -2.0, 0.0, 0.0])


def test_a_gradient_that_is_not_finite_does_not_select():
    params = {"w": jnp.zeros(4)}
    tx = sift(optax.adam(0.1), density=0.25)
    state = tx.init(params)
    for bad in (jnp.nan, jnp.inf):
        updates, state = tx.update({"w": jnp.array([bad, 1, 2, 3])}, state, params)
        np.testing.assert_array_equal(updates["w"], np.zeros(4))
    assert (int(state.count), int(state.skipped)) == (0, 2)
    updates, state = tx.update({"w": jnp.array([0.0, 1, 2, 3])}, state, params)
    assert (int(state.count), int(state.skipped)) == (1, 2)
    np.testing.assert_array_equal(state.support["w"], [3])
    np.testing.assert_allclose(updates["w"], [0, 0, 0, -0.1], rtol=1e-5)


RESELECTING = {"w": jnp.zeros(4)}
FIRST = {"w": jnp.array([4.0, 3.0, 1.0, 2.0])}
SECOND = {"w": jnp.array([1.0, 4.0, 3.0, 2.0])}


def reselect(**options):
    tx = sift(optax.adam(0.1), density=0.5, reselect_every=2, **options)
    state = tx.init(RESELECTING)
    for grads in (FIRST, FIRST):
        _, state = tx.update(grads, state, RESELECTING)
    np.testing.assert_array_equal(state.support["w"], [0, 1])
    before = state.inner_state[0]
    _, state = tx.update(SECOND, state, RESELECTING)
    np.testing.assert_array_equal(state.support["w"], [1, 2])
    return before, state.inner_state[0]


def test_carried_state_follows_its_entries():
    before, after = reselect()
    # Entry 1 stays: 0.9 of its mean plus 0.1 of the gradient 4. Entry 2 starts at 0.
    np.testing.assert_allclose(after.mu["w"], [0.9 * before.mu["w"][1] + 0.4, 0.3])
    assert int(after.count) == 3


def test_restarted_state_is_as_new():
    _, after = reselect(reselect_state="restart")
    np.testing.assert_allclose(after.mu["w"], [0.4, 0.3], rtol=1e-6)
    assert int(after.count) == 1


def test_lanes_take_as_many_entries_of_every_128_rows():
    tx = sift(optax.sgd(1.0), density=0.02, granularity=LANE)  # ceil(2.56) = 3 of 128
    weight = jnp.zeros((256, 2))
    # The largest of column 0 are at the end of each half, of column 1 at its start.
    rise = jnp.tile(jnp.arange(1.0, 129.0), 2)
    grads = jnp.stack([rise, -rise[::-1]], axis=1)
    updates, state = tx.update(grads, tx.init(weight), weight)
    moved = np.array(updates).reshape(2, 128, 2)
    for half in moved:
        np.testing.assert_array_equal(np.flatnonzero(half[:, 0]), [125, 126, 127])
        np.testing.assert_array_equal(np.flatnonzero(half[:, 1]), [0, 1, 2])
        np.testing.assert_array_equal(half[125:, 0], [-126.0, -127.0, -128.0])
    assert state.support.dtype == jnp.uint8


def test_carried_state_follows_its_lanes():
    tx = sift(optax.adam(0.1), density=2 / 128, reselect_every=1, granularity=LANE)
    weight = jnp.zeros((128, 2))
    first = weight.at[jnp.array([3, 9]), 0].set(1.0).at[jnp.array([5, 6]), 1].set(1.0)
    second = weight.at[jnp.array([9, 70]), 0].set(2.0).at[jnp.array([2, 6]), 1].set(2.0)
    state = tx.update(first, tx.init(weight), weight)[1]
    np.testing.assert_allclose(state.inner_state[0].mu.ravel(), 0.1)
    mu = tx.update(second, state, weight)[1].inner_state[0].mu[:, 0]
    # Row 9 of column 0 and row 6 of column 1 stay: 0.9 of 0.1, and 0.1 of 2.
    np.testing.assert_allclose(mu, [[0.29, 0.2], [0.2, 0.29]], rtol=1e-6)


def test_a_leaf_without_groups_is_named():
    tx = sift(optax.sgd(1.0), density=0.1, granularity=LANE)
    with pytest.raises(InputError, match=r"`w` must be a matrix or a vector to be"):
        tx.init({"w": jnp.zeros((4, 4, 2))})


def test_masters_survive_reselection():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    tx = sift(optax.sgd(1e-3), density=0.5, reselect_every=1)
    state = tx.init(params)
    for grads in (FIRST, SECOND):
        grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
        _, state = tx.update(grads, state, params)
    # Entry 1 took both steps, 3e-3 and 4e-3; entry 2 only the second, 3e-3.
    np.testing.assert_allclose(state.masters["w"], [0.993, 0.997], rtol=1e-6)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("gradient", [1, 6]),
        ("magnitude", [7, 8]),
        ("gradient/magnitude", [0, 1]),
        (lambda gradient, param: -(param.astype(float) ** 2), [7, 8]),
    ],
    ids=["gradient", "magnitude", "gradient/magnitude", "callable"],
)
def test_each_score_ranks_by_its_rule(score, expected):
    tx = sift(optax.sgd(1.0), density=0.2, score=score)
    _, state = tx.update(GRADIENT, tx.init(WEIGHT), WEIGHT)
    np.testing.assert_array_equal(state.support, expected)


def test_random_supports_depend_on_the_key_alone():
    params = {"w": jnp.zeros(1000)}

    def support(key, seed):
        tx = sift(optax.sgd(1.0), density=0.1, score="random", key=jax.random.key(key))
        grads = {"w": jax.random.normal(jax.random.key(seed), (1000,))}
        return tx.update(grads, tx.init(params), params)[1].support["w"]

    np.testing.assert_array_equal(support(1, 0), support(1, 1))
    shared = np.intersect1d(support(1, 0), support(2, 0)).size
    # Two random tenths of 1000 share 10 entries on average, standard deviation 2.8.
    assert shared < 25


def test_without_inner_the_gradient_is_masked_for_what_follows():
    params = tree()
    tx = optax.chain(sift(density=0.1), optax.adam(1e-2))
    after, _ = train(tx, params, 3)
    wrapped, _ = train(sift(optax.adam(1e-2), density=0.1), params, 3)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, after, wrapped)


def test_clipping_outside_sees_the_dense_gradient():
    tx = optax.chain(optax.clip_by_global_norm(1.0), sift(optax.sgd(1.0), density=0.2))
    updates, _ = tx.update(GRADIENT * 100, tx.init(WEIGHT), WEIGHT)
    norm = float(optax.tree.norm(GRADIENT))
    np.testing.assert_allclose(updates[0, 1], 0.5 / norm, rtol=1e-5)


def test_integer_leaves_are_left_alone():
    params = {"w": jnp.ones(4), "step": jnp.array([3], jnp.int32)}
    grads = {"w": jnp.ones(4), "step": np.zeros(1, jax.dtypes.float0)}
    tx = sift(optax.sgd(1.0), density=0.5)
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["step"].dtype == jax.dtypes.float0
    assert isinstance(state.support["step"], optax.MaskedNode)


ERRORS = {
    "density-zero": (dict(density=0.0), r"`density` must be in \(0, 1\], got 0.0"),
    "density-large": (dict(density=1.5), r"`density` must be in \(0, 1\], got 1.5"),
    "density-nan": (dict(density=float("nan")), r"got nan"),
    "score": (dict(score="saliency"), r"`score` must be one of 'gradient'"),
    "select": (dict(select_batches=0), r"`select_batches` must be at least 1"),
    "reselect": (
        dict(select_batches=3, reselect_every=2),
        r"at least .select_batches=3.",
    ),
    "policy": (dict(reselect_state="drop"), r"`reselect_state` must be"),
    "key": (dict(score="random"), r"`key` must be given"),
    "compat": (dict(compat="lomo"), r"`compat` must be 'torch-sift'"),
    "compat-score": (
        dict(compat="torch-sift", score="magnitude"),
        r"must keep their defaults",
    ),
    "compat-lanes": (
        dict(compat="torch-sift", granularity=LANE),
        r"must keep their defaults",
    ),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_a_wrong_argument_is_named(options, message):
    with pytest.raises(InputError, match=message):
        sift(optax.sgd(1.0), **{"density": 0.1, **options})


def test_the_original_needs_an_optimizer():
    with pytest.raises(InputError, match="`inner` must be a transformation"):
        sift(density=0.1, compat="torch-sift")


@pytest.mark.parametrize("argument", ["where", "dense", "stacked"])
def test_a_rule_that_matches_nothing_names_its_neighbours(argument):
    tx = sift(optax.sgd(1.0), density=0.1, **{argument: "querry"})
    message = f"`{argument}` must match at least one parameter, got 'querry'. .*query"
    with pytest.raises(InputError, match=message):
        tx.init(tree())


def test_params_are_required_with_an_inner():
    tx = sift(optax.sgd(1.0), density=0.1)
    with pytest.raises(ValueError, match="`params` must be passed"):
        tx.update(GRADIENT, tx.init(WEIGHT))


@pytest.mark.parametrize("compat", [None, "torch-sift"])
def test_shards_have_supports_of_their_own_or_are_refused(compat):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = sift(optax.sgd(1.0), density=0.25, compat=compat)
    grads = jnp.arange(32.0).reshape(16, 2)

    def update(grads):
        return tx.update(grads, tx.init(grads), grads)[0]

    def mapped(**options):
        specs = {"in_specs": jax.P("x"), "out_specs": jax.P("x")}
        return jax.shard_map(update, mesh=mesh, **specs, **options)(grads)

    with pytest.raises(InputError, match=r"axes, got \['x'\]. Pass `check_vma=False`"):
        mapped()
    if compat is None:
        # Four entries a shard, of which the last is the largest.
        expected = np.where(np.arange(32) % 4 == 3, -np.arange(32), 0).reshape(16, 2)
        np.testing.assert_array_equal(mapped(check_vma=False), expected)


SHAPES = {
    "muon": (optax.contrib.muon(0.1), True),
    "adafactor": (optax.adafactor(0.1), True),
    "adamw": (optax.adamw(0.1), False),
    "prodigy": (optax.contrib.prodigy(), False),
    "lbfgs": (optax.scale_by_lbfgs(), False),
    "momentum": (optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)), False),
}


@pytest.mark.parametrize(("inner", "is_told"), SHAPES.values(), ids=SHAPES)
def test_a_transformation_that_looks_at_shapes_is_warned_of(inner, is_told, caplog):
    shapes = {"w": (3, 128, 128), "m": (128, 256), "b": (128,), "s": ()}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()
    }
    jax.eval_shape(sift(inner, stacked="w").init, params)
    assert ("treats matrices otherwise" in caplog.text) == is_told

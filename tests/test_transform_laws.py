"""Laws that every transformation of the package keeps: a table of cases and of laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_jax import LANE, Cyclic, GradientNorm, ist, sift


def layered(inner, **options):
    """Returns `ist` over the 8 layers of `query`, with a loss for its probes."""
    sizes = {"num_layers": 8, "num_active": 2}
    tx = ist(inner, layer_of="query", key=jax.random.key(0), **sizes, **options)
    # Layers 0 and 1 matter, so the importance moves.
    value_fn = lambda strength: 1.0 - 0.5 * strength[:2].mean()

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, value_fn=value_fn, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


SIZES = {"num_layers": 8, "num_active": 2}
LANES = {"where": "query", "stacked": "query", "granularity": LANE}
TRANSFORMS = {
    "sift": sift(optax.adamw(1e-2), density=0.1),
    "rules": sift(optax.adamw(1e-2), 0.1, where="query", dense="bias"),
    "stacked": sift(optax.adamw(1e-2), 0.1, stacked="query"),
    "several": sift(optax.adam(1e-2), 0.1, select_batches=2),
    "reselect": sift(optax.adam(1e-2), 0.1, reselect_every=2),
    "restart": sift(optax.adam(1e-2), 0.1, reselect_every=2, reselect_state="restart"),
    "random": sift(optax.adam(1e-2), 0.1, score="random", key=jax.random.key(0)),
    "masking": sift(density=0.1),
    "momentum": sift(optax.sgd(1e-2, momentum=0.9), 0.1),
    "lanes": sift(optax.adamw(1e-2), 0.05, **LANES),
    "lanes again": sift(optax.adam(1e-2), 0.05, reselect_every=2, **LANES),
    "original": sift(optax.adamw(1e-2), 0.1, compat="torch-sift"),
    "ist": layered(optax.adamw(1e-2), probe_every=2),
    "ist, restart": layered(optax.adamw(1e-2), probe_every=2, restart=True),
    "ist, frozen head": layered(optax.adamw(1e-2), probe_every=2, always_on="bias"),
    "uniform, held": layered(optax.adam(1e-2), sampler="uniform", hold=2),
    "cyclic": layered(optax.adam(1e-2), sampler=Cyclic(**SIZES, shuffled=True)),
    "norms": layered(optax.sgd(1e-2), sampler=GradientNorm(**SIZES)),
    "ist of sift": layered(sift(optax.adam(1e-2), 0.1), probe_every=2),
}
every_transform = pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)


def some_of(cases, share):
    """Returns a share of the pairs of transformations and cases; the rest is slow.

    Every transformation and every case is among them, in rotation.
    """
    pairs = []
    for i, (name, tx) in enumerate(TRANSFORMS.items()):
        for j, (word, case) in enumerate(cases.items()):
            marks = [pytest.mark.slow] if (i + j) % share else []
            pairs.append(pytest.param(tx, case, id=f"{word}-{name}", marks=marks))
    return pairs


def make_params(dtype=jnp.float32):
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, dtype)
    return {"query": draw(0, 8, 128, 8), "bias": draw(1, 16), "scale": draw(2)}


def make_grads(i, dtype=jnp.float32):
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, dtype)
    return {"query": draw(9 + i, 8, 128, 8), "bias": draw(99 + i, 16), "scale": draw(i)}


def run(tx, params, grads, update):
    state = tx.init(params)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_equal_trees(a, b, rtol=0.0, atol=0.0):
    check = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(lambda x, y: check(np.float64(x), np.float64(y)), a, b)


def as_type(leaf):
    return (jnp.shape(leaf), jnp.result_type(leaf))


@every_transform
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.quick(3)
def test_update_keeps_the_types_of_state_and_gradients(tx, dtype):
    params = make_params(dtype)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(make_grads(0, dtype), state, params)
    assert jax.tree.map(as_type, state) == jax.tree.map(as_type, after)
    assert jax.tree.map(as_type, updates) == jax.tree.map(as_type, params)


@every_transform
def test_init_accepts_abstract_parameters(tx):
    params = make_params()
    abstract = jax.eval_shape(lambda: params)
    shapes = jax.tree.map(as_type, jax.eval_shape(tx.init, abstract))
    assert shapes == jax.tree.map(as_type, tx.init(params))


@every_transform
@pytest.mark.quick(3)
def test_jit_equals_eager(tx):
    params, grads = make_params(), [make_grads(i) for i in range(3)]
    eager = run(tx, params, grads, tx.update)[0]
    # The compiler may fuse a multiply and an add: one rounding less.
    assert_equal_trees(run(tx, params, grads, jax.jit(tx.update))[0], eager, 1e-6, 1e-7)


@every_transform
def test_later_updates_and_selections_do_not_recompile(tx):
    params, grads = make_params(), [make_grads(i) for i in range(5)]
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update(grads[0], state, params)
    with jax.no_tracing():
        for grad in grads[1:]:
            _, state = update(grad, state, params)


@every_transform
def test_unknown_extra_arguments_are_accepted(tx):
    params = make_params()
    arrays = make_grads(0), tx.init(params), params
    jax.eval_shape(tx.update, *arrays, value=1.0, unheard_of=2)


@every_transform
def test_strict_dtype_promotion_is_kept(tx):
    if tx not in [TRANSFORMS[name] for name in ("masking", "momentum", "norms")]:
        pytest.skip("optax.adam itself promotes an int32 count to float32")
    params = make_params()
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(tx.update, make_grads(0), tx.init(params), params)


@every_transform
def test_the_state_can_be_mapped_over(tx):
    state = tx.init(make_params())
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert_equal_trees(mapped, state)


@every_transform
def test_a_state_is_the_same_after_it_was_bytes(tx):
    params = make_params()
    _, state = jax.jit(tx.update)(make_grads(0), tx.init(params), params)
    again = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(assert_same_array, again, state)


def assert_same_array(a, b):
    assert jnp.result_type(a) == jnp.result_type(b)
    if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("granularity", ["entry", "entry16", "lane", LANE, "column"])
@pytest.mark.quick(1)
def test_the_optimizer_of_nnx_gives_the_numbers_of_optax(granularity):
    tx = sift(optax.adamw(1e-2), 0.05, granularity=granularity)
    model = nnx.Linear(128, 4, use_bias=False, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x, state = jax.random.normal(jax.random.key(1), (8, 128)), tx.init(params)
    loss = lambda model: jnp.mean((model(x) - 1.0) ** 2)
    pure = lambda p: jnp.mean((x @ p["kernel"] - 1.0) ** 2)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    @jax.jit
    def plain(params, state):
        updates, state = tx.update(jax.grad(pure)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        step(model, optimizer)
        params, state = plain(params, state)
    assert_equal_trees(nnx.to_pure_dict(nnx.state(model)), params, 1e-6, 1e-7)
    trained = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]
    support = trained["support"]["kernel"]
    np.testing.assert_array_equal(support, state.support["kernel"])


AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.mark.parametrize(("tx", "axis_type"), some_of(AXIS_TYPES, 2))
@pytest.mark.quick(3)
def test_eight_devices_give_what_one_gives(tx, axis_type):
    if axis_type == AxisType.Explicit and tx is TRANSFORMS["ist of sift"]:
        pytest.skip("JAX cannot turn a branch under `vmap` into a sharded choice")
    params, grads = make_params(), [make_grads(i) for i in range(3)]
    alone, alone_state = run(tx, params, grads, jax.jit(tx.update))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    specs = {"query": P(None, "data"), "bias": P("data"), "scale": P()}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, shardings)
        placed = [jax.device_put(grad, shardings) for grad in grads]
        state = jax.jit(tx.init)(spread)

        @jax.jit
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return jax.lax.with_sharding_constraint(params, shardings), state

        for grad in placed:
            spread, after = step(spread, state, grad)
            assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)
            state = after
    for leaf, sharding in zip(
        jax.tree.leaves(spread), jax.tree.leaves(shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert_equal_trees(spread, alone, 1e-6, 1e-7)
    if hasattr(state, "support"):
        assert_equal_trees(state.support, alone_state.support)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(
        tx, {"query": True, "bias": True, "scale": False}
    ),
    "partition": lambda tx: optax.partition(
        {"on": tx, "off": optax.set_to_zero()},
        {"query": "on", "bias": "on", "scale": "off"},
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(0.5),
}


@pytest.mark.parametrize(("tx", "wrap"), some_of(WRAPPERS, 3))
@pytest.mark.quick(3)
def test_it_composes(tx, wrap):
    wrapped = wrap(tx)
    params = make_params()
    state = wrapped.init(params)
    update = jax.jit(wrapped.update)
    for i in range(4):
        updates, state = update(make_grads(i), state, params)
        params = optax.apply_updates(params, updates)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


@every_transform
@pytest.mark.quick(3)
def test_injected_hyperparameters_change_no_number(tx):
    make = lambda rate: optax.chain(tx, optax.scale(rate))
    injected, params = optax.inject_hyperparams(make)(rate=0.5), make_params()
    updates, state = jax.jit(tx.update)(make_grads(0), tx.init(params), params)
    theirs, after = jax.jit(injected.update)(
        make_grads(0), injected.init(params), params
    )
    half = jax.tree.map(lambda leaf: 0.5 * leaf, updates)
    assert_equal_trees(theirs, half, 1e-6, 1e-7)
    jax.tree.map(
        lambda a, b: assert_same_array(a, b) if a.dtype == "int32" else None,
        after.inner_state[0],
        state,
    )


BOWL, VALLEY = jnp.array([1.0, -1.0, 1.0]), jnp.ones(2)
TARGETS = {
    "bowl": (
        lambda x: jnp.sum((x - BOWL.astype(x.dtype)) ** 2),
        [-1.0, 10.0, 1.0],
        BOWL,
    ),
    "valley": (
        lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
        [0.0, 0.0],
        VALLEY,
    ),
}
ONE_LAYER = {"layer_of": "^0$", "num_layers": 1, "num_active": 1}
SOLVERS = {
    "sift": sift(optax.adam(0.1), density=1.0),
    "sift, several": sift(optax.adam(0.1), density=1.0, select_batches=3),
    "ist": ist(optax.adam(0.1), key=jax.random.key(0), sampler="cyclic", **ONE_LAYER),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("loss", "start", "end"), TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("tx", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.quick(3)
def test_with_all_entries_trained_it_finds_the_minimum(tx, loss, start, end, dtype):
    with jax.enable_x64(dtype == "float64"):
        # A stack of one layer.
        params = [jnp.array([start], dtype)]
        total = lambda params: loss(params[0][0])

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(total)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=4000)[0])
        state = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(params))
        found, _ = run((params, state))
        assert found[0].dtype == dtype
        np.testing.assert_allclose(found[0][0], end, rtol=0.03, atol=0.03)


def test_arguments_that_fix_shapes_are_static_under_inject_hyperparams():
    tx = optax.inject_hyperparams(
        lambda learning_rate, density, select_batches: sift(
            optax.adam(learning_rate), density, select_batches=select_batches
        ),
        static_args=("density", "select_batches"),
    )(learning_rate=1e-2, density=0.1, select_batches=2)
    params = make_params()
    updates, state = tx.update(make_grads(0), tx.init(params), params)
    assert float(state.hyperparams["learning_rate"]) == np.float32(1e-2)


def test_training_a_tenth_of_the_entries_lowers_the_loss():
    target = make_params()
    params = jax.tree.map(jnp.zeros_like, target)
    loss = lambda p: sum(
        jnp.sum((a - b) ** 2)
        for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True)
    )
    tx = sift(optax.adam(0.05), density=0.1)
    step = lambda p, s: tx.update(jax.grad(loss)(p), s, p)
    state = tx.init(params)
    for _ in range(200):
        updates, state = jax.jit(step)(params, state)
        params = optax.apply_updates(params, updates)
    # The largest tenth of normal entries carries 44 % of their squares.
    assert float(loss(params)) < 0.6 * float(loss(jax.tree.map(jnp.zeros_like, target)))

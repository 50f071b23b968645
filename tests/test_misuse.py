"""What cannot be meant is refused in one line, before anything is computed."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax import (
    Compact,
    Dense,
    InputError,
    Layerwise,
    LoRA,
    Sparse,
    Uniform,
    ist,
    ist_value_fn,
    sift,
)
from sparse_jax.samplers.sampler import begin
from sparse_jax.supports.layout import require_density, support_size

KEY = jax.random.key(0)
PARAMS = {
    "layers": {"up": {"kernel": jnp.ones((3, 4, 4))}},
    "head": jnp.ones((4, 2)),
}
BATCH = {"x": jnp.ones((2, 4)), "y": jnp.zeros((2, 2))}
SGD = optax.sgd(0.1)
SPARSE = Sparse(density=0.5, where="kernel", dense="head")
METHODS = {
    "sift": SPARSE,
    "lora": LoRA(rank=1, where="up", dense="head"),
    "full": Dense(dense=".*"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def run(params, batch, attachment, *, asks, checkpoint=False):
    """Runs the stack; `asks` says what the layers ask of the attachment."""

    def layer(x, one):
        layer_params, trained = one
        if "weights" in asks:
            layer_params = attachment.weights(layer_params, trained)
        module = lambda x: x @ layer_params["up"]["kernel"]
        if "response" in asks:
            return jnp.tanh(attachment.response("up", module, x, trained, None)), None
        return jnp.tanh(module(x)), None

    layer = jax.checkpoint(layer) if checkpoint else layer
    stacked = (params["layers"], attachment.trained)
    return jax.lax.scan(layer, batch["x"], stacked)[0] @ params["head"]


def loss_that(asks, **options):
    def loss(params, batch, key, attachment):
        out = run(params, batch, attachment, asks=asks, **options)
        return jnp.sum((out - batch["y"]) ** 2), len(out)

    return loss


ALL = loss_that(("weights", "response"))


def shapes_of(tuner, params=PARAMS):
    return jax.eval_shape(tuner.init, params, KEY)


def step(tuner, state, batch=BATCH):
    """Traces a step, which is when it is refused."""
    return jax.eval_shape(tuner.step, state, batch, KEY)


def selected(tuner, batch=BATCH):
    return jax.eval_shape(tuner.select, shapes_of(tuner), batch, KEY)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_before_a_selection_is_refused(compiled):
    tuner = Compact(ALL, SPARSE, SGD)
    update = jax.jit(tuner.step) if compiled else tuner.step
    with pytest.raises(InputError, match="`state` must have its supports.*`select`"):
        update(tuner.init(PARAMS, KEY), BATCH, KEY)


def test_a_method_without_supports_needs_no_selection():
    tuner = Compact(ALL, METHODS["lora"], SGD)
    step(tuner, shapes_of(tuner))


IGNORED = {
    "sift": (SPARSE, "weights of its layers.*nothing in `layers` would be trained"),
    "lora": (
        METHODS["lora"],
        "response of every site of the method, got none for 'up'",
    ),
}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("method", "message"), IGNORED.values(), ids=IGNORED)
def test_a_model_that_ignores_its_attachment_is_refused(method, message, checkpoint):
    # The head is trained all the same, so the loss would fall.
    silent = Compact(loss_that((), checkpoint=checkpoint), method, SGD)
    state = selected(Compact(ALL, method, SGD))
    with pytest.raises(InputError, match=message):
        step(silent, state)


def test_a_selection_in_a_model_that_ignores_its_attachment_is_refused():
    silent = Compact(loss_that(()), SPARSE, SGD)
    with pytest.raises(InputError, match="asks for the weights"):
        selected(silent)


@every_method
@pytest.mark.parametrize("asks", [(), ("weights", "response")], ids=["none", "all"])
def test_layers_that_are_not_run_by_slots_are_refused(method, asks):
    sampler = Uniform(num_layers=3, num_active=1)
    tuner = Layerwise(loss_that(asks), method, SGD, sampler=sampler)
    state = shapes_of(tuner)
    state = selected(Compact(ALL, method, SGD))._replace(opt_state=state.opt_state)
    with pytest.raises(InputError, match="`loss` must (hand|run the layers)"):
        step(tuner, state)


def test_a_stack_of_another_number_of_layers_is_refused():
    tuner = Layerwise(ALL, SPARSE, SGD, sampler=Uniform(num_layers=5, num_active=1))
    with pytest.raises(
        InputError, match=r"`num_layers` .* got 5 where they have \[3\]"
    ):
        tuner.init(PARAMS, KEY)
    tuner = Layerwise(
        ALL, Sparse(density=0.5, stack="blocks"), SGD,
        sampler=Uniform(num_layers=3, num_active=1),
    )  # fmt: skip
    with pytest.raises(InputError, match="Name the subtree of the layers by `stack`"):
        tuner.init(PARAMS, KEY)


@pytest.mark.parametrize(
    ("method", "tx", "part"),
    [
        (SPARSE, optax.adam(0.1), "opt_state"),
        (Sparse(density=0.25, where="kernel", dense="head"), SGD, "support"),
        (METHODS["lora"], SGD, "support"),
        (Dense(dense="head"), SGD, "support"),
    ],
)
def test_the_state_of_another_tuner_is_refused(method, tx, part):
    state = selected(Compact(ALL, SPARSE, SGD))
    with pytest.raises(InputError, match=f"other arrays in its `{part}`"):
        step(Compact(ALL, method, tx), state)


def test_lora_of_another_rank_is_refused():
    state = shapes_of(Compact(ALL, LoRA(rank=2, where="up"), SGD))
    with pytest.raises(InputError, match="other arrays in its `added`"):
        step(Compact(ALL, LoRA(rank=1, where="up"), SGD), state)


LOSSES = {
    "two arguments": lambda params, batch: (0.0, 1),
    "no function": 1.0,
    "uncalled": None,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_with_other_arguments_is_refused(loss):
    with pytest.raises(InputError, match="`loss` must be a function"):
        Compact(loss, SPARSE, SGD)


RESULTS = {
    "one scalar": lambda total, w: total,
    "one array": lambda total, w: total * jnp.ones(2),
    "losses of the examples": lambda total, w: (total * jnp.ones(2), w),
    "three": lambda total, w: (total, w, w),
    "weights of the examples": lambda total, w: (total, jnp.ones(2)),
    "none": lambda total, w: None,
}


@pytest.mark.parametrize("change", RESULTS.values(), ids=RESULTS)
def test_a_loss_with_other_results_is_refused(change):
    tuner = Compact(lambda *args: change(*ALL(*args)), METHODS["full"], SGD)
    with pytest.raises(InputError, match="`loss` must return two scalars"):
        step(tuner, shapes_of(tuner))


def test_a_batch_without_micro_batches_is_refused():
    tuner = Compact(ALL, SPARSE, SGD, accumulate=4)
    message = r"shape \[accumulate=4, ...\], got \[2, 4\] for `x`"
    with pytest.raises(InputError, match=message):
        selected(tuner)
    full = Compact(ALL, METHODS["full"], SGD, accumulate=4)
    with pytest.raises(InputError, match=message):
        step(full, shapes_of(full))


LAYERS = {"layer_of": "layers", "num_layers": 3, "num_active": 1}
SITE = {"layers": {"up": {"kernel": jnp.zeros((3, 4, 2))}}}
ARGUMENTS = {
    "sift, uncalled": (lambda: sift(optax.adamw), "Call it: `adamw\\(...\\)`"),
    "sift, rate": (lambda: sift(1e-3), "`inner` must be an Optax transformation"),
    "ist, uncalled": (lambda: ist(optax.adamw, key=KEY, **LAYERS), "Call it: `adamw"),
    "compact, uncalled": (lambda: Compact(ALL, SPARSE, optax.adamw), "`tx` must be an"),
    "ist, seed": (
        lambda: ist(SGD, key=0, **LAYERS),
        "`key` must be one PRNG key, got 0",
    ),
    "ist, keys": (
        lambda: ist(SGD, key=jax.random.split(KEY), **LAYERS),
        "`key` must be",
    ),
    "sift, seed": (lambda: sift(SGD, score="random", key=0), "`key` must be one PRNG"),
    "init, seed": (lambda: Compact(ALL, SPARSE, SGD).init(PARAMS, 0), "`key` must be"),
    "method, class": (lambda: Compact(ALL, Sparse, SGD), "`method` must be a `Method`"),
    "accumulate": (
        lambda: Compact(ALL, SPARSE, SGD, 0),
        "`accumulate` must be at least 1",
    ),
    "sampler, class": (
        lambda: Layerwise(ALL, SPARSE, SGD, sampler=Uniform),
        "`sampler`",
    ),
    "sampler, word": (lambda: ist(SGD, key=KEY, sampler="lisa", **LAYERS), "`sampler`"),
    "half a layer": (lambda: Uniform(num_layers=3, num_active=0.5), "a whole number"),
    "granularity": (
        lambda: sift(SGD, granularity="diagonal"),
        "`granularity` must be one of 'entry', 'entry16', 'lane', .*, got 'diagonal'",
    ),
    "granularity, compact": (
        lambda: Sparse(density=0.5, granularity=3),
        "`granularity` must be one of 'entry', 'entry16', .* or a `Layout`, got 3",
    ),
    "score, compact": (
        lambda: Sparse(density=0.5, score="gradients"),
        "`score` must be one of 'gradient', ",
    ),
    "score of one argument": (
        lambda: sift(SGD, score=lambda gradient: gradient),
        r"`score` must be a function \(gradient, param\[, key\]\) -> scores, got",
    ),
    "score": (lambda: sift(SGD, score=3), "`score` must be one of"),
    "where, number": (
        lambda: sift(SGD, where=5).init(PARAMS),
        "`where` must be a regular",
    ),
    "where, numbers": (
        lambda: sift(SGD, where=(1,)).init(PARAMS),
        "`where` must be a reg",
    ),
    "where, broken": (
        lambda: sift(SGD, where="(").init(PARAMS),
        "`where` must be a regul",
    ),
    "dense": (lambda: sift(SGD, dense="tail").init(PARAMS), "`dense` must match"),
    "rank": (lambda: LoRA(rank=8.0), "`rank` must be a whole number, got 8.0"),
    "rank of a thin kernel": (
        lambda: LoRA(rank=3, where="up").added(SITE, KEY),
        "`rank` must be at most 2",
    ),
    "no sites": (
        lambda: LoRA(rank=1, stack="head").added({"head": {"w": jnp.ones(3)}}, KEY),
        "`stack` must name layers with linear maps, got 'head' without any",
    ),
    "no stack": (
        lambda: LoRA(rank=1, stack=None).added(PARAMS, KEY),
        "`stack` must name a subtree .*The subtrees are head, layers",
    ),
    "list of parameters": (
        lambda: LoRA(rank=1).added([jnp.ones(3)], KEY),
        "There are no subtrees",
    ),
    "python number": (
        lambda: sift(SGD).init({"a": 1.0}),
        "`a` must be an array, got 1.0",
    ),
    "integers": (
        lambda: sift(SGD, where="a").init({"a": jnp.arange(3)}),
        "got 'a' for int32",
    ),
    "huge leaf": (
        lambda: jax.eval_shape(
            sift(SGD).init, {"a": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
        ),
        r"`a` must have fewer than 2\*\*31 entries",
    ),
}


@pytest.mark.parametrize(("call", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_argument_that_cannot_be_meant_is_refused(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")])
def test_keys_of_any_kind_draw_layers(key):
    tx = ist(SGD, key=key, sampler="uniform", **LAYERS)
    _, state = jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS))
    assert state.sampler.active.shape == (1,)


def test_a_key_of_before_is_the_same_key():
    old = begin(Uniform(num_layers=3, num_active=1), jax.random.PRNGKey(7))
    new = begin(Uniform(num_layers=3, num_active=1), jax.random.key(7))
    np.testing.assert_array_equal(old.key_data, new.key_data)


TENTHS = [0.1, np.float32(0.1), np.float16(0.1), jnp.float32(0.1), jnp.bfloat16(0.1)]


@pytest.mark.parametrize("tenth", [*TENTHS, Fraction(1, 10)], ids=repr)
def test_a_tenth_of_twenty_is_two_in_every_type(tenth):
    assert support_size(require_density(tenth), 20) == 2
    assert sift(SGD, tenth).init({"a": jnp.ones(20)}).support["a"].shape == (2,)
    assert hash(Sparse(density=tenth)) is not None


def test_every_entry_is_a_density_of_one():
    assert support_size(require_density(np.int32(1)), 20) == 20


@pytest.mark.parametrize(
    "density", ["0.1", True, None, 0, 1.5, float("nan"), 1j, np.array([0.1])], ids=repr
)
def test_a_density_that_is_no_fraction_is_refused(density):
    with pytest.raises(InputError, match=r"`density` must be in \(0, 1\], got "):
        sift(SGD, density)


def test_a_density_under_inject_hyperparams_must_be_static():
    tx = optax.inject_hyperparams(sift)(inner=SGD, density=0.1)
    with pytest.raises(InputError, match="must be static"):
        jax.jit(tx.init)(PARAMS)
    tx = optax.inject_hyperparams(sift, static_args=("select_batches",))(
        SGD, density=0.1
    )
    with pytest.raises(InputError, match="`density` must be static"):
        jax.jit(tx.init)(PARAMS)


@pytest.mark.parametrize(("layers", "probes"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_the_defaults_of_ist_fit_a_model_of_any_depth(layers, probes):
    params = {"layers": jnp.ones((layers, 2))}
    tx = ist(SGD, layer_of="layers", num_layers=layers, num_active=1, key=KEY)
    assert tx.init(params).sampler.memory.losses.shape == (probes,)
    with pytest.raises(InputError, match="`num_probes` must be at most"):
        ist(SGD, layer_of="layers", num_layers=layers, num_active=1, key=KEY,
            num_probes=99)  # fmt: skip


def test_a_value_fn_damps_what_each_layer_has_learnt():
    start = {"0": jnp.ones(2), "1": jnp.ones(2), "head": jnp.ones(2)}
    now = {"0": jnp.full(2, 5.0), "1": jnp.full(2, 3.0), "head": jnp.full(2, 9.0)}
    loss = lambda p, scale: scale * (p["0"].sum() + 100 * p["1"].sum()) + p["head"][0]
    value_fn = ist_value_fn(loss, start, layer_of=r"^(\d)$")(now, 2.0)
    # Layer 0 at a quarter of what it learnt is 2, layer 1 at all of it is 3.
    assert float(value_fn(jnp.array([0.25, 1.0]))) == 2 * (4 + 600) + 9
    assert float(value_fn(jnp.zeros(2))) == 2 * (2 + 200) + 9
    assert float(value_fn(jnp.ones(2))) == float(loss(now, 2.0))

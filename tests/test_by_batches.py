"""A selection by several batches: the sum of their gradients, one layer at a time."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_compact import CONFIG, make_batch
from test_sharding import mesh_of, random_batch, supports_of, tiny_decoder

from sparse_jax import Compact, InputError, Layerwise, Sparse, Uniform
from sparse_jax.compact.by_batches import _LayeredLoss
from sparse_jax.compact.in_backward import InBackward
from sparse_jax.compact.selection import reselect
from sparse_jax.data.batches import stack_batches
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.stack import run_layers, stack_layers
from sparse_jax.sharding.mesh import MeshShape, make_mesh
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.runner import MeshRunner
from sparse_jax.supports.roles import SPARSE, map_roles
from sparse_jax.training.objective import make_loss, make_token_loss

N = 3
KEYS = jax.random.split(jax.random.key(1), N)
KERNELS = Sparse(density=0.05, where="^layers/.*kernel")
DEPTH, WIDTH = 3, 6  # of a model of one's own


@functools.cache
def decoder():
    """Returns loss, parameters and batches of a decoder."""
    model, params = tiny_decoder()
    one = random_batch()
    rolled = [np.roll(one["input_ids"], shift, 1) for shift in range(N)]
    batches = [{**one, "input_ids": ids} for ids in rolled]
    return (
        make_token_loss(model),
        params,
        jax.tree.map(lambda *x: np.stack(x), *batches),
    )


@functools.cache
def encoder():
    """Returns the same of an encoder, which has dropout."""
    config = replace(CONFIG, hidden_dropout=0.1, attention_dropout=0.1)
    model = Model(SequenceClassifier, BERT, config)
    batches = [{**make_batch(i), "weights": jnp.ones(8)} for i in range(N)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
    return make_loss(model), model.init(jax.random.key(0)), stacked


def choose(case, method=KERNELS, dtype=jnp.float32, tuner=Compact, **options):
    """Returns what is chosen from all batches, and the tuner and its state."""
    loss, params, batches = case
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    made = tuner(loss, method, optax.adam(1e-3), **options)
    state = made.init(params, jax.random.key(0))
    return jax.jit(made.choose)(state, batches, KEYS), made, state


def dense_sum(tuner, state, batches):
    """Returns the sum of the gradients of all parameters, in float32."""

    @jax.jit
    def gradient(batch, key):
        attachment = tuner.attach(state)._replace(is_loop=True)

        def mean(params):
            total, weight = tuner.loss(params, batch, key, attachment)
            return total / weight

        grads = jax.grad(mean)(state.params)
        score, roles = tuner.method.ranking, tuner.roles(state.params)
        add = lambda role, g: score.added(g, role.stacked).astype(jnp.float32)
        return map_roles(add, roles, grads, only=(SPARSE,))

    at = lambda i: jax.tree.map(lambda leaf: leaf[i], batches)
    return functools.reduce(
        optax.tree.add, [gradient(at(i), KEYS[i]) for i in range(N)]
    )


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (encoder, jnp.float32),
        (decoder, jnp.bfloat16),
        pytest.param(encoder, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(decoder, jnp.float32, marks=pytest.mark.slow),
    ],
    ids=["dropout", "bfloat16", "both", "neither"],
)
def test_the_entries_are_the_largest_of_the_summed_gradients(case, dtype):
    (support, finite, _), tuner, state = choose(case(), dtype=dtype)
    sums = dense_sum(tuner, state, case()[2])
    assert finite

    def compare(role, total, support):
        k = support.shape[-1]
        flat = jnp.abs(total.reshape(len(total), -1))
        expected = jnp.sort(jax.lax.top_k(flat, k)[1], -1)
        np.testing.assert_array_equal(support, expected, role.name)

    map_roles(compare, tuner.roles(state.params), sums, support, only=(SPARSE,))


@pytest.mark.parametrize(
    ("score", "granularity"),
    [
        ("normalized", "entry"),
        ("fisher", "lane"),
        *(
            pytest.param(score, granularity, marks=pytest.mark.slow)
            for score, granularity in [
                ("smallest-fisher", "entry"),
                ("snip", "entry"),
                ("gradient", "entry16"),
                ("gradient", "row"),
                ("gradient", "4x4"),
            ]
        ),
    ],
)
def test_each_score_and_layout_chooses_as_from_sums_of_all_layers(
    score, granularity, monkeypatch
):
    method = replace(KERNELS, score=score, granularity=granularity, density=0.1)
    one_by_one, *_ = choose(decoder(), method)
    opens = "sparse_jax.compact.by_batches._LayeredLoss.opens"
    monkeypatch.setattr(opens, lambda *_: False)
    at_once, *_ = choose(decoder(), method)
    jax.tree.map(np.testing.assert_array_equal, one_by_one, at_once)


@pytest.mark.parametrize("runs_layers", [True, False])
def test_no_sum_of_all_layers_is_ever_there(runs_layers, monkeypatch):
    loss, params, batches = decoder()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    if not runs_layers:
        where = "sparse_jax.compact.by_batches._LayeredLoss.opens"
        monkeypatch.setattr(where, lambda *_: False)
    tuner = Compact(loss, KERNELS, optax.adam(1e-3))
    state = tuner.init(params, jax.random.key(0))
    text = str(jax.make_jaxpr(tuner.choose)(state, batches, KEYS))
    kernel = params["layers"]["mlp"]["up"]["kernel"].shape
    sums = re.findall(rf"f32\[{','.join(map(str, kernel))}\]", text)
    assert bool(sums) != runs_layers


@pytest.mark.slow
def test_every_tuner_chooses_the_same():
    layers = len(decoder()[1]["layers"]["mlp"]["up"]["kernel"])
    sampler = Uniform(num_layers=layers, num_active=1)
    expected, *_ = choose(decoder())
    for tuner, options in ((Layerwise, {"sampler": sampler}), (InBackward, {})):
        found, *_ = choose(decoder(), tuner=tuner, **options)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_leaves_outside_the_layers_are_chosen_from_too():
    method = replace(KERNELS, where="kernel|embed")
    (support, finite, _), tuner, state = choose(decoder(), method)
    names = [name for name in support if jax.tree.leaves(support[name])]
    assert finite and len(names) > 1
    inside, *_ = choose(decoder())
    layers = lambda tree: tree["layers"]
    jax.tree.map(np.testing.assert_array_equal, layers(support), layers(inside[0]))


def test_entries_to_avoid_are_avoided():
    loss, params, batches = decoder()
    (first, *_), tuner, state = choose(decoder())
    avoid = {}
    note = lambda role, support: avoid.update({role.name: support})
    map_roles(note, tuner.roles(params), first, only=(SPARSE,))
    second, *_ = jax.jit(tuner.choose)(state, batches, KEYS, avoid)

    def disjoint(role, one, other):
        for a, b in zip(np.asarray(one), np.asarray(other), strict=True):
            assert not {*a.tolist()} & {*b.tolist()}

    map_roles(disjoint, tuner.roles(params), first, second, only=(SPARSE,))


def test_one_batch_that_is_not_finite_chooses_nothing():
    loss, params, batches = decoder()
    tuner = Compact(loss, KERNELS, optax.adam(1e-3))
    state = tuner.init(params, jax.random.key(0))
    bad = {**batches, "weights": batches["weights"].astype(np.float32).copy()}
    bad["weights"][1] = np.nan
    after, finite = jax.jit(tuner.select)(state, bad, KEYS)
    assert not finite
    assert int(after.count) == -1


@pytest.mark.slow
def test_supports_are_chosen_again_by_several_batches():
    loss, params, batches = decoder()
    (support, *_), tuner, state = choose(decoder())
    one = jax.tree.map(lambda leaf: leaf[0], batches)
    state, _ = jax.jit(tuner.select)(state, one, KEYS[0])
    state, finite = jax.jit(functools.partial(reselect, tuner))(state, batches, KEYS)
    assert finite
    jax.tree.map(np.testing.assert_array_equal, state.support, support)


def test_batches_of_any_length_are_padded_to_one():
    short, long = ({"ids": np.full((2, n), n), "labels": np.ones(2)} for n in (2, 3))
    both = stack_batches([short, long])
    assert both["ids"].tolist() == [[[2, 2, 0]] * 2, [[3, 3, 3]] * 2]
    assert both["labels"].shape == (2, 2)


@pytest.mark.parametrize(
    ("shape", "where"),
    [
        (MeshShape(data=2, fsdp=2, tensor=2), KERNELS.where),
        pytest.param(MeshShape(fsdp=8), KERNELS.where, marks=pytest.mark.slow),
        pytest.param(MeshShape(data=2, fsdp=4), "kernel|embed", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_chooses_the_same(shape, where):
    loss, params, batches = decoder()
    method = replace(KERNELS, where=where)
    found = []
    for mesh in (mesh_of(None), make_mesh(shape)):
        placement = Placement.of(params, mesh)
        shards = placement.shards("layers")
        tuner = Compact(loss, method, optax.adam(1e-3), shards=shards)
        runner = MeshRunner(tuner, placement)
        placed = jax.device_put(jax.tree.map(jnp.copy, params), placement.params)
        state = runner.init(placed, jax.random.key(0))
        state, finite = runner.select(state, placement.put(batches, N), KEYS)
        assert finite
        found.append(supports_of(state))
    jax.tree.map(np.testing.assert_array_equal, *found)


class Layer(nnx.Module):
    """A linear map, and what it is added to."""

    def __init__(self, rngs):
        self.map = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x, *given):
        *context, _, respond = given
        y = jnp.tanh(respond("map", self.map, x))
        for _ in range(sum(context)):
            y *= x
        return x + y


@functools.cache
def own_model():
    """Returns the structure and the parameters of layers of one's own."""
    return nnx.split(stack_layers(Layer, DEPTH, nnx.Rngs(0)))


def own_tuner(loss):
    """Returns a tuner of that model, its state, and batches."""
    tuner = Compact(loss, Sparse(density=0.2, where="kernel"), optax.sgd(0.1))
    params = {"layers": nnx.to_pure_dict(own_model()[1])}
    batches = jax.random.normal(KEYS[0], (N, 4, 3, WIDTH))
    return tuner, tuner.init(params, KEYS[0]), batches


def plain(params, x, key, attachment, *context, states=False):
    """Returns the loss of linear layers, run as a model of one's own may."""
    layers = nnx.merge(own_model()[0], params["layers"])
    options = {"key": key, "attachment": attachment, "states": states}
    y = run_layers(layers, x, *context, **options)
    return jnp.sum(y**3), x.size


def casting(params, *args):
    return plain(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), *args)


def compiled(params, x, key, attachment):
    return jax.jit(lambda *args: plain(*args, key, attachment))(params, x)


def checkpointed(params, x, key, attachment):
    return jax.checkpoint(lambda *args: plain(*args, key, attachment))(params, x)


def mapped(params, x, key, attachment):
    one = lambda x: plain(params, x[None], key, attachment)[0]
    return jnp.sum(jax.vmap(one)(x)), x.size


def scanned(params, x, key, attachment):
    one = lambda total, x: (total + plain(params, x[None], key, attachment)[0], None)
    return jax.lax.scan(one, 0.0, x)[0], x.size


def twice(params, x, key, attachment):
    run = functools.partial(plain, params, key=key, attachment=attachment)
    return run(x)[0] + run(-2 * x)[0], x.size


def of_all_states(*args):
    return plain(*args, states=True)


def counting(*args):
    return plain(*args, 2)


def closing_over_data(params, x, key, attachment):
    def loop(stack):
        layer = lambda *args: stack.layer(*args) * jnp.cos(x)
        return attachment.loop(stack._replace(layer=layer))

    if attachment.loop is None:
        y, (layers, values) = x, (params["layers"], attachment.trained)
        for i in range(DEPTH):
            one, own = jax.tree.map(lambda leaf, at=i: leaf[at], (layers, values))
            layer = nnx.merge(own_model()[0], attachment.weights(one, own))
            y = layer(y, None, lambda site, f, x: f(x)) * jnp.cos(x)
        return jnp.sum(y**3), x.size
    return plain(params, x, key, attachment._replace(loop=loop))


@pytest.mark.parametrize(
    "loss",
    [
        plain,
        casting,
        mapped,
        of_all_states,
        counting,
        *(
            pytest.param(loss, marks=pytest.mark.slow)
            for loss in (compiled, checkpointed, scanned, twice, closing_over_data)
        ),
    ],
    ids=lambda loss: loss.__name__,
)
def test_a_loss_that_runs_layers_in_its_own_way_chooses_by_the_same_sum(
    loss, monkeypatch
):
    opens, were = _LayeredLoss.opens, []
    note = lambda *args: were.append(opens(*args)) or were[-1]
    monkeypatch.setattr(_LayeredLoss, "opens", note)
    tuner, state, batches = own_tuner(loss)
    support, finite, _ = jax.jit(tuner.choose)(state, batches, KEYS)
    attachment = tuner.attach(state)

    def mean(params, batch, key):
        total, weight = loss(params, batch, key, attachment)
        return total / weight

    pairs = zip(batches, KEYS, strict=True)
    grads = [jax.grad(mean)(state.params, *pair)["layers"] for pair in pairs]
    total = jnp.abs(sum(grad["map"]["kernel"] for grad in grads)).reshape(DEPTH, -1)
    found = support["layers"]["map"]["kernel"]
    expected = jnp.sort(jax.lax.top_k(total, found.shape[-1])[1], -1)
    assert finite
    assert were == [loss is plain]
    np.testing.assert_array_equal(found, expected)


def test_updates_in_the_backward_pass_refuse_a_loss_of_all_states():
    tuner, state, batches = own_tuner(of_all_states)
    inside = InBackward(of_all_states, tuner.method, tuner.tx)
    state, _ = inside.select(state, batches[0], KEYS[0])
    with pytest.raises(InputError, match="`loss` must run .* without `states`, got 0"):
        inside.step(state, batches[0], KEYS[0])


def penalized(params, x, *args):
    total, weight = plain(params, x, *args)
    return total + 1e3 * weight * jnp.sum(
        params["layers"]["map"]["kernel"] ** 2
    ), weight


@pytest.mark.parametrize("opens", [True, False])
def test_a_choice_knows_of_a_penalty_on_layers_as_little_as_an_update(
    opens, monkeypatch
):
    monkeypatch.setattr(_LayeredLoss, "opens", lambda *_: opens)
    found = []
    for loss in (plain, penalized):
        tuner, state, batches = own_tuner(loss)
        state, finite = jax.jit(tuner.select)(state, batches, KEYS)
        state, metrics = jax.jit(tuner.step)(state, batches[0], KEYS[0])
        assert finite
        found.append((state.support, metrics["gradient_norm"]))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_raw_keys_are_those_of_batches_too():
    tuner, state, batches = own_tuner(plain)
    raw = jax.random.split(jax.random.PRNGKey(0), N)
    support, finite, _ = jax.jit(tuner.choose)(state, batches, raw)
    expected, *_ = jax.jit(tuner.choose)(state, batches, KEYS)
    assert finite
    jax.tree.map(np.testing.assert_array_equal, support, expected)


KEY = "`key` must be one PRNG key, or an array of one for each of .*, got "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, keys: (x, keys[:2]), r"`batch` .* \[2, ...\] for 2 keys, got \[3,"),
        (lambda x, keys: ((x, 1.0), keys), r"`batch` must have .* got \[\] for `1`"),
        (lambda x, keys: (x, keys[:0]), rf"{KEY}an array of"),
        (lambda x, keys: (x, [*keys]), rf"{KEY}\["),
        (lambda x, keys: (x, None), rf"{KEY}None"),
    ],
    ids=["fewer-keys", "one-value", "no-keys", "list-of-keys", "no-key"],
)
def test_batches_and_keys_that_do_not_belong_together_are_refused(change, message):
    tuner, state, batches = own_tuner(plain)
    with pytest.raises(InputError, match=message):
        tuner.select(state, *change(batches, KEYS))

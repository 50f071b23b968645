"""One vocabulary of scores and granularities, in both tiers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax import (
    LANE,
    Compact,
    InputError,
    Score,
    Settings,
    Sparse,
    gather,
    register_score,
    scatter,
    sift,
)
from sparse_jax.compact.tap import (
    Draw,
    Wanted,
    empty_selection,
    selecting_tap,
    support_of,
)
from sparse_jax.methods.registry import METHODS
from sparse_jax.supports.scores import SCORES, score_named

KEY = jax.random.key(0)


def noisy(gradient, param, key):
    """Ranks by a gradient with noise."""
    return gradient + param * jax.random.normal(key, param.shape)


class Unhashable:
    """A callable that compares by value, and so has no hash."""

    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, Unhashable)

    def __call__(self, gradient, param):
        return gradient * param


ONES = {
    "word": "gradient/magnitude",
    "low rank": "lift",
    "the smallest sum of squares": "smallest-fisher",
    "two arguments": lambda gradient, param: gradient - param,
    "key": noisy,
    "key of another name": lambda g, w, draw: noisy(g, w, draw),
    "key by name": lambda gradient, param, *, key: noisy(gradient, param, key),
    "setting": lambda gradient, param, power=2: jnp.abs(gradient) ** power,
    "no gradient": Score(lambda gradient, param: -param, needs_gradient=False),
    "no hash": Unhashable(),
    "compiled": jax.jit(lambda gradient, param: gradient * param),
}


def loss(params, batch, key, attachment):
    """Returns a sum whose gradient is `batch`; layers run one after the other."""
    total = jnp.sum(params["head"] * batch["head"])
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        own = jax.tree.map(lambda leaf, i=i: leaf[i], attachment.trained)
        w = attachment.weights(layer, own)["w"]
        total += jnp.sum(w * batch["layers"]["w"][i])
    return total, 1


@pytest.mark.parametrize("granularity", ["entry", "lane"])
@pytest.mark.parametrize("score", ONES.values(), ids=ONES)
@pytest.mark.quick(3)
def test_a_score_chooses_the_same_in_both_tiers(score, granularity):
    draw = lambda key: {
        "layers": {"w": jax.random.normal(key, (3, 128, 2))},
        "head": jax.random.normal(key, (128,)),
    }
    params, grads = draw(jax.random.key(1)), draw(jax.random.key(2))
    options = {"score": score, "granularity": granularity, "density": 0.05}
    tx = sift(optax.sgd(1.0), **options, stacked="layers", key=KEY)
    _, theirs = jax.jit(tx.update)(grads, tx.init(params), params)
    tuner = Compact(loss, Sparse(**options), optax.sgd(1.0))
    select = jax.jit(tuner.select)
    ours, _ = select(tuner.init(params, KEY), grads, jax.random.fold_in(KEY, 0))
    jax.tree.map(np.testing.assert_array_equal, ours.support, theirs.support)


def test_words_and_what_they_stand_for_are_the_same_method():
    word = Sparse(density=0.5, score="random", granularity="lane")
    thing = Sparse(density=0.5, score=SCORES["random"], granularity=LANE)
    assert word == thing and hash(word) == hash(thing)
    assert (thing.score, thing.granularity) == ("random", "lane")


def test_a_score_without_a_hash_is_static_under_jit():
    function, traces = Unhashable(), []

    @functools.partial(jax.jit, static_argnums=0)
    def select(method, w):
        traces.append(1)
        wanted = Wanted(method.ranking, 2)
        loss = lambda s: jnp.sum(selecting_tap(wanted, w, s, Draw(KEY)) ** 3)
        return support_of(jax.grad(loss)(empty_selection((2,))))

    for _ in range(2):
        method = Sparse(density=0.5, score=function)
        found = select(method, jnp.array([1.0, -3.0, 2.0]))
    assert found.tolist() == [1, 2] and len(traces) == 1


def test_a_registered_word_means_the_same_everywhere():
    score = register_score("saliency", lambda gradient, param: gradient * param)
    try:
        assert Sparse(density=0.1, score="saliency").ranking is score
        w, g = jnp.array([4.0, 1.0, 1.0]), jnp.array([1.0, 3.0, 2.0])
        tx = sift(optax.sgd(1.0), density=0.3, score="saliency")
        assert tx.update(g, tx.init(w), w)[1].support.tolist() == [0]
        with pytest.raises(InputError, match="`word` must be new, .* got 'saliency'"):
            register_score("saliency", lambda gradient, param: gradient)
    finally:
        del SCORES["saliency"]


def test_the_command_line_has_the_same_words():
    made = lambda **options: METHODS["sift"].make({"density": 0.1, **options})
    assert made().score == "gradient"
    assert made(score="gradient/magnitude").score == "gradient/magnitude"
    assert METHODS["random"].make({}).score == "random"
    settings = {"model": "m", "task": "sst2", "output": "o"}
    assert Settings(**settings, method="sift", score="random").score == "random"
    with pytest.raises(InputError, match="`score` must be one of gradient, normalized"):
        Settings(**settings, method="sift", score="gradients")
    for word in ("lora", "random"):
        with pytest.raises(InputError, match="`score` must be left out .* to sift"):
            Settings(**settings, method=word, score="magnitude")


def test_a_score_of_weights_alone_needs_no_backward_pass():
    def never(params, batch, key, attachment):
        raise AssertionError("called")

    score = Score(lambda gradient, param: param, needs_gradient=False)
    tuner = Compact(never, Sparse(density=0.3, score=score, stack=None), optax.sgd(1.0))
    state = tuner.init({"w": jnp.array([1.0, -5.0, 2.0])}, KEY)
    state, finite = tuner.select(state, None, KEY)
    assert finite and state.support["w"].tolist() == [1]


WRONG = {
    "no arguments": (lambda: None, "`score` must be a function"),
    "four": (lambda a, b, c, d: a, "`score` must be a function"),
    "a class": (object(), "`score` must be one of 'gradient', 'normalized'"),
    "a word": ("gradients", "`score` must be one of 'gradient', 'normalized'"),
    "nothing": (None, "`score` must be one of"),
}


@pytest.mark.parametrize(("score", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_score_is_refused(score, message):
    with pytest.raises(InputError) as error:
        score_named(score)
    assert str(error.value).startswith(message)


def test_scores_of_another_shape_are_refused():
    tx = sift(optax.sgd(1.0), score=lambda gradient, param: jnp.sum(gradient))
    w = jnp.ones(3)
    with pytest.raises(InputError, match=r"of the shape of the gradient, \[3\], got"):
        tx.update(w, tx.init(w), w)


ROWS = jnp.zeros((2, 2, 4), jnp.uint8).at[1].set(3)  # two rows of each group of 256 x 4
# shape of the array, support, granularity -> what the message has
FOREIGN = {
    "lanes as entries": ((256, 4), ROWS, "entry", "support"),
    "entries as lanes": ((256, 4), jnp.array([0, 3]), "lane", "support"),
    "lanes of another matrix": ((128, 4), ROWS, "lane", "support"),
    "lanes of fewer rows": ((132, 4), ROWS + 1, "lane", "below 528"),
    "floats": ((4, 4), jnp.array([0.0, 3.0]), "entry", "float32"),
    "layers of another stack": ((3, 4), jnp.array([[0], [1]]), "entry", "support"),
    "past the end": ((4, 4), jnp.array([0, 3000]), "entry", "below 16"),
    "below zero": ((4, 4), jnp.array([-1, 3]), "entry", "below 16"),
    "unsorted": ((4, 4), jnp.array([3, 0]), "entry", "ascending"),
    "twice": ((4, 4), jnp.array([3, 3]), "entry", "distinct"),
    "rows unsorted": ((256, 4), ROWS[::-1], "lane", "ascending"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_support_of_another_array_is_refused(name):
    shape, support, granularity, message = FOREIGN[name]
    with pytest.raises(InputError, match=message):
        gather(jnp.ones(shape), support, granularity=granularity)
    with pytest.raises(InputError, match=message):
        packed = jnp.zeros(support.shape)
        scatter(jnp.ones(shape), support, packed, granularity=granularity)


def test_a_support_fits_in_a_compiled_program_and_in_numpy():
    x = jnp.arange(1024.0).reshape(256, 4)
    found = jax.jit(lambda x, s: gather(x, s, granularity="lane"))(x, ROWS)
    np.testing.assert_array_equal(found[1], x[jnp.array([3, 131])])
    assert gather(x, np.array([1, 5])).tolist() == [1.0, 5.0]


def test_packed_values_of_another_number_are_refused():
    with pytest.raises(InputError, match="`packed` must have the shape"):
        scatter(jnp.ones(4), jnp.array([0, 3]), jnp.array([1.0]))

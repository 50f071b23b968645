"""What each word of the table of scores chooses, by NumPy and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax import InputError, Score, Settings, Sparse, low_rank, sift
from sparse_jax.methods.registry import METHODS
from sparse_jax.supports.entries import ENTRY
from sparse_jax.supports.low_rank import low_rank_approximation
from sparse_jax.supports.scores import SCORES, reversed_order
from sparse_jax.training.build import method_of

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
W, G = (DRAW.normal(size=(12, 10)).astype(np.float32) for _ in range(2))
K = 20


def of_rank(x, rank):
    u, s, v = np.linalg.svd(np.float64(x), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


# word -> what the K largest are of; k / (rows + columns) is 0.9, a rank of 1
LARGEST = {
    "gradient": np.abs(G),
    "normalized": np.abs(G),
    "magnitude": np.abs(W),
    "gradient/magnitude": np.abs(G) / np.abs(W),
    "lift": np.abs(of_rank(W, 1)),
    "off-principal": -np.abs(of_rank(W, 1)),
    "smallest-magnitude": -np.abs(W),
    "snip": np.abs(G * W),
    "fisher": G**2,
    "smallest-fisher": -(G**2),
}


def test_every_word_but_the_random_one_has_a_reference():
    assert {*LARGEST, "random"} == {*SCORES}


@pytest.mark.parametrize("word", LARGEST)
def test_a_word_chooses_what_a_sort_does(word):
    score = SCORES[word]
    expected = np.sort(np.argsort(-LARGEST[word].ravel(), kind="stable")[:K])
    gradient = score.added(jnp.array(G)) if score.needs_gradient else None
    found, _ = ENTRY.choose(score, gradient, jnp.array(W), K, KEY)
    np.testing.assert_array_equal(found, expected)


# rows, columns, rank: by blocks of random directions, exactly, and on its side
RANKS = [(60, 80, 3), (60, 30, 2), (60, 80, 20), (12, 10, 10)]


@pytest.mark.parametrize(("rows", "columns", "rank"), RANKS)
def test_the_approximation_of_a_low_rank_is_the_best(rows, columns, rank):
    x = DRAW.normal(size=(rows, columns)).astype(np.float32)
    found = jax.jit(low_rank_approximation, static_argnums=1)(x, rank)
    error = np.linalg.norm(found - of_rank(x, rank)) / np.linalg.norm(x)
    # Of white noise, whose directions are all of about the same size.
    assert error < 2e-3


def test_lift_finds_principal_entries_that_magnitude_does_not():
    # 10 x 10 entries of one direction, in noise with 300 larger entries of no pattern.
    x = 0.01 * DRAW.normal(size=(100, 100))
    x.flat[DRAW.choice(5000, 300, replace=False) + 5000] = 1.5
    x[:10, :10] = 1.0
    planted = (100 * np.arange(10)[:, None] + np.arange(10)).ravel()
    shares = {}
    for word in ("lift", "magnitude"):
        found, _ = ENTRY.choose(SCORES[word], None, jnp.float32(x), 100, KEY)
        shares[word] = np.isin(found, planted).mean()
    assert shares["lift"] > 0.9 and shares["magnitude"] == 0


def test_the_rank_is_that_of_the_lora_of_the_budget():
    # k = 8 * (40 + 60), so r = 8.
    x = jnp.float32(DRAW.normal(size=(40, 60)))
    found, exact = (score(None, x, KEY, 800) for score in (low_rank(), low_rank(8)))
    np.testing.assert_array_equal(found, exact)
    least = SCORES["lift"](None, x, KEY, 1)
    np.testing.assert_allclose(least, of_rank(x, 1), atol=0.02)


def test_each_layer_of_a_stack_has_a_low_rank_of_its_own():
    x = DRAW.normal(size=(3, 12, 10)).astype(np.float32)
    found, _ = ENTRY.choose(SCORES["lift"], None, jnp.array(x), K, KEY, stacked=True)
    for support, layer in zip(np.asarray(found), x, strict=True):
        order = np.argsort(-np.abs(of_rank(layer, 1)).ravel(), kind="stable")
        np.testing.assert_array_equal(support, np.sort(order[:K]))


def test_a_vector_is_its_own_approximation():
    x = jnp.array([1.0, -3.0, 2.0])
    assert ENTRY.choose(SCORES["lift"], None, x, 2, KEY)[0].tolist() == [1, 2]


def test_the_smallest_are_chosen_in_exact_order_and_what_is_not_finite_last():
    tiny = np.finfo(np.float32).smallest_subnormal
    below = np.nextafter(np.float32(1), np.float32(0))
    x = jnp.array([np.nan, 2.0, 1.0, -0.0, 0.0, below, tiny, np.inf], jnp.float32)
    order = np.argsort(-np.nan_to_num(np.abs(reversed_order(x))), kind="stable")
    assert order[:6].tolist() == [3, 4, 6, 5, 2, 1]
    score = SCORES["smallest-magnitude"]
    assert ENTRY.choose(score, None, x, 3, KEY)[0].tolist() == [3, 4, 6]
    assert ENTRY.choose(score, None, x, 7, KEY)[0].tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stacked", [False, True], ids=["leaf", "stack"])
def test_normalized_gradients_count_alike_however_large_they_are(stacked):
    grads = DRAW.normal(size=(3, 2, 50)).astype(np.float32)
    # Of one example the gradient is large, in the second layer alone.
    grads[0, 1] *= 1e4
    rules = {"score": "normalized", "select_batches": 3}
    rules |= {"stacked": "layers"} if stacked else {}
    tx = sift(optax.sgd(1.0), density=0.2, **rules)
    params = {"layers": jnp.ones((2, 50))}
    state = tx.init(params)
    for grad in grads:
        _, state = tx.update({"layers": jnp.array(grad)}, state, params)
    norms = np.linalg.norm(grads, axis=-1 if stacked else (1, 2), keepdims=True)
    rows = np.sum(grads / norms, axis=0).reshape(2 if stacked else 1, -1)
    for found, row in zip(np.atleast_2d(state.support["layers"]), rows, strict=True):
        order = np.argsort(-np.abs(row), kind="stable")
        np.testing.assert_array_equal(found, np.sort(order[: row.size // 5]))


def test_a_gradient_of_zero_adds_nothing_to_normalized_ones():
    zero = SCORES["normalized"].added(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(zero, np.zeros((2, 3)))


@pytest.mark.parametrize("scale", [1e-30, 1e30, 8e37])
def test_gradients_whose_squares_are_no_numbers_are_normalized(scale):
    found = SCORES["normalized"].added(scale * jnp.array([3.0, -4.0]))
    np.testing.assert_allclose(found, [0.6, -0.8], rtol=1e-5)


@pytest.mark.parametrize(("shape", "stacked"), [((0, 3), False), ((2, 0), True)])
def test_a_leaf_without_entries_is_normalized(shape, stacked):
    assert SCORES["normalized"].added(jnp.zeros(shape), stacked).shape == shape


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_normalized_away(bad):
    assert jnp.isnan(SCORES["normalized"].added(jnp.array([1.0, bad]))).any()


def test_fisher_adds_squares_of_several_gradients():
    grads = DRAW.normal(size=(3, 50)).astype(np.float32)
    tx = sift(optax.sgd(1.0), density=0.2, score="fisher", select_batches=3)
    params = jnp.ones(50)
    state = tx.init(params)
    for grad in grads:
        _, state = tx.update(jnp.array(grad), state, params)
    order = np.argsort(-np.sum(grads**2, axis=0), kind="stable")
    np.testing.assert_array_equal(state.support, np.sort(order[:10]))


TREE = {"w": jnp.ones((12, 10)), "b": jnp.ones(10)}
ABOVE = "`rank` of the score must be at most 10 for `w` of shape .12, 10., got 11"


@pytest.mark.parametrize("make", [
    lambda: sift(optax.sgd(1.0), score=low_rank(11)).init(TREE),
    lambda: Sparse(density=0.1, score=low_rank(11)).roles(TREE),
    lambda: Sparse(density=0.1, score="off-principal", score_rank=11).roles(TREE),
])  # fmt: skip
def test_a_rank_above_a_matrix_is_refused(make):
    with pytest.raises(InputError, match=ABOVE):
        make()


def test_a_rank_is_for_scores_of_a_low_rank():
    with pytest.raises(InputError, match="`rank` of the score must be positive, got 0"):
        low_rank(0)
    with pytest.raises(InputError, match="`score_rank` must be left out with score 'g"):
        Sparse(density=0.1, score_rank=4)


def test_a_rank_of_the_command_line_is_that_of_the_score():
    options = {"model": "m", "task": "cola", "output": "o", "score_rank": 4}
    for settings in (
        Settings(**options, method="lift"),
        Settings(**options, method="sift", score="lift"),
    ):
        assert method_of(settings, ("^classifier/",)).ranking is low_rank(4)


def test_a_score_has_one_learning_rate_however_it_is_asked_for():
    options = {"model": "m", "task": "cola", "output": "o"}
    for word in ("random", "magnitude", "lift"):
        by_score = Settings(**options, method="sift", score=word)
        by_object = Settings(**options, method=Sparse(density=0.1, score=word))
        rates = {one.resolved_learning_rate for one in (by_score, by_object)}
        assert rates == {METHODS[word].learning_rate}
    assert METHODS["random"].learning_rate > METHODS["sift"].learning_rate


def test_a_score_that_needs_a_gradient_is_refused_where_none_is_computed():
    looks = Score(lambda gradient, param: gradient * param, needs_gradient=False)
    with pytest.raises(InputError, match="`score` must not look at the gradient"):
        ENTRY.choose(looks, None, TREE["w"], 3, KEY)

"""Masters of two bytes: the float32 value beside a bfloat16 weight, and only there."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from test_compact import run_compact
from test_scores import loss

from sparse_jax import Compact, InputError, Settings, Sparse
from sparse_jax.supports.masters import current_values, master_of, remainder_of

# The bits below a bfloat16 number: at 0x8000 it is as far from the next.
LOWER = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)


def bits(numbers):
    return np.asarray(numbers).view(np.uint32)


def rounded(numbers):
    with np.errstate(invalid="ignore"):  # a NaN
        return numbers.astype(ml_dtypes.bfloat16)


def test_a_weight_and_two_bytes_give_every_master_but_ties_rounded_down():
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    masters = (upper | LOWER).view(np.float32)
    weights = jnp.asarray(rounded(masters))
    kept = remainder_of(masters, weights)
    found = np.asarray(master_of(weights, kept))
    assert kept.dtype == np.int16 and found.dtype == np.float32
    is_nan = np.isnan(masters)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    # A tie goes to the even number: down if the upper half is even.
    down = (upper >> 16) % 2 == 0
    moved = down & (LOWER == 0x8000) & ~is_nan
    np.testing.assert_array_equal(
        bits(found)[~is_nan], (bits(masters) - moved)[~is_nan]
    )
    # The sign and the infinities are among the bits; what is trained stays as it was.
    same = rounded(found).view(np.uint16) == np.asarray(weights).view(np.uint16)
    assert same[~is_nan].all() and moved.sum() == 2**15 - 2 * 64


@pytest.mark.parametrize("weight", [0.0, -0.0])
def test_a_position_past_the_end_reads_zero_whatever_was_kept(weight):
    kept = jnp.arange(-(2**15), 1, 8, jnp.int16)
    found = master_of(jnp.full(kept.shape, weight, jnp.bfloat16), kept)
    assert (found == 0).all()


def draw(seed, accumulate=2):
    # One batch has no gradient that is finite.
    first, second = jax.random.split(jax.random.key(seed))
    normal = lambda key, *shape: jax.random.normal(key, (accumulate, *shape))
    batch = {"layers": {"w": normal(first, 3, 128, 2)}, "head": normal(second, 128)}
    bad = jnp.nan if seed == 20 else 1.0
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) * bad, batch)


def linear(split, dtype=jnp.bfloat16, **options):
    """Returns a tuner of sparse layers and a dense head, and its parameters."""
    method = Sparse(density=0.1, dense="head", **options)
    tuner = Compact(loss, method, optax.adamw(1e-3), accumulate=2, split_masters=split)
    one = jax.tree.map(lambda leaf: leaf[0].astype(dtype), draw(99))
    return tuner, one


CASES = {
    "entries": linear,
    "lanes": lambda split: linear(split, granularity="lane"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fifty_updates_are_those_of_float32_masters(case):
    runs, masters = [], []
    for split in (False, True):
        tuner, params = case(split)
        state, losses = run_compact(tuner, params, 50, make=draw)
        trees = (tuner.roles(params), state.support, state.masters, state.params)
        masters.append(current_values(*trees))
        runs.append((losses, state._replace(masters=())))
    assert np.isnan(losses).sum() == 1
    assert all(leaf.dtype == jnp.int16 for leaf in jax.tree.leaves(state.masters))
    jax.tree.map(np.testing.assert_array_equal, *masters)
    jax.tree.map(np.testing.assert_array_equal, *runs)
    # Without masters most would not have moved.
    coarse = jax.tree.map(lambda value: value.astype(jnp.bfloat16), masters[1])
    parts = zip(*map(jax.tree.leaves, (coarse, masters[1])), strict=True)
    assert all((one.astype(jnp.float32) != other).any() for one, other in parts)


def only_leaf(tree):
    (leaf,) = jax.tree.leaves(tree)
    return leaf


def test_a_tie_moves_its_master_and_not_its_weight():
    # 1 + 2**-8 is half way between 1 and the next bfloat16 number, and goes to 1.
    whole = lambda params, x, key, attachment: (params["w"].sum() * x, 1)
    tx, params = optax.sgd(1.0), {"w": jnp.array([1.0, -1.0], jnp.bfloat16)}
    found = []
    for split in (False, True):
        tuner = Compact(whole, Sparse(density=1.0, stack=None), tx, split_masters=split)
        state, _ = run_compact(tuner, params, 1, make=lambda i: jnp.float32(-(2**-8)))
        trees = (tuner.roles(params), state.support, state.masters, state.params)
        found.append([*map(only_leaf, (state.params, current_values(*trees)))])
    (weights, exact), (same, moved) = found
    np.testing.assert_array_equal(weights, same)
    assert exact.tolist() == [1 + 2**-8, -1 + 2**-8]
    # One unit in the last place of float32; the other has bits of its own in bfloat16.
    assert moved.tolist() == [1 + 2**-8 - 2**-23, -1 + 2**-8]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes_keep_what_they_had(dtype):
    tuner, params = linear(True, dtype)
    masters = tuner.init(params, jax.random.key(0)).masters
    wide = jnp.dtype(dtype).itemsize < 4
    assert [leaf.dtype for leaf in jax.tree.leaves(masters)] == [jnp.float32] * 2 * wide


def test_float32_parameters_have_no_masters_to_split():
    with pytest.raises(InputError, match="`split_masters` must be left out with dtype"):
        Settings(model="m", task="mrpc", output="o", split_masters=True)

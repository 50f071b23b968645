"""Exact selection, against `lax.top_k` and NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from sparse_jax import top_k_support
from sparse_jax.supports.scans import cummax, cumsum, running

SELECT = jax.jit(top_k_support, static_argnums=1)


def oracle(x, k):
    """Sorts by descending magnitude, then position; what is not finite comes last."""
    magnitude = np.abs(np.asarray(x, np.float32)).ravel()
    magnitude = np.where(np.isfinite(magnitude), magnitude, -1.0)
    return np.sort(np.lexsort((np.arange(magnitude.size), -magnitude))[:k])


CASES = {
    "by hand": ([[0.1, -0.5], [0.3, 0.2]], 2, [1, 2]),
    "one entry": ([7.0], 1, [0]),
    "all entries": ([3.0, 1.0, 2.0], 3, [0, 1, 2]),
    "ties go to the lower position": ([2.0, -2.0, 1.0, 2.0, 2.0], 2, [0, 1]),
    "a tie at the threshold": ([1.0, 5.0, 1.0, 1.0], 3, [0, 1, 2]),
    "zeros": ([0.0, 0.0, 0.0, 1.0], 2, [0, 3]),
    "negative zero is zero": ([-0.0, 0.0, -0.0], 1, [0]),
    "NaN and infinity are never chosen": ([np.nan, 1.0, np.inf, 0.0], 2, [1, 3]),
    "unless nothing else is left": ([np.nan, 1.0, np.inf], 2, [0, 1]),
    "the smallest normal numbers": ([1.2e-38, 0.0, 2e-38, 3e-38], 2, [2, 3]),
    "the largest number": ([3.4028235e38, 1.0, np.inf], 1, [0]),
}


@pytest.mark.parametrize(("x", "k", "expected"), CASES.values(), ids=CASES)
def test_a_case_that_can_be_checked_by_eye(x, k, expected):
    np.testing.assert_array_equal(top_k_support(jnp.array(x), k), expected)


ARRAYS = [
    ((31,), jnp.float32),
    ((32,), jnp.float32),
    ((33,), jnp.float32),
    ((7, 3, 11), jnp.float32),
    ((300, 70), jnp.float32),
    ((300, 70), jnp.bfloat16),
    ((300, 70), jnp.float16),
]


@pytest.mark.parametrize(("shape", "dtype"), ARRAYS, ids=str)
@pytest.mark.quick(1)
def test_it_agrees_with_the_sort(shape, dtype):
    x = jax.random.normal(jax.random.key(len(shape)), shape, dtype)
    for k in (1, x.size // 20 + 1, x.size // 2):
        np.testing.assert_array_equal(SELECT(x, k), oracle(x, k))
    theirs = jax.lax.top_k(jnp.abs(x).reshape(-1), k)[1]
    np.testing.assert_array_equal(SELECT(x, k), np.sort(theirs))


VALUES = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 2.0, np.inf, -np.inf, np.nan]),
    st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=False),
)


# One shape, so that the program is compiled once for each k.
@settings(max_examples=60, deadline=None)
@given(
    x=st_numpy.arrays(np.float32, (3, 17), elements=VALUES),
    k=st.sampled_from([1, 26]),
)
def test_it_agrees_with_a_stable_sort_on_awkward_numbers(x, k):
    np.testing.assert_array_equal(SELECT(jnp.asarray(x), k), oracle(x, k))


SPREADS = {
    "thirty decades": lambda key, n: jnp.exp(35 * jax.random.normal(key, (n,))),
    "five values": lambda key, n: jax.random.randint(key, (n,), 0, 5).astype(float),
    "mostly zero": lambda key, n: jnp.maximum(jax.random.normal(key, (n,)) - 2, 0),
    "all equal": lambda key, n: jnp.full((n,), 0.25),
    "one outlier": lambda key, n: jnp.ones(n).at[n // 2].set(1e30),
    "neighbouring floats": lambda key, n: 1 + jnp.arange(float(n)) * 2.0**-23,
}


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_any_distribution_is_selected_exactly(spread):
    x = spread(jax.random.key(3), 20_000)
    for k in (1, 1000):
        np.testing.assert_array_equal(SELECT(x, k), oracle(x, k))


def test_it_can_be_mapped_over_layers():
    x = jax.random.normal(jax.random.key(0), (4, 40, 9))
    batched = jax.vmap(lambda layer: top_k_support(layer, 20))(x)
    for layer, support in zip(x, batched, strict=True):
        np.testing.assert_array_equal(support, oracle(layer, 20))


def test_no_sort_and_no_colliding_scatter_is_compiled():
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    text = SELECT.lower(x, 1000).as_text()
    operations = re.findall(r'"?(?:stablehlo|chlo)\.(\w+)"?\(', text)
    assert not {"sort", "top_k"} & set(operations)
    # The one scatter sets, so that equal indices could at worst overwrite.
    assert operations.count("scatter") == 1


@pytest.mark.parametrize("size", [1, 127, 128, 129, 128 * 128, 40_000])
def test_running_sums_and_maxima_by_rows_are_those_of_numpy(size):
    x = np.random.default_rng(0).integers(0, 1000, size).astype(np.int32)
    kinds = {
        np.add: (jnp.sum, jnp.add, cumsum), np.maximum: (jnp.max, jnp.maximum, cummax),
    }  # fmt: skip
    for ufunc, (reduce, combine, usual) in kinds.items():
        wanted = ufunc.accumulate(x, dtype=np.int32)
        by_rows = running(reduce, combine, 0, jnp.array(x))
        assert by_rows.dtype == jnp.int32
        np.testing.assert_array_equal(by_rows, wanted)
        np.testing.assert_array_equal(usual(jnp.array(x)), wanted)

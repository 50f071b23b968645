"""Scores: what makes an entry worth training, and the selection by a score."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.supports.lanes import LaneSupport, top_lanes
from sparse_jax.supports.sharded import Cut
from sparse_jax.supports.support import replicated
from sparse_jax.supports.top_k import top_k_support, top_k_tables

__all__ = [
    "SCORES",
    "Score",
    "gradient",
    "gradient_over_magnitude",
    "leaf_key",
    "magnitude",
    "random",
    "score_named",
    "select",
    "select_lanes",
    "select_tables",
]

# (gradient, param, key) -> scores of the same shape; the largest magnitudes win.
Score = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Keeps a weight of exactly zero from an infinite score, which would never be chosen.
_SMALLEST_WEIGHT = 1e-8


def gradient(gradient: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
    """Scores by |g|, as SIFT does (Song et al., 2024; `sift/sift.py`)."""
    del param, key
    return gradient


def magnitude(gradient: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
    """Scores by |w|."""
    del gradient, key
    return param


def gradient_over_magnitude(
    gradient: jax.Array, param: jax.Array, key: jax.Array
) -> jax.Array:
    """Scores by |g| / |w|: large gradients on small weights."""
    del key
    weight = jnp.abs(param.astype(jnp.float32))
    return gradient.astype(jnp.float32) / jnp.maximum(weight, _SMALLEST_WEIGHT)


def random(gradient: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
    """Scores uniformly at random: the baseline every other score has to beat."""
    del gradient
    return jax.random.uniform(key, param.shape, jnp.float32)


# The words of the public interface.
SCORES: dict[str, Score] = {
    "gradient": gradient,
    "magnitude": magnitude,
    "gradient/magnitude": gradient_over_magnitude,
    "random": random,
}


def score_named(score: str | Callable[..., jax.Array]) -> Score:
    """Returns the score behind a word, or wraps a user's `score(gradient, param)`.

    Raises:
      InputError: if the word is unknown.

    Example:
      >>> score_named("gradient") is gradient
      True
    """
    if callable(score):
        return lambda gradient, param, key: score(gradient, param)
    if score not in SCORES:
        words = ", ".join(f"'{word}'" for word in SCORES)
        raise InputError(
            f"`score` must be one of {words} or a callable, got {score!r}."
        )
    return SCORES[score]


def leaf_key(key: jax.Array, name: str) -> jax.Array:
    """Returns the key of a leaf, which depends on its name and on nothing else."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def select(
    score: Score,
    gradient: jax.Array,
    param: jax.Array,
    k: int,
    key: jax.Array,
    *,
    stacked: bool = False,
) -> jax.Array:
    """Returns the support of the k best entries, of each layer if stacked.

    Args:
      score: ranks the entries of one array.
      gradient: shape=(...) or (L, ...).
      param: the array the gradient belongs to, in the same shape.
      k: entries chosen in the array, or in each layer.
      key: for the random score; layer l uses `fold_in(key, l)`.
      stacked: whether the first axis counts layers.

    Returns:
      Positions, shape=(k,) or (L, k), int32.
    """
    gradient, param = replicated(gradient), replicated(param)
    if not stacked:
        return top_k_support(score(gradient, param, key), k)

    def select_layer(layer: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        index, gradient, param = layer
        return select(score, gradient, param, k, jax.random.fold_in(key, index))

    # One layer after the other, so that scores exist for one layer at a time.
    return lax.map(select_layer, (jnp.arange(param.shape[0]), gradient, param))


def select_tables(
    score: Score,
    gradient: jax.Array,
    param: jax.Array,
    k: int,
    key: jax.Array,
    *,
    cut: Cut,
    capacity: int,
    stacked: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the support of `select` for an array that is cut over a mesh.

    Args:
      score, gradient, param, k, key, stacked: as for `select`.
      cut: how the array, or each layer, is cut.
      capacity: slots of a shard.

    Returns:
      Tables, shape=(S, c) or (L, S, c), int32, and the chosen entries of every shard,
      shape=(S,) or (L, S), which may be more than `capacity`.
    """
    if not stacked:
        return top_k_tables(score(gradient, param, key), k, cut, capacity)

    def select_layer(layer: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        index, gradient, param = layer
        key_of_layer = jax.random.fold_in(key, index)
        return select_tables(
            score, gradient, param, k, key_of_layer, cut=cut, capacity=capacity
        )

    return lax.map(select_layer, (jnp.arange(param.shape[0]), gradient, param))


def select_lanes(
    score: Score,
    gradient: jax.Array,
    param: jax.Array,
    count: int,
    key: jax.Array,
    *,
    cut: Cut | None = None,
    stacked: bool = False,
) -> LaneSupport:
    """Returns the best entries of every group of 128.

    Args:
      score, gradient, param, key, stacked: as for `select`.
      count: entries chosen in every group.
      cut: how the array, or each layer, is cut over a mesh.
    """
    if not stacked:
        if cut is None:
            gradient, param = replicated(gradient), replicated(param)
        return top_lanes(score(gradient, param, key), count, cut)

    def select_layer(layer: tuple[jax.Array, jax.Array, jax.Array]) -> LaneSupport:
        index, gradient, param = layer
        key_of_layer = jax.random.fold_in(key, index)
        return select_lanes(score, gradient, param, count, key_of_layer, cut=cut)

    return lax.map(select_layer, (jnp.arange(param.shape[0]), gradient, param))

"""A genuine model with its loss, and batches of one shape, for looking at both."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax

from sparse_jax import Settings
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.functional import Model, Params
from sparse_jax.training.build import make_job

__all__ = ["SCALES", "Problem", "Scale", "load"]

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes:
      batch_size: examples.
      length: tokens of every example.
      updates: of full training.
      batches: whose supports are compared.
      points: along every direction.
    """

    batch_size: int
    length: int
    updates: int
    batches: int
    points: int


SCALES = {"tiny": Scale(8, 32, 8, 3, 11), "small": Scale(16, 64, 20, 4, 15)}


@dataclass(frozen=True)
class Problem:
    """A model, its weights, and batches of one shape."""

    name: str
    model: Model
    params: Params
    batches: list[Batch]
    loss: Callable[[Params, Batch], jax.Array]
    gradient: Callable[[Params, Batch], Params]

    def start(self, word: str, seed: int) -> Params:
        """Returns the pre-trained weights, or random ones."""
        is_random = word == "random"
        return self.model.init(jax.random.key(seed)) if is_random else self.params

    def train(
        self, params: Params, updates: int, rate: float
    ) -> Iterator[tuple[int, Params]]:
        """Yields the weights after 0, a quarter, ..., all of the updates."""
        tx = optax.adamw(rate)

        @functools.partial(jax.jit, donate_argnums=1)
        def step(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
            moves, state = tx.update(grads, state, params)
            return cast(Params, optax.apply_updates(params, moves)), state

        stops = {round(part * updates / 4) for part in range(5)}
        state = tx.init(params) if updates else None
        for number in range(updates + 1):
            if number in stops:
                yield number, params
            if number < updates:
                # The first batch is the one that is looked at.
                batch = self.batches[1 + number % (len(self.batches) - 1)]
                params, state = step(self.gradient(params, batch), state, params)


def load(word: str, model: str, scale: Scale, seed: int) -> Problem:
    """Returns the problem of a `task=data`."""
    task, _, data = word.partition("=")
    settings = Settings(
        model=model,
        task=task,
        data=data,
        output="",
        method="full",
        loss_on="all" if task == "causal" else None,
        batch_size=scale.batch_size,
        max_length=scale.length,
        seed=seed,
    )
    job = make_job(settings)
    network = job.base.model
    sums = job.objective.make_loss(network, unroll=1)

    def loss(params: Params, batch: Batch) -> jax.Array:
        total, weight = sums(params, batch, None, Attachment())
        return total / weight

    batches = islice(job.feed.train(0), 2 * scale.batches)
    batches = [_padded(batch, scale.length) for batch in batches]
    name = f"{task} ({Path(data).stem})"
    gradient = jax.jit(jax.grad(loss))
    return Problem(name, network, job.base.params, batches, jax.jit(loss), gradient)


def _padded(batch: Batch, length: int) -> Batch:
    """Returns a batch with as many columns as all others, so that one program does."""

    def pad(array: np.ndarray) -> np.ndarray:
        missing = length - array.shape[1] if array.ndim == 2 else 0
        return np.pad(array, ((0, 0), (0, missing))) if missing else array

    return {name: pad(array) for name, array in batch.items()}

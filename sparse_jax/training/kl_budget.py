"""The KL budget: how far a run may take a model from its base."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

import jax
import numpy as np
import optax

from sparse_jax.adapter.adapter import Adapter, Arrays, adapter_of
from sparse_jax.adapter.switch import AdapterSwitch
from sparse_jax.compact.compact import CompactState, Tuner
from sparse_jax.methods.method import Method
from sparse_jax.models.functional import Params
from sparse_jax.supports.positions import fetch
from sparse_jax.supports.roles import DENSE, map_roles
from sparse_jax.training.build import Job
from sparse_jax.training.forgetting import make_comparison
from sparse_jax.training.objective import Metrics

__all__ = ["KlBudget", "strength_within"]

_NEAR = 0.95  # of the budget is close enough
_TRIALS = 12

_Array = TypeVar("_Array", np.ndarray, jax.Array)


class KlBudget:
    """Compares the states of a run with its base, and keeps the last in a budget.

    A strength s in [0, 1] is a point on the line from the base to what was trained,

        v = v_base + s * (v_trained - v_base)

    for every trained value, and from where they started for arrays that a method adds.

    Args:
      job: with a text.
      tuner: makes the states.
      state: before the first update.
    """

    def __init__(self, job: Job, tuner: Tuner, state: CompactState):
        self._tuner, self._most = tuner, job.settings.kl_budget or math.inf
        self._added = jax.tree.map(fetch, state.added)
        self._dense: Arrays = {}
        note = lambda role, leaf: self._dense.update({role.name: fetch(leaf)})
        map_roles(note, tuner.roles(state.params), state.params, only=(DENSE,))
        # Until entries are selected, all that changes is trained in full.
        self._base = Adapter(dense=self._dense)
        assert job.text is not None
        self._compare = make_comparison(
            job.base.model, tuner.attach(state), job.text, job.base.placement
        )

    def begin(self, params: optax.Params, support: optax.Params) -> None:
        """Takes the values of the base at the supports of a run."""
        entries = self._entries(params, support)
        self._base = replace(entries, dense=self._dense)

    def measure(self, state: CompactState) -> tuple[CompactState, Metrics]:
        """Returns the metrics of a state, and the state, which is used up."""
        switch = AdapterSwitch(cast("Params", state.params), {"base": self._base})
        trained = self._tuner.attach(state).trained
        found = self._compare(lambda: switch.to("base"), switch.to, trained)
        return state._replace(params=switch.to()), found

    def is_over(self, metrics: Metrics) -> bool:
        """Returns whether a state is outside the budget, if any; what is NaN is."""
        return self._most < math.inf and not metrics.get("kl", 0.0) <= self._most

    def held(self, state: CompactState, kl: float) -> tuple[CompactState, float]:
        """Returns a state within the budget, and its strength; `state` is used up.

        Args:
          state: outside the budget.
          kl: of the state.
        """
        trained, added = self._entries(state.params, state.support), state.added

        def at(state: CompactState, strength: float) -> CompactState:
            move = lambda base, now: _between(base, now, strength)
            arrays = lambda one: (one.values, one.dense)
            values, dense = jax.tree.map(move, arrays(self._base), arrays(trained))
            entries = {"at": replace(trained, values=values, dense=dense)}
            params = AdapterSwitch(cast("Params", state.params), entries).to("at")
            moved = jax.tree.map(move, self._added, added)
            return state._replace(params=params, added=moved)

        def kl_at(strength: float) -> float:
            nonlocal state
            state, found = self.measure(at(state, strength))
            return found["kl"]

        strength = strength_within(self._most, kl_at, kl)
        return at(state, strength), strength

    def _entries(self, params: optax.Params, support: optax.Params) -> Adapter:
        """Returns the trained values of the base's leaves."""
        return adapter_of(Method(), self._tuner.roles(params), params, support, {})


def strength_within(
    budget: float, kl_of: Callable[[float], float], kl_at_one: float
) -> float:
    """Returns the largest strength found whose KL is within a budget.

    Args:
      budget: most KL.
      kl_of: KL of a strength in (0, 1); that of 0 is taken for 0.
      kl_at_one: KL of strength 1, above the budget.

    Example:
      >>> round(strength_within(0.01, lambda strength: strength**2, 1.0), 2)
      0.1
    """
    low, high = 0.0, 1.0
    # The KL of a small step grows with its square: its root is nearly a line.
    root_low, root_high = 0.0, math.sqrt(kl_at_one)
    goal = math.sqrt((1 + _NEAR) / 2 * budget)
    for trial in range(_TRIALS):
        share = (goal - root_low) / (root_high - root_low)
        # Far from the line, or not finite: halves.
        if trial > _TRIALS // 2 or not 0 < share < 1:
            share = 0.5
        middle = low + share * (high - low)
        kl = kl_of(middle)
        if kl <= budget:
            low, root_low = middle, math.sqrt(kl)
            if kl >= _NEAR * budget:
                break
        else:
            high, root_high = middle, math.sqrt(kl)
    return low


def _between(base: np.ndarray, now: _Array, strength: float) -> _Array:
    """Returns base + strength * (now - base), in the dtype of the base."""
    wide = base.astype(np.float32)
    between = wide + np.float32(strength) * (now.astype(np.float32) - wide)
    return between.astype(base.dtype)

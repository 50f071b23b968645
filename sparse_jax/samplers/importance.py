"""Importance: learn which layers matter by damping some of them (IST)."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.params.arguments import require_count, require_whole
from sparse_jax.params.positive import require_positive
from sparse_jax.samplers.registry import SamplerOptions
from sparse_jax.samplers.sampler import Sampler, ValueFn, draw_layers, is_active

__all__ = ["Importance", "ImportanceMemory"]

# Draws of one subset until it differs from the earlier ones; the last is kept anyway.
# The released code has no limit, and never ends once the weights are extreme.
_MOST_DRAWS = 100
# Of exp(-loss), relative: some ten roundings of a loss in float32.
_LEAST_SPREAD = 1e-6


class ImportanceMemory(NamedTuple):
    """What IST remembers."""

    importance: jax.Array  # shape=(L,), float32, higher is updated more often
    probes: jax.typing.ArrayLike  # shape=(), int32: probes that counted
    skipped: jax.typing.ArrayLike  # shape=(), int32: probes with a loss not finite
    suppressed: jax.Array  # shape=(num_probes, L), bool: subsets of the last probe
    losses: jax.Array  # shape=(num_probes,), float32: their losses, NaN before


@dataclass(frozen=True, kw_only=True)
class Importance(Sampler[ImportanceMemory]):
    """Draws layers by an importance learned from probes of the loss.

    With importance I `[L]`, zero at first, layers are drawn without replacement with
    weights sigmoid(I). Every `probe_every` updates `num_probes` different subsets S_k
    of `num_suppressed` layers are drawn with weights sigmoid(-I); with l_k the loss
    when the layers in S_k add only `suppression` times what they learned,

        r_k = exp(-l_k) - mean_j exp(-l_j),      p = sigmoid(I),
        I_i = I_i - importance_rate * p_i (1 - p_i) * sum of r_k over S_k with i in it.

    At a loss of several nats exp(-l_k) is small and hardly varies with k. With
    `normalize_rewards` r_k is divided by the standard deviation of exp(-l_k) over k, so
    that a probe moves the importance by as much at any loss; an `importance_rate` of
    0.3 is then large. Equal losses still teach nothing.

    A probe with a loss that is not finite is skipped and counted. The released code
    keeps the opposite sign of I and calls it importance score.

    Raises:
      InputError: if a number breaks its rule, or if there are fewer than `num_probes`
        different subsets.

    Example:
      >>> sampler = Importance(num_layers=4, num_active=1, num_probes=2)
      >>> value_fn = lambda strength: 1.0 - strength[0]  # only layer 0 matters
      >>> probe = lambda m, i: (sampler.probe(m, jax.random.key(i), value_fn), None)
      >>> memory, _ = jax.lax.scan(probe, sampler.start(), jnp.arange(20))
      >>> int(memory.importance.argmax())
      0

    References:
      Yao et al., 2024, https://arxiv.org/abs/2410.11772, and `ist.py` of the released
      code, whose constants are the defaults here.
    """

    probe_every: int = SamplerOptions.probe_every
    num_probes: int = 3
    num_suppressed: int | None = None  # None is half of the layers
    suppression: float = 0.25
    importance_rate: float = SamplerOptions.importance_rate
    normalize_rewards: bool = SamplerOptions.normalize_rewards

    def __post_init__(self):
        super().__post_init__()
        if self.num_suppressed is not None:
            require_whole("num_suppressed", self.num_suppressed)
        for name in ("probe_every", "num_probes"):
            require_count(name, getattr(self, name))
        if not 0 <= self.suppression < 1:
            raise InputError(
                f"`suppression` must be in [0, 1), got {self.suppression}. It is what "
                "is left of the response of a suppressed layer."
            )
        require_positive("importance_rate", self.importance_rate)
        self._require_enough_subsets()

    @classmethod
    def fitted(
        cls,
        *,
        num_layers: int,
        num_probes: int | None = None,
        num_suppressed: int | None = None,
        **options: Any,
    ) -> "Importance":
        """Returns the sampler with defaults that also fit one layer, or two.

        Args:
          num_layers: L.
          num_probes: None is 3, or the number of different subsets if it is smaller.
          num_suppressed: None is half of the layers, but at least one.
          **options: the other attributes.

        Example:
          >>> Importance.fitted(num_layers=2, num_active=1).num_probes
          2
        """
        require_count("num_layers", num_layers)
        if num_suppressed is None:
            num_suppressed = max(1, num_layers // 2)
        require_whole("num_suppressed", num_suppressed)
        if num_probes is None:
            most = Importance.num_probes
            num_probes = max(1, min(most, math.comb(num_layers, abs(num_suppressed))))
        sizes = {"num_layers": num_layers, "num_suppressed": num_suppressed}
        return cls(**sizes, num_probes=num_probes, **options)

    @property
    def size(self) -> int:
        """Layers suppressed in a probe."""
        if self.num_suppressed is None:
            return self.num_layers // 2
        return self.num_suppressed

    @property
    def period(self) -> int | None:
        """Updates between two probes."""
        return self.probe_every

    def start(self) -> ImportanceMemory:
        """Returns an importance of zero for every layer."""
        return ImportanceMemory(
            importance=jnp.zeros(self.num_layers, jnp.float32),
            probes=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            suppressed=jnp.zeros((self.num_probes, self.num_layers), bool),
            losses=jnp.full(self.num_probes, jnp.nan, jnp.float32),
        )

    def weights(self, memory: ImportanceMemory) -> jax.Array:
        """Returns sigmoid(I)."""
        return jax.nn.sigmoid(memory.importance)

    def draw(
        self, memory: ImportanceMemory, key: jax.Array, turn: jax.typing.ArrayLike
    ) -> jax.Array:
        """Returns layers drawn with weights sigmoid(I)."""
        # In the logarithm no weight falls to zero, however small it is.
        log_weights = jax.nn.log_sigmoid(memory.importance)
        return draw_layers(jax.random.fold_in(key, turn), log_weights, self.num_active)

    def probe(
        self, memory: ImportanceMemory, key: jax.Array, value_fn: ValueFn
    ) -> ImportanceMemory:
        """Returns the memory after the losses of a few damped models."""
        suppressed = self._subsets(memory.importance, key)
        strength = jnp.where(suppressed, jnp.float32(self.suppression), 1.0)
        # One model at a time: side by side they would need several times its memory.
        losses = lax.map(lambda row: value_fn(row).astype(jnp.float32), strength)
        rewards = self._rewards(losses)
        p = jax.nn.sigmoid(memory.importance)
        change = jnp.sum(jnp.where(suppressed, rewards[:, None], 0.0), axis=0)
        importance = memory.importance - self.importance_rate * change * p * (1 - p)
        finite = jnp.all(jnp.isfinite(losses))
        return ImportanceMemory(
            importance=jnp.where(finite, importance, memory.importance),
            probes=jnp.where(
                finite, optax.safe_increment(memory.probes), memory.probes
            ),
            skipped=jnp.where(
                finite, memory.skipped, optax.safe_increment(memory.skipped)
            ),
            suppressed=suppressed,
            losses=losses,
        )

    def shown(self, memory: ImportanceMemory) -> dict[str, jax.Array]:
        """Returns the importance, what the last probe found, and how many were not."""
        return {
            "importance": memory.importance,
            "probe_losses": memory.losses,
            "skipped_probes": jnp.asarray(memory.skipped),
        }

    def _rewards(self, losses: jax.Array) -> jax.Array:
        """Returns the reward of every probe, shape=(num_probes,), float32."""
        if self.normalize_rewards:
            # A common factor leaves them as they are, and exp(-loss) is never zero.
            losses = losses - losses.min()
        # Against the first one, so that equal losses give rewards of exactly zero.
        rewards = jnp.exp(-losses) - jnp.exp(-losses[0])
        rewards = rewards - rewards.mean()
        if not self.normalize_rewards:
            return rewards
        # Losses that differ by rounding alone have nothing to say.
        spread = rewards.std()
        return jnp.where(spread > _LEAST_SPREAD, rewards / spread, 0.0)

    def _subsets(self, importance: jax.Array, key: jax.Array) -> jax.Array:
        """Returns different subsets to suppress, shape=(num_probes, L), bool."""
        log_weights = jax.nn.log_sigmoid(-importance)

        def fresh(key: jax.Array) -> jax.Array:
            return is_active(self, draw_layers(key, log_weights, self.size))

        def add(chosen: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            row_key = jax.random.fold_in(key, i)

            def repeats(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
                tries, row = carry
                return jnp.any(jnp.all(chosen == row[None], axis=1)) & (
                    tries < _MOST_DRAWS
                )

            def again(
                carry: tuple[jax.Array, jax.Array],
            ) -> tuple[jax.Array, jax.Array]:
                tries = carry[0] + 1
                return tries, fresh(jax.random.fold_in(row_key, tries))

            first = (jnp.zeros([], jnp.int32), fresh(jax.random.fold_in(row_key, 0)))
            row = lax.while_loop(repeats, again, first)[1]
            return chosen.at[i].set(row), None

        # A row of nothing is no subset, so rows to come equal none.
        empty = jnp.zeros((self.num_probes, self.num_layers), bool)
        return lax.scan(add, empty, jnp.arange(self.num_probes))[0]

    def _require_enough_subsets(self) -> None:
        """Raises unless there are as many different subsets as a probe needs."""
        if not 1 <= self.size <= self.num_layers:
            raise InputError(
                f"`num_suppressed` must be in [1, num_layers={self.num_layers}], got "
                f"{self.num_suppressed}. None is half of the layers."
            )
        subsets = math.comb(self.num_layers, self.size)
        if subsets < self.num_probes:
            raise InputError(
                f"`num_probes` must be at most {subsets}, the different subsets of "
                f"{self.size} of {self.num_layers} layers, got {self.num_probes}."
            )

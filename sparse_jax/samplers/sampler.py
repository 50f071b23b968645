"""What a sampler is, and how it moves from one update to the next."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.errors import InputError
from sparse_jax.params.arguments import require_count, require_whole
from sparse_jax.samplers.registry import SamplerOptions

__all__ = [
    "PROBE",
    "Sampler",
    "SamplerState",
    "ValueFn",
    "advance",
    "begin",
    "draw_layers",
    "is_active",
    "row_of_layers",
]

# The name of what probes in programs, which run it in some updates only.
PROBE = "probe"

Memory = TypeVar("Memory")
# strength [L] -> loss of the model whose layer l adds strength[l] times what it learned
ValueFn = Callable[[jax.Array], jax.Array]


class SamplerState(NamedTuple):
    """What a sampler remembers between updates."""

    count: jax.typing.ArrayLike  # shape=(), int32: updates seen
    key_data: jax.Array  # uint32: the key, as `jax.random.key_data` gives it
    active: jax.Array  # shape=(num_active,), int32, sorted: layers of the last update
    memory: Any  # what the rule itself remembers, such as an importance


@dataclass(frozen=True, kw_only=True)
class Sampler(Generic[Memory]):
    """A rule for which layers are active: hashable, without arrays.

    `Memory` is the pytree of arrays that it keeps between updates.

    Attributes:
      num_layers: L.
      num_active: layers that are updated at a time.
      hold: updates that a choice is kept for.

    Raises:
      InputError: if a number breaks its rule.
    """

    num_layers: int
    num_active: int
    hold: int = SamplerOptions.hold

    # Whether the layers are chosen once, before the first update, by `measure`.
    measures: ClassVar[bool] = False

    def __post_init__(self):
        require_count("num_layers", self.num_layers)
        require_count("hold", self.hold)
        require_whole("num_active", self.num_active)
        if not 1 <= self.num_active <= self.num_layers:
            raise InputError(
                f"`num_active` must be in [1, num_layers={self.num_layers}], got "
                f"{self.num_active}. A quarter of the layers is usual."
            )

    @classmethod
    def fitted(cls, *, num_layers: int, num_active: int, **options: Any) -> Self:
        """Returns the sampler for a model, from the options of a run.

        Args:
          num_layers: L.
          num_active: layers that are updated at a time.
          **options: those that its row in `sparse_jax.samplers.registry` names.
        """
        return cls(num_layers=num_layers, num_active=num_active, **options)

    def measure(
        self,
        layers: object,
        states_fn: Callable[[], tuple[jax.Array, jax.Array]],
    ) -> jax.Array:
        """Returns scores of which a rule that `measures` trains the largest, (L,).

        Args:
          layers: the parameters of the layers, `[L, ...]`.
          states_fn: returns the hidden states of the first batch, `[L + 1, B, T, D]`:
            what enters every layer, and what leaves the last; and where there are
            tokens, `[B, T]`.
        """
        del layers, states_fn
        return jnp.zeros(self.num_layers, jnp.float32)

    @property
    def reachable(self) -> tuple[int, ...]:
        """The layers that a turn may have, ascending; the others are never trained."""
        return tuple(range(self.num_layers))

    @property
    def is_constant(self) -> bool:
        """Whether every turn has the same layers."""
        return len(self.reachable) == self.num_active

    def reached(self, size: int) -> int:
        """Returns how many of the `size` entries of all layers a run ever trains.

        Example:
          >>> Sampler(num_layers=4, num_active=1).reached(100)
          100
        """
        few = self.num_active if self.measures else len(self.reachable)
        return size * few // self.num_layers

    @property
    def period(self) -> int | None:
        """Updates between two probes; None if the rule makes none."""
        return None

    @property
    def needs_norms(self) -> bool:
        """Whether `observe` reads the norms of gradients."""
        return False

    def start(self) -> Memory:
        """Returns the memory before the first update."""
        return cast(Memory, ())

    def weights(self, memory: Memory) -> jax.Array:
        """Returns the weights that layers are drawn with, shape=(L,), float32."""
        del memory
        return jnp.ones(self.num_layers, jnp.float32)

    def draw(
        self, memory: Memory, key: jax.Array, turn: jax.typing.ArrayLike
    ) -> jax.Array:
        """Returns the active layers of a turn, sorted, shape=(num_active,), int32.

        Args:
          memory: what the rule remembers.
          key: the same key at every turn.
          turn: shape=(), int32: choices made before.
        """
        draw_key = jax.random.fold_in(key, turn)
        return draw_layers(draw_key, jnp.log(self.weights(memory)), self.num_active)

    def probe(self, memory: Memory, key: jax.Array, value_fn: ValueFn) -> Memory:
        """Returns the memory after evaluating `value_fn` with suppressed layers."""
        del key, value_fn
        return memory

    def observe(self, memory: Memory, active: jax.Array, norms: jax.Array) -> Memory:
        """Returns the memory after an update.

        Args:
          memory: what the rule remembers.
          active: the active layers, shape=(num_active,), int32.
          norms: norms of their gradients, shape=(num_active,), float32.
        """
        del active, norms
        return memory

    def shown(self, memory: Memory) -> dict[str, jax.Array]:
        """Returns the parts of the memory to log, by name."""
        del memory
        return {}


def begin(sampler: Sampler, key: jax.Array) -> SamplerState:
    """Returns the state before the first update; no choice has been made."""
    return SamplerState(
        count=jnp.zeros([], jnp.int32),
        # A typed key is no leaf that checkpoints and `optax.tree` functions expect.
        key_data=_default_key_data(key),
        active=jnp.arange(sampler.num_active, dtype=jnp.int32),
        memory=sampler.start(),
    )


def _default_key_data(key: jax.Array) -> jax.Array:
    """Returns the numbers of a key; another kind of generator gives a new one."""
    data = jax.random.key_data(key)
    if data.shape == jax.random.key_data(jax.random.key(0)).shape:
        return data
    return jax.random.key_data(jax.random.key(jax.random.bits(key, (), jnp.uint32)))


def advance(
    sampler: Sampler, state: SamplerState, value_fn: ValueFn | None = None
) -> SamplerState:
    """Returns the state with the active layers of the next update.

    Probes first, every `sampler.period` updates but not before the first one; then
    draws, every `sampler.hold` updates. Both use keys that depend on nothing but the
    key and the count, so a run that continues draws what it would have drawn.

    Args:
      sampler: the rule.
      state: as `begin` or this function returned it.
      value_fn: strength `[L]` -> loss, needed by a rule that probes.

    Raises:
      ValueError: if the rule probes and there is no `value_fn`.
    """
    count = jnp.asarray(state.count)
    key = jax.random.wrap_key_data(state.key_data)
    probe_key, draw_key = jax.random.split(key)
    memory = state.memory
    if sampler.period is not None:
        if value_fn is None:
            raise ValueError(_VALUE_FN_MISSING)
        due = (count > 0) & (count % sampler.period == 0)
        probe_key = jax.random.fold_in(probe_key, count)
        ask = lambda memory: sampler.probe(memory, probe_key, value_fn)
        with jax.named_scope(PROBE):
            memory = jax.lax.cond(due, ask, lambda memory: memory, memory)
    active = sampler.draw(memory, draw_key, count // sampler.hold)
    if sampler.hold > 1:
        active = jnp.where(count % sampler.hold == 0, active, state.active)
    return state._replace(
        count=optax.safe_increment(state.count), active=active, memory=memory
    )


def draw_layers(key: jax.Array, log_weights: jax.Array, num: int) -> jax.Array:
    """Draws `num` of L layers without replacement, by weight: sorted, int32.

    The `num` largest of log(weight) + Gumbel noise are distributed as draws one after
    the other, each in proportion to the weights that are left.

    Example:
      >>> draw_layers(jax.random.key(0), jnp.log(jnp.array([1.0, 0.0, 1.0])), 2)
      Array([0, 2], dtype=int32)
    """
    noise = jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
    return jnp.sort(jax.lax.top_k(log_weights + noise, num)[1])


def is_active(sampler: Sampler, active: jax.Array) -> jax.Array:
    """Returns the active layers as a mask, shape=(L,), bool."""
    return jnp.zeros(sampler.num_layers, bool).at[active].set(True)


def row_of_layers(sampler: Sampler) -> jax.Array:
    """Returns the place of every layer among the reachable ones, shape=(L,), int32.

    Example:
      >>> from sparse_jax import Static
      >>> row_of_layers(Static.of(1, 3, num_layers=4))[jnp.array([1, 3])]
      Array([0, 1], dtype=int32)
    """
    place = np.zeros(sampler.num_layers, np.int32)
    place[list(sampler.reachable)] = np.arange(len(sampler.reachable))
    return jnp.array(place)


_VALUE_FN_MISSING = (
    "`value_fn` must be passed to `update`, got None. It maps a strength of shape "
    "[num_layers] to the loss of a model whose layers are damped by it; pass "
    "`sampler='uniform'` to draw layers without evaluating losses."
)

"""The settings of a fine-tuning run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_jax.errors import InputError

__all__ = ["DTYPES", "LEARNING_RATES", "Settings"]

# Found by nobody's grid but usual; a few sparse entries want larger steps than all.
LEARNING_RATES = {
    "full": 3e-5,
    "head": 1e-3,
    "bitfit": 1e-3,
    "lora": 1e-3,
    "sift": 7e-4,
    "random": 7e-4,
    "magnitude": 7e-4,
}
DTYPES = ("float32", "bfloat16")
_WITH_WHERE = ("lora", "sift", "random", "magnitude")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `finetune` does: the options of `sparse-jax finetune`, one to one.

    Raises:
      InputError: naming the option, if a value breaks its rule.

    Example:
      >>> Settings(model="bert", task="mrpc", output="run").resolved_learning_rate
      0.0007
    """

    model: str  # folder in the Hugging Face layout, or id on the Hub
    task: str  # as `sparse_jax.tasks.TASKS`
    output: str  # run directory, to be created
    data: str | None = None  # folder of the task's files; None asks the Hub
    method: str = "sift"  # a word of LEARNING_RATES
    density: float = 0.008  # fraction of entries trained, in (0, 1]; sparse methods
    rank: int = 8  # of the added products; lora
    where: tuple[str, ...] | None = None  # trained leaves, or sites for lora
    dense: tuple[str, ...] | None = None  # leaves trained in full; None is the head
    learning_rate: float | None = None  # peak; None is the method's usual one
    batch_size: int = 32  # examples per update
    accumulate: int = 1  # micro-batches that an update is computed in
    epochs: int = 3  # passes over the training examples
    max_steps: int | None = None  # updates after which to stop; None is no limit
    max_length: int | None = None  # tokens; None is 128, or the model's positions
    dtype: str = "float32"  # of the parameters
    checkpointing: bool = False  # whether to compute layers again in the backward pass
    seed: int = 0  # of the new head, the order of the examples, and dropout
    save_every: int = 500  # updates between two checkpoints, beside every epoch's
    overwrite: bool = False  # whether to replace an earlier run
    resume: bool = False  # whether to continue an interrupted run

    def __post_init__(self):
        _require_word("method", self.method, tuple(LEARNING_RATES))
        _require_word("dtype", self.dtype, DTYPES)
        for name in ("rank", "batch_size", "accumulate", "epochs", "save_every"):
            _require_positive(name, getattr(self, name))
        for name in ("max_steps", "max_length", "learning_rate"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        self._require_consistent()

    @property
    def resolved_learning_rate(self) -> float:
        """Peak learning rate."""
        if self.learning_rate is None:
            return LEARNING_RATES[self.method]
        return self.learning_rate

    def _require_consistent(self) -> None:
        """Raises if two settings contradict each other."""
        if not 0 <= self.seed < 2**32:
            raise InputError(f"`seed` must be in [0, 2**32), got {self.seed}.")
        if not 0 < self.density <= 1:
            raise InputError(
                f"`density` must be in (0, 1], got {self.density}. It is the fraction "
                "of entries trained, so training 1% of them is 0.01."
            )
        if self.where is not None and self.method not in _WITH_WHERE:
            raise InputError(
                f"`where` must be left out with method {self.method!r}. It belongs to "
                f"{', '.join(_WITH_WHERE)}; use `dense` to choose whole parameters."
            )
        if self.batch_size % self.accumulate:
            raise InputError(
                f"`accumulate` must divide `batch_size`={self.batch_size}, got "
                f"{self.accumulate}. A batch is all examples of one update."
            )
        if self.overwrite and self.resume:
            raise InputError(
                "`overwrite` and `resume` must not be given together. The first "
                "starts anew, the second continues."
            )


def _require_word(name: str, word: str, words: Sequence[str]) -> None:
    """Raises unless a setting is one of some words."""
    if word not in words:
        raise InputError(f"`{name}` must be one of {', '.join(words)}, got {word!r}.")


def _require_positive(name: str, value: float) -> None:
    """Raises unless a setting is a number above zero."""
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"`{name}` must be positive, got {value}.")

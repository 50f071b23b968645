"""The options of evaluations, which the help of the command line reads."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_jax.data.glue import CAUSAL
from sparse_jax.errors import InputError
from sparse_jax.methods.registry import METHODS
from sparse_jax.params.fields import setting

if TYPE_CHECKING:
    from sparse_jax.methods.method import Method

__all__ = ["EvaluationOptions"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """When a run is evaluated, and how far it may take a decoder from its base."""

    eval_every: int | None = setting(
        None,
        "Updates between two evaluations; every epoch ends with one, too.",
        "an epoch",
    )
    kl_text: str | None = setting(
        None,
        "File of texts that are not trained on, to compare a decoder with its base on "
        "at every evaluation: KL divergence and perplexity, in nats per token.",
        "none",
    )
    kl_budget: float | None = setting(
        None,
        "Most KL to the base on that text, in nats per token: the strength of the "
        "adapter is lowered to it at the end.",
        "no limit",
    )
    kl_stop: bool = setting(
        False, "End the training at the first evaluation above the budget."
    )

    def require_evaluation_options(
        self,
        task: str,
        adapter: str | None,
        method: "str | Method",
        reselect_every: int | None,
    ) -> None:
        """Raises `InputError` if an option breaks its rule, or does not fit the run.

        Args:
          task: of the run.
          adapter: that the run goes on from.
          method: of the run.
          reselect_every: updates between two selections of the run.
        """
        for name in ("eval_every", "kl_budget"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"`{name}` must be positive, got {value}.")
        needed = {"kl_budget": "kl_text", "kl_stop": "kl_budget"}
        for name, other in needed.items():
            if getattr(self, name) and getattr(self, other) is None:
                raise InputError(
                    f"`{other}` must be given with `{name}`, got nothing. The text is "
                    "a file that is not trained on, the budget a KL divergence there."
                )
        if self.kl_text is None:
            return
        if task.lower() != CAUSAL:
            raise InputError(
                f"`kl_text` must be left out with task {task!r}, got {self.kl_text!r}. "
                f"It belongs to {CAUSAL}: only a decoder predicts the words of a text."
            )
        if adapter is not None:
            raise InputError(
                f"`kl_text` must be left out with `adapter`, got {self.kl_text!r}: the "
                "run does not start at its base. Export the adapter with `--to "
                "merged`, and train on that folder."
            )
        if reselect_every is not None:
            raise InputError(
                f"`kl_text` must be left out with `reselect_every`, got "
                f"{self.kl_text!r}: the base is known at the entries of one selection. "
                "Compare the adapter at the end, by `evaluate --text`."
            )
        kind = METHODS[method].kind if isinstance(method, str) else type(method)
        if self.kl_budget is not None and not kind.starts_at_base:
            raise InputError(
                f"`kl_budget` must be left out with {kind.__name__}, got "
                f"{self.kl_budget}: it changes the base before it is trained."
            )

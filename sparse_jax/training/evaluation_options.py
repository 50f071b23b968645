"""The options of evaluations, which the help of the command line reads."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_jax.data.glue import CAUSAL
from sparse_jax.errors import InputError, brief
from sparse_jax.methods.registry import METHODS
from sparse_jax.params.fields import setting
from sparse_jax.params.positive import require_not_negative, require_positive
from sparse_jax.training.recipe_options import SCHEDULE_FREE

if TYPE_CHECKING:
    from sparse_jax.methods.method import Method

__all__ = ["EvaluationOptions"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """When and on what a run is evaluated, and which of its models is kept."""

    eval_every: int | None = setting(
        None,
        "Updates between evaluations; there is also one at the end of every epoch.",
        "an epoch",
    )
    eval_on_start: bool = setting(False, "Also evaluate before the first update.")
    eval_data: tuple[str, ...] | None = setting(
        None,
        "Another file to evaluate on, as FILE or NAME=FILE; may be repeated. Nothing "
        "is then held out of a single file for causal.",
        "none",
    )
    max_eval_samples: int | None = setting(
        None,
        "Maximum number of examples per evaluation split, spread evenly over it.",
        "all",
    )
    load_best_model_at_end: bool = setting(
        False, "Save the best of the evaluated models instead of the last one."
    )
    metric_for_best_model: str | None = setting(
        None,
        "Metric that decides which model is best, such as loss or accuracy, or "
        "accuracy_test for another split than the first.",
        "the first metric of the task",
    )
    early_stopping_patience: int | None = setting(
        None,
        "Stop after this many evaluations in a row without a better model.",
        "never",
    )
    early_stopping_threshold: float = setting(
        0.0, "Least improvement of the metric that counts for early stopping."
    )
    kl_text: str | None = setting(
        None,
        "File of texts that are not trained on. A decoder is compared with its base on "
        "it at every evaluation: KL divergence, in nats per token, and perplexity.",
        "none",
    )
    kl_budget: float | None = setting(
        None,
        "Maximum KL to the base on --kl-text, in nats per token: at the end the "
        "change to the base is scaled down to stay within it.",
        "no limit",
    )
    kl_stop: bool = setting(
        False, "Stop training at the first evaluation above --kl-budget."
    )

    def require_evaluation_options(
        self,
        task: str,
        adapter: str | None,
        method: "str | Method",
        reselect_every: int | None,
        optimizer: object,
    ) -> None:
        """Raises `InputError` if an option breaks its rule, or does not fit the run.

        Args:
          task: of the run.
          adapter: that the run goes on from.
          method: of the run.
          reselect_every: updates between two selections of the run.
          optimizer: of the run.
        """
        for name in (
            "eval_every", "kl_budget", "early_stopping_patience", "max_eval_samples",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                require_positive(name, value)
        needed = {"kl_budget": "kl_text", "kl_stop": "kl_budget"}
        for name, other in needed.items():
            if getattr(self, name) and getattr(self, other) is None:
                raise InputError(
                    f"`{other}` must be given with `{name}`, got nothing. The text is "
                    "a file that is not trained on, the budget a KL divergence there."
                )
        self._require_best(reselect_every)
        _ = self.eval_files
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
                "Compare the adapter at the end, with `evaluate --text`."
            )
        if optimizer == SCHEDULE_FREE:
            raise InputError(
                f"`kl_text` must be left out with optimizer {optimizer!r}, got "
                f"{self.kl_text!r}: its model is an average, and the budget bounds the "
                "values that are trained. Choose adamw."
            )
        kind = METHODS[method].kind if isinstance(method, str) else type(method)
        if self.kl_budget is not None and not kind.starts_at_base:
            raise InputError(
                f"`kl_budget` must be left out with {kind.__name__}, got "
                f"{self.kl_budget}: it changes the base before it is trained."
            )

    @property
    def chooses_model(self) -> bool:
        """Whether the models that are evaluated are compared."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def eval_files(self) -> dict[str, str]:
        """The files of `eval_data` by the names of their splits.

        Raises:
          InputError: if two have one name.
        """
        found: dict[str, str] = {}
        for one in self.eval_data or ():
            named = re.fullmatch(r"([\w-]+)=(.+)", one)
            name, path = named.groups() if named else (Path(one).stem, one)
            if name in (*found, "train", "text"):
                raise InputError(
                    f"`eval_data` must have a name of its own for every file, got "
                    f"{brief(name)} for {brief(path)}. Pass it as NAME=FILE."
                )
            found[name] = path
        return found

    def _require_best(self, reselect_every: int | None) -> None:
        """Raises if the choice of a model breaks a rule."""
        threshold = self.early_stopping_threshold
        require_not_negative("early_stopping_threshold", threshold)
        if threshold and self.early_stopping_patience is None:
            raise InputError(
                "`early_stopping_threshold` must come with `early_stopping_patience`, "
                f"got {threshold} alone."
            )
        if self.metric_for_best_model is not None and not self.chooses_model:
            raise InputError(
                "`metric_for_best_model` must come with `load_best_model_at_end` or "
                f"`early_stopping_patience`, got {self.metric_for_best_model!r} alone."
            )
        others = {"kl_budget": self.kl_budget, "reselect_every": reselect_every}
        for name, value in others.items():
            if self.load_best_model_at_end and value is not None:
                raise InputError(
                    f"`load_best_model_at_end` must be left out with `{name}`, got "
                    f"both: {_REASONS[name]}."
                )


_REASONS = {
    "kl_budget": "the strength of the last model is lowered to the budget",
    "reselect_every": "the base is not kept at the entries of later selections",
}

"""The options of the data, which the help of the command line reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from sparse_jax.data.conversations import PROMPTS
from sparse_jax.data.glue import CAUSAL
from sparse_jax.errors import InputError
from sparse_jax.params.fields import one_of, require_word, setting

if TYPE_CHECKING:
    from sparse_jax.data.causal_tokens import Loss
    from sparse_jax.data.sources import DataSource

__all__ = ["DataOptions"]

LOSSES = ("response", "all")
HELD_OUT, STREAM_HELD_OUT, TEMPLATE = 0.05, 500, "alpaca"
# Options of the task causal, with their defaults.
_TEXT = {"loss_on": None, "packing": False, "template": None}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What a run is trained on, and how its columns are read."""

    data: "DataSource | None" = setting(
        None,
        "A file (CSV, TSV, JSON, JSON lines or Parquet; for causal also plain text), a "
        "folder with train and dev files, hub:NAME[:CONFIGURATION[:SPLIT]], or a "
        "mixture of these with weights: a.jsonl=0.7,b.jsonl=0.3.",
        "GLUE from the Hub",
    )
    columns: Mapping[str, str] | None = setting(
        None,
        "Names of the columns in your data, where they differ from ours, such as "
        "text=review,label=stars.",
        "the usual names",
    )
    loss_on: str | None = setting(
        None, f"Tokens that the loss of causal covers: {one_of(LOSSES)}.", LOSSES[0]
    )
    packing: bool = setting(
        False, "Pack several texts into a row; attention never crosses examples."
    )
    template: str | None = setting(
        None, f"Prompt template for instructions: {one_of(PROMPTS)}.", TEMPLATE
    )
    held_out: float | None = setting(
        None,
        "Examples of a single file to hold out for evaluation: a fraction if below 1, "
        "otherwise a number; with --streaming the number of first records.",
        f"{HELD_OUT}; {STREAM_HELD_OUT} with streaming",
    )
    streaming: bool = setting(
        False,
        "Read the training file (.jsonl) during training, for data larger than "
        "memory. For causal, with --max-steps.",
    )
    buffer_size: int = setting(
        2048, "Records that --streaming reads and shuffles at a time."
    )
    max_train_samples: int | None = setting(
        None, "Maximum number of training examples, spread evenly over the data.", "all"
    )
    drop_unlabeled: bool = setting(
        False,
        "Drop rows without a label: missing, null, NaN, - or, for classes, -1.",
    )

    @property
    def resolved_loss_on(self) -> "Loss":
        """Tokens that a causal language model is trained on."""
        return cast("Loss", self.loss_on or LOSSES[0])

    @property
    def resolved_template(self) -> str:
        """Name of the prompt around an instruction."""
        return self.template or TEMPLATE

    @property
    def resolved_held_out(self) -> float:
        """Fraction, or number, of the examples that are not trained on."""
        usual = STREAM_HELD_OUT if self.streaming else HELD_OUT
        return usual if self.held_out is None else self.held_out

    def require_data_options(self, task: str) -> None:
        """Raises `InputError` if an option breaks its rule, or does not fit the task.

        Args:
          task: of the run.
        """
        is_causal = task.lower() == CAUSAL
        for name, left_out in _TEXT.items():
            if not is_causal and getattr(self, name) != left_out:
                raise InputError(
                    f"`{name}` must be left out with task {task!r}, got "
                    f"{getattr(self, name)!r}. It belongs to {CAUSAL}."
                )
        if is_causal and self.drop_unlabeled:
            raise InputError(
                f"`drop_unlabeled` must be left out with task {CAUSAL!r}, got True. "
                "Its texts have no labels."
            )
        require_word("loss_on", self.resolved_loss_on, LOSSES)
        require_word("template", self.resolved_template, PROMPTS)
        share = self.resolved_held_out
        if self.streaming and not share >= 1:
            raise InputError(
                f"`held_out` must be a number of examples with `streaming`, got "
                f"{share:g}. They are the first of the file; commonly it is "
                f"{STREAM_HELD_OUT}."
            )
        if not share > 0 or (share > 1 and share % 1):
            raise InputError(
                f"`held_out` must be a fraction of the examples in (0, 1), or a "
                f"number, got {share:g}. Commonly it is {HELD_OUT}."
            )

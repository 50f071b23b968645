"""The recipe of a run: optimizer, schedule and loss, which the command line reads."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sparse_jax.data.glue import CAUSAL
from sparse_jax.errors import InputError, brief
from sparse_jax.methods.lookup import learning_rates
from sparse_jax.params.fields import one_of, require_word, setting
from sparse_jax.params.positive import require_not_negative

# JAX takes seconds to import, and the help of the command line reads these fields.
if TYPE_CHECKING:
    from optax import GradientTransformation

    from sparse_jax.methods.method import Method

__all__ = [
    "BALANCED", "COOLDOWN", "ENTRYWISE", "IN_8_BITS", "MOMENTS", "OF_MATRICES",
    "OPTIMIZERS", "SCHEDULES", "SCHEDULE_FREE", "WARM_UP", "RecipeOptions",
]  # fmt: skip

SCHEDULE_FREE = "schedule_free_adamw"
# Every number has an update of its own, whatever array it is packed in.
ENTRYWISE = (
    "adamw", "adam", "adagrad", "adamaxw", "adan", "ademamix", "lion", "nadamw",
    "radam", "rmsprop", "sgd", "signum", SCHEDULE_FREE,
)  # fmt: skip
# These read whole matrices.
OF_MATRICES = ("adafactor", "muon")
OPTIMIZERS = (*ENTRYWISE, *OF_MATRICES)
SCHEDULES = ("linear", "cosine", "constant", "wsd")
# What the Trainer of transformers calls them.
_TRAINERS = {
    "constant_with_warmup": "constant", "warmup_stable_decay": "wsd",
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw",
}  # fmt: skip
MOMENTS = ("float32", "bfloat16", "int8")
# Optimizers that have both moments in 8 bits.
IN_8_BITS = ("adamw", "adam")
WARM_UP = 0.06  # fraction of the updates, as for RoBERTa on GLUE
COOLDOWN = 0.2  # fraction of the updates of wsd
MAX_NORM = 1.0
GLOBAL_NORM, PREVIOUS_NORM = "global-norm", "previous-norm"
CLIPPING = (GLOBAL_NORM, PREVIOUS_NORM)
BALANCED = "balanced"
# What an optimizer that is an object brings with it.
_OF_OPTIMIZER = (
    "learning_rate", "warmup", "schedule", "cooldown", "weight_decay", "betas", "eps",
    "moment_dtype", "max_grad_norm", "clip_by",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What makes an update of a gradient, and what loss the gradient is of."""

    optimizer: "str | GradientTransformation" = setting(
        "adamw",
        f"Optax optimizer: {one_of(OPTIMIZERS)}. The last two need whole matrices, so "
        "they work only with methods that train whole arrays.",
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate, after the warm-up.",
        learning_rates(),
    )
    warmup: float = setting(
        WARM_UP,
        "Updates of linear warm-up: a fraction if below 1, otherwise a number.",
    )
    schedule: str | None = setting(
        None,
        f"Learning rate after the warm-up: {one_of(SCHEDULES)}. The first two decay "
        "to 0; wsd is constant until its cooldown.",
        f"linear; constant for {SCHEDULE_FREE}",
    )
    cooldown: float | None = setting(
        None,
        "Updates of linear decay to 0 at the end of wsd: a fraction if below 1, "
        "otherwise a number.",
        f"{COOLDOWN}",
    )
    weight_decay: float = setting(
        0.0,
        "Decoupled weight decay, multiplied by the learning rate. Biases and norm "
        "scales do not decay; of a sparse leaf only the trained entries do.",
    )
    betas: tuple[float, float] | None = setting(
        None, "Decay rates of the two moments.", "Optax's: 0.9 0.999 for adamw"
    )
    eps: float | None = setting(
        None, "Term added to the denominator.", "Optax's: 1e-08 for adamw"
    )
    moment_dtype: str = setting(
        MOMENTS[0],
        f"Dtype of the moments: {MOMENTS[0]}; {MOMENTS[1]}, for the first only; or "
        f"{MOMENTS[2]}, 8-bit codes of both with a scale per 256 values, for "
        f"{' and '.join(IN_8_BITS)}.",
    )
    max_grad_norm: float = setting(
        MAX_NORM,
        "Maximum global norm of the gradient of the trained parameters; 0 disables "
        "clipping.",
    )
    clip_by: str = setting(
        GLOBAL_NORM,
        f"Norm that decides how much a gradient is clipped: {GLOBAL_NORM}, its own, or "
        f"{PREVIOUS_NORM}, that of the previous update, so that the scale is known "
        "before the backward pass.",
    )
    update_in_backward: bool = setting(
        False,
        "Update each layer inside the backward pass, as soon as its gradient is "
        "known, so that gradients of only one layer exist at a time. Needs --clip-by "
        f"{PREVIOUS_NORM} or --max-grad-norm 0, and an optimizer that updates every "
        "entry independently.",
    )
    label_smoothing: float = setting(
        0.0, "Label smoothing, over all classes or all tokens."
    )
    neftune_noise: float = setting(
        0.0,
        "NEFTune: alpha of the noise on word embeddings in training, uniform in "
        "+-alpha / sqrt(tokens * width); commonly 5.",
    )
    class_weights: str | None = setting(
        None,
        f"Weights of the classes in the loss: {BALANCED} (inverse to their frequency), "
        "or label=weight pairs such as spam=3,ham=1; other labels have weight 1.",
        "all 1",
    )

    def require_recipe(
        self, task: str, method: "str | Method", sampler: str | None
    ) -> None:
        """Raises `InputError` if an option breaks its rule, or two contradict.

        Args:
          task: of the run.
          method: of the run.
          sampler: word of the sampler of layers, if there is one.
        """
        if self.optimizer is None:
            # What earlier versions called the default.
            object.__setattr__(self, "optimizer", OPTIMIZERS[0])
        for name in ("optimizer", "schedule"):
            word = getattr(self, name)
            if isinstance(word, str) and word in _TRAINERS:
                object.__setattr__(self, name, _TRAINERS[word])
        self._require_numbers()
        if self.class_weights and task.lower() == CAUSAL:
            raise InputError(
                f"`class_weights` must be left out with task {CAUSAL!r}, got "
                f"{self.class_weights!r}. Its texts have no labels."
            )
        if isinstance(self.optimizer, str):
            self._require_named(method, sampler)
        else:
            self._require_own()

    def require_update_in_backward(self, others: Mapping[str, object]) -> None:
        """Raises `InputError` if an update needs the gradients of all layers at once.

        Args:
          others: settings that must be left out, by name, with their values.
        """
        if not self.update_in_backward:
            return
        reasons = {
            "accumulate": "Gradients of micro-batches would have to be kept to be "
            "added up; take a smaller `batch_size`.",
            "sampler": "It updates a few layers at a time already.",
            "mesh": "Replicas would have to add up their gradients; take the axis fsdp "
            "in place of data.",
            "method": "It trains no layer.",
        }
        for name, value in others.items():
            raise InputError(
                f"`{name}` must be left out with `update_in_backward`, got "
                f"{brief(value)}. {reasons[name]}"
            )
        alone = tuple(word for word in ENTRYWISE if word != SCHEDULE_FREE)
        if self.optimizer not in alone:
            raise InputError(
                f"`optimizer` must be one of {', '.join(alone)} with "
                f"`update_in_backward`, got {brief(self.optimizer)}. These update "
                "every entry on its own, so one layer at a time."
            )
        if self.max_grad_norm and self.clip_by == GLOBAL_NORM:
            raise InputError(
                f"`clip_by` must be {PREVIOUS_NORM} with `update_in_backward`, got "
                f"{GLOBAL_NORM}: the global norm is known only after the first layers "
                "have been updated. Or set `max_grad_norm` to 0, which does not clip."
            )

    @property
    def resolved_schedule(self) -> str:
        """The word of the schedule."""
        free = self.optimizer == SCHEDULE_FREE
        return self.schedule or ("constant" if free else SCHEDULES[0])

    def _require_numbers(self) -> None:
        """Raises if a value is out of range."""
        words = {"schedule": SCHEDULES, "moment_dtype": MOMENTS, "clip_by": CLIPPING}
        for name, known in words.items():
            if getattr(self, name) is not None:
                require_word(name, getattr(self, name), known)
        for name in ("warmup", "cooldown"):
            value = getattr(self, name)
            if value is None or (value >= 0 and (value <= 1 or value % 1 == 0)):
                continue
            usual = WARM_UP if name == "warmup" else COOLDOWN
            raise InputError(
                f"`{name}` must be a fraction of the updates in [0, 1), or a number, "
                f"got {value}. Commonly it is {usual}."
            )
        for name in ("weight_decay", "max_grad_norm", "neftune_noise", "eps"):
            value = getattr(self, name)
            if value is not None:
                require_not_negative(name, value)
        if self.clip_by == PREVIOUS_NORM and not self.max_grad_norm:
            raise InputError(
                f"`clip_by` must be left out with `max_grad_norm=0`, got "
                f"{PREVIOUS_NORM!r}. Nothing is clipped then."
            )
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"`label_smoothing` must be in [0, 1), got {self.label_smoothing}. "
                "Commonly it is 0.1."
            )
        betas = (0.0, 0.0) if self.betas is None else self.betas
        if len(betas) != 2 or not all(0 <= one < 1 for one in betas):
            raise InputError(
                f"`betas` must be two numbers in [0, 1), got {brief(self.betas)}. "
                "Those of adamw are 0.9 0.999."
            )
        if self.cooldown is not None and self.schedule != "wsd":
            raise InputError(
                f"`cooldown` must be left out with schedule {self.resolved_schedule!r},"
                f" got {self.cooldown:g}. It is the end of wsd."
            )

    def _require_named(self, method: "str | Method", sampler: str | None) -> None:
        """Raises if options contradict the optimizer that they name."""
        name = self.optimizer
        if name not in OPTIMIZERS:
            close = difflib.get_close_matches(str(name), OPTIMIZERS, 2, 0.4)
            nearest = f" The nearest are {one_of(close)}." if len(close) > 1 else ""
            nearest = f" The nearest is {close[0]}." if len(close) == 1 else nearest
            raise InputError(
                f"`optimizer` must be one of {', '.join(OPTIMIZERS)}, got "
                f"{brief(name)}.{nearest} In Python any transformation of Optax works."
            )
        if name == SCHEDULE_FREE and self.resolved_schedule != "constant":
            raise InputError(
                f"`schedule` must be constant with optimizer {name!r}, got "
                f"{self.schedule!r}. It averages its steps in place of a decay."
            )
        if name == SCHEDULE_FREE and sampler is not None:
            raise InputError(
                f"`optimizer` must not be {name!r} with a sampler of layers, got "
                f"{sampler!r}: layers that are not trained have no average. Choose "
                "adamw."
            )
        if self.clip_by == PREVIOUS_NORM and sampler is not None:
            raise InputError(
                f"`clip_by` must be {GLOBAL_NORM} with a sampler of layers, got "
                f"{PREVIOUS_NORM!r}: the previous update trained other layers."
            )
        if self.moment_dtype == MOMENTS[2] and name not in IN_8_BITS:
            raise InputError(
                f"`moment_dtype` must be {MOMENTS[0]} with optimizer {name!r}, which "
                f"has no 8-bit moments, got {MOMENTS[2]!r}. These have them: "
                f"{', '.join(IN_8_BITS)}."
            )
        # Imports JAX, which the help of the command line does without.
        from sparse_jax.training.optimizer import require_takes

        require_takes(self)
        if name in OF_MATRICES and _chooses_entries(method, self):
            raise InputError(
                f"`optimizer` must be one of {', '.join(ENTRYWISE)} with a method that "
                f"chooses entries, got {name!r}, which reads whole matrices. It goes "
                "with full, lora and other methods that train whole arrays."
            )

    def _require_own(self) -> None:
        """Raises if the optimizer is no transformation, or not the only one to say."""
        from sparse_jax.params.arguments import (
            require_plain_update,
            require_transformation,
        )

        tx: Any = self.optimizer
        require_transformation("optimizer", tx)
        require_plain_update("optimizer", tx)
        defaults = {one.name: one.default for one in fields(RecipeOptions)}
        for name in _OF_OPTIMIZER:
            if getattr(self, name) != defaults[name]:
                raise InputError(
                    f"`{name}` must be left out with an optimizer, which has its own, "
                    f"got {getattr(self, name)}."
                )


def _chooses_entries(method: "str | Method", options: object) -> bool:
    """Returns whether a method trains packed entries, which are no matrices."""
    from sparse_jax.methods.registry import METHODS

    if isinstance(method, str):
        method = METHODS[method].make(vars(options))
    return method.ranking is not None

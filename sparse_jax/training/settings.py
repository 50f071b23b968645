"""The settings of a fine-tuning run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from sparse_jax.data.causal_tokens import Loss
from sparse_jax.data.conversations import PROMPTS
from sparse_jax.data.glue import CAUSAL
from sparse_jax.errors import InputError
from sparse_jax.methods.registry import METHODS
from sparse_jax.models.activations import ACTIVATIONS
from sparse_jax.sharding.mesh import parse_mesh
from sparse_jax.supports.granularity import GRANULARITIES

__all__ = [
    "DTYPES",
    "LAYER_DEFAULTS",
    "SAMPLER_OPTIONS",
    "Settings",
    "require_method",
    "require_sampler",
    "require_word",
]

DTYPES = ("float32", "bfloat16")
RECOMPUTE = ("none", "frozen", "all")
# sampler -> the options that belong to it, beside those of all samplers
SAMPLER_OPTIONS = {
    "ist": ("active", "hold", "probe_every", "importance_rate"),
    "uniform": ("active", "hold"),
    "cyclic": ("active", "hold"),
    "fixed": ("active", "hold", "layer_weights"),
    "static": ("layers",),
    "norm": ("active", "hold"),
}
LAYER_DEFAULTS = {
    "active": 0.25, "hold": 1, "layers": None, "layer_weights": None, "probe_every": 10,
    "importance_rate": 10.0, "restart_layers": False, "recompute": "none",
}  # fmt: skip
_POSITIVE = ("rank", "batch_size", "accumulate", "epochs", "save_every", "keep")
_POSITIVE_IF_GIVEN = (
    "max_steps", "max_length", "learning_rate", "alpha", "size", "prefix_length",
)  # fmt: skip
# Of the task causal, without a value of their own.
_TEXT = {"loss_on": None, "packing": False, "template": None, "held_out": None}
# Options without a value of their own, so that giving them means something.
_LEFT_OUT = {
    "where": None, "alpha": None, "rslora": False, "dropout": None, "size": None,
    "activation": None, "prefix_length": None, "granularity": "entry",
}  # fmt: skip


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
    task: str  # as `sparse_jax.data.TASKS`
    output: str  # run directory, to be created
    data: str | None = None  # file or folder; None asks the Hub for GLUE
    loss_on: str | None = None  # response or all; None is response; causal
    packing: bool = False  # whether several texts share a row; causal
    template: str | None = None  # a word of PROMPTS; None is alpaca; causal
    held_out: float | None = (
        None  # share of a file for validation; None is 0.05; causal
    )
    drop_unlabeled: bool = False  # whether to leave out rows without a label
    method: str = "sift"  # a word of METHODS
    density: float = 0.008  # fraction of entries trained, in (0, 1]; sparse methods
    granularity: str = "entry"  # or lane: of every 128 rows of a column
    rank: int = 8  # of the added products; lora and dora
    alpha: float | None = None  # products are scaled by alpha / rank; None is 2 * rank
    rslora: bool = False  # whether alpha is divided by the root of the rank
    dropout: float | None = None  # before the products, in [0, 1); None is 0
    size: int | None = None  # of a bottleneck; None is 64; series and parallel
    activation: str | None = None  # of a bottleneck; None is relu
    prefix_length: int | None = None  # keys and values of a prefix; None is 16
    where: tuple[str, ...] | None = None  # trained leaves; sites if arrays are added
    dense: tuple[str, ...] | None = None  # leaves trained in full; None is the head
    sampler: str | None = None  # which layers an update trains; None is all of them
    active: float = 0.25  # fraction of the layers that an update trains
    hold: int = 1  # updates that a choice of layers is kept for
    layers: tuple[int, ...] | None = None  # of the sampler "static"
    layer_weights: tuple[float, ...] | None = None  # of the sampler "fixed"
    probe_every: int = 10  # updates between two probes of the sampler "ist"
    importance_rate: float = 10.0  # how far such a probe moves the importance
    restart_layers: bool = False  # whether a layer that comes back starts afresh
    recompute: str = "none"  # layers that run again in the backward pass
    learning_rate: float | None = None  # peak; None is the method's usual one
    batch_size: int = 32  # examples per update
    accumulate: int = 1  # micro-batches that an update is computed in
    epochs: int = 3  # passes over the training examples
    max_steps: int | None = None  # updates after which to stop; None is no limit
    group_by_length: bool = False  # whether a batch's examples are of similar length
    max_length: int | None = None  # tokens; None is 128, or 512 of the task causal
    dtype: str = "float32"  # of the parameters
    checkpointing: bool = False  # whether to compute layers again in the backward pass
    mesh: str | None = None  # such as data=2,fsdp=4; None is one device
    seed: int = 0  # of the new head, the order of the examples, and dropout
    save_every: int = 500  # updates between two checkpoints, beside every epoch's
    keep: int = 2  # checkpoints, the newest ones
    overwrite: bool = False  # whether to replace an earlier run
    resume: bool = False  # whether to continue an interrupted run

    def __post_init__(self):
        require_word("method", self.method, tuple(METHODS))
        require_word("dtype", self.dtype, DTYPES)
        require_word("granularity", self.granularity, tuple(GRANULARITIES))
        for name in (
            "rank",
            "batch_size",
            "accumulate",
            "epochs",
            "save_every",
            "keep",
        ):
            _require_positive(name, getattr(self, name))
        for name in _POSITIVE_IF_GIVEN:
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        self._require_consistent()
        if self.mesh is not None:
            parse_mesh(self.mesh)
        self._require_text()
        self._require_layers()

    @property
    def resolved_learning_rate(self) -> float:
        """Peak learning rate."""
        if self.learning_rate is None:
            return METHODS[self.method].learning_rate
        return self.learning_rate

    @property
    def is_causal(self) -> bool:
        """Whether the task is to continue texts."""
        return self.task.lower() == CAUSAL

    @property
    def resolved_loss_on(self) -> Loss:
        """Tokens that a causal language model is trained on."""
        return cast(Loss, self.loss_on or "response")

    @property
    def resolved_template(self) -> str:
        """Name of the prompt around an instruction."""
        return self.template or "alpaca"

    @property
    def resolved_held_out(self) -> float:
        """Share of a file that is not trained on."""
        return 0.05 if self.held_out is None else self.held_out

    def _require_text(self) -> None:
        """Raises if a setting of the task causal breaks a rule."""
        for name, left_out in _TEXT.items():
            if not self.is_causal and getattr(self, name) != left_out:
                raise InputError(
                    f"`{name}` must be left out with task {self.task!r}, got "
                    f"{getattr(self, name)!r}. It belongs to {CAUSAL}."
                )
        if self.is_causal and self.drop_unlabeled:
            raise InputError(
                f"`drop_unlabeled` must be left out with task {CAUSAL!r}, got True. "
                "Its texts have no labels."
            )
        require_word("loss_on", self.resolved_loss_on, ("response", "all"))
        require_word("template", self.resolved_template, tuple(PROMPTS))
        if not 0 < self.resolved_held_out < 1:
            raise InputError(
                f"`held_out` must be in (0, 1), got {self.held_out}. It is the share "
                "of the examples that a run is judged on, commonly 0.05."
            )
        if self.packing and self.group_by_length:
            raise InputError(
                "`group_by_length` must be left out with packing, got True. All packed "
                "rows have one length."
            )
        if self.is_causal and self.method == "head":
            raise InputError(
                f"`method` must not be 'head' with task {CAUSAL!r}: the model has no "
                "new head. Use lora or sift, or --dense '^lm_head/' with full."
            )

    def _require_consistent(self) -> None:
        """Raises if two settings contradict each other."""
        if not 0 <= self.seed < 2**32:
            raise InputError(f"`seed` must be in [0, 2**32), got {self.seed}.")
        if not 0 < self.density <= 1:
            raise InputError(
                f"`density` must be in (0, 1], got {self.density}. It is the fraction "
                "of entries trained, so training 1% of them is 0.01."
            )
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(
                f"`dropout` must be in [0, 1), got {self.dropout}. It is the fraction "
                "of entries left out, commonly 0.05."
            )
        if self.activation is not None:
            require_word("activation", self.activation, tuple(ACTIVATIONS))
        for name, left_out in _LEFT_OUT.items():
            if getattr(self, name) != left_out:
                require_method(name, getattr(self, name), self.method)
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

    def _require_layers(self) -> None:
        """Raises if the choice of layers breaks a rule."""
        if self.sampler is not None:
            require_word("sampler", self.sampler, tuple(SAMPLER_OPTIONS))
        require_word("recompute", self.recompute, RECOMPUTE)
        for name in ("hold", "probe_every", "importance_rate"):
            _require_positive(name, getattr(self, name))
        if not 0 < self.active <= 1:
            raise InputError(
                f"`active` must be in (0, 1], got {self.active}. It is the fraction of "
                "the layers that an update trains, commonly 0.25."
            )
        for name, left_out in LAYER_DEFAULTS.items():
            if getattr(self, name) != left_out:
                require_sampler(name, getattr(self, name), self.sampler)
        for sampler, name in (("static", "layers"), ("fixed", "layer_weights")):
            if self.sampler == sampler and not getattr(self, name):
                raise InputError(
                    f"`{name}` must be given with sampler {sampler!r}, got none."
                )
        if self.sampler is not None and self.method == "head":
            raise InputError(
                "`sampler` must be left out with method 'head', which trains no layer, "
                f"got {self.sampler!r}."
            )


def require_method(name: str, value: Any, method: str) -> None:
    """Raises `InputError` unless a method has an option."""
    if name in METHODS[method].options:
        return
    owners = [word for word, entry in METHODS.items() if name in entry.options]
    remedy = "; use `dense` to choose whole parameters" if name == "where" else ""
    raise InputError(
        f"`{name}` must be left out with method {method!r}, got {value!r}. It belongs "
        f"to {', '.join(owners)}{remedy}."
    )


def require_sampler(name: str, value: Any, sampler: str | None) -> None:
    """Raises `InputError` unless a sampler of layers, None for none, has an option."""
    of_all = ("restart_layers", "recompute") if sampler else ()
    if name in (*of_all, *SAMPLER_OPTIONS.get(sampler or "", ())):
        return
    owners = [word for word, names in SAMPLER_OPTIONS.items() if name in names]
    place = f"with sampler {sampler!r}" if sampler else "without a sampler of layers"
    raise InputError(
        f"`{name}` must be left out {place}, got {value!r}. It belongs to the samplers "
        f"{', '.join(owners or SAMPLER_OPTIONS)}."
    )


def require_word(name: str, word: str, words: Sequence[str]) -> None:
    """Raises `InputError` unless a setting is one of some words."""
    if word not in words:
        raise InputError(f"`{name}` must be one of {', '.join(words)}, got {word!r}.")


def _require_positive(name: str, value: float) -> None:
    """Raises unless a setting is a number above zero."""
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"`{name}` must be positive, got {value}.")

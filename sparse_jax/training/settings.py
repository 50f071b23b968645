"""The settings of a fine-tuning run: the options of `sparse-jax finetune`."""

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sparse_jax.data.glue import CAUSAL, TASKS
from sparse_jax.data.sources import as_source, is_own_rows, place_of
from sparse_jax.errors import InputError, brief
from sparse_jax.methods.lookup import learning_rate_of, word_of
from sparse_jax.methods.registry import METHODS, USUAL, MethodOptions
from sparse_jax.params.fields import (
    Option,
    checked,
    one_of,
    options_of,
    require_word,
    required,
    setting,
    to_json,
)
from sparse_jax.params.positive import require_positive
from sparse_jax.samplers.registry import SAMPLERS, SamplerOptions, word_of_sampler
from sparse_jax.training.data_options import DataOptions
from sparse_jax.training.evaluation_options import EvaluationOptions
from sparse_jax.training.recipe_options import RecipeOptions

# JAX takes seconds to import, and the help of the command line reads these fields.
if TYPE_CHECKING:
    from sparse_jax.methods.method import Method
    from sparse_jax.samplers.sampler import Sampler

__all__ = ["OWN", "Settings", "setting_options"]

OWN = "own"  # recorded for an optimizer or rows, which a file cannot hold

DTYPES = ("float32", "bfloat16")
HEAD_BIASES = ("labels", "zeros")
_POSITIVE = (
    "batch_size", "accumulate", "epochs", "save_every", "patch_every", "keep",
    "max_steps", "max_length", "max_train_samples", "learning_rate", "select_batches",
    "reselect_every", "buffer_size",
)  # fmt: skip
_PATHS = ("model", "output", "data", "adapter", "kl_text")
# Words for objects, or objects: other checks say which there are.
_WORDS = (
    "data", "method", "sampler", "optimizer", "score", "granularity", "activation",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(
    MethodOptions, SamplerOptions, DataOptions, EvaluationOptions, RecipeOptions
):
    """What `finetune` does: the options of `sparse-jax finetune`, one to one.

    In Python `method` and `sampler` may also be objects, which bring their own options
    with them, `optimizer` an Optax transformation, and places paths. A method without
    `dense` trains the head in full.

    Raises:
      InputError: naming the option, if a value has another type or breaks its rule.

    Example:
      >>> Settings(model="bert", task="mrpc", output="run").resolved_learning_rate
      0.0007
      >>> from sparse_jax import LoRA
      >>> run = {"model": "bert", "task": "mrpc", "output": "run"}
      >>> Settings(**run, method=LoRA(rank=4)).record()["method"]["rank"]
      4
    """

    model: str = required(
        "Pre-trained model: a folder, or an id on the Hugging Face Hub."
    )
    task: str = required(
        f"GLUE task, or task for your own data: {', '.join(TASKS)}; or causal, for "
        "causal language modeling."
    )
    output: str = required("Folder to create for the results.")
    method: "str | Method" = setting("sift", f"What to train: {one_of(METHODS)}.")
    dense: tuple[str, ...] | None = setting(
        None,
        "Regular expression of parameters to train in full; may be repeated.",
        "the head",
    )
    adapter: str | None = setting(
        None,
        "Adapter to continue from: a file, or the folder of a run or of a PEFT "
        "adapter. The new adapter includes it.",
        "none",
    )
    avoid: tuple[str, ...] | None = setting(
        None,
        "Adapter file, or folder of a run, whose entries must not be trained, so that "
        "both adapters can be used at once; may be repeated.",
        "none",
    )
    sampler: "str | Sampler | None" = setting(
        None,
        "Train a few layers at a time, chosen "
        + "; ".join(f"{entry.help} ({word})" for word, entry in SAMPLERS.items())
        + ".",
        "all layers",
    )
    batch_size: int = setting(32, "Examples per update; rows with --packing.")
    accumulate: int = setting(1, "Micro-batches per update: more of them save memory.")
    epochs: int = setting(3, "Passes over the training examples.")
    max_steps: int | None = setting(None, "Maximum number of updates.", "no limit")
    group_by_length: bool = setting(
        False,
        "Batch examples of similar length: less padding, but batches are no longer "
        "random, which costs accuracy.",
    )
    max_length: int | None = setting(
        None,
        "Maximum number of tokens per example; longer ones are truncated.",
        "128, for causal 512",
    )
    dtype: str = setting("float32", f"Dtype of the parameters: {one_of(DTYPES)}.")
    split_masters: bool = setting(
        False,
        "Store 16 more bits per trained bfloat16 weight instead of a float32 master: "
        "half the bytes for the same values, but an update also reads the weights.",
    )
    select_after: float = setting(
        0.0,
        "Updates of only the head, and of what else is trained in full, before sift "
        "selects entries: a fraction if below 1, otherwise a number.",
    )
    select_batches: int = setting(
        1,
        "Batches whose gradients are summed to select entries. What enters each layer "
        "is kept for all of them.",
    )
    reselect_every: int | None = setting(
        None,
        "Updates between selections of entries; entries in both keep their moments.",
        "one selection",
    )
    head_bias: str = setting(
        HEAD_BIASES[0],
        "Initial bias of a new head: labels (the mean of the training labels, or the "
        "log odds of the classes) or zeros.",
    )
    checkpointing: bool = setting(
        False, "Rematerialize every layer in the backward pass, to save memory."
    )
    mesh: str | None = setting(
        None,
        "Devices along the axes data (replicas), fsdp (sharded weights), tensor "
        "(tensor parallelism) and sequence (sharded rows), such as data=2,fsdp=4.",
        "one device",
    )
    seed: int = setting(0, "Seed of the new head, the order of examples, and dropout.")
    save_every: int = setting(
        500, "Updates between checkpoints; there is also one at the end of every epoch."
    )
    patch_every: int | None = setting(
        None,
        "Updates between patches of the changed weights for an inference server.",
        "none",
    )
    keep: int = setting(2, "Checkpoints to keep; older ones are deleted.")
    no_cache: bool = setting(
        False,
        "Neither read nor write the cache of compiled programs and tokens, which is in "
        "the user's cache folder, or in the folder SPARSE_JAX_CACHE.",
    )
    report_to: tuple[str, ...] | None = setting(
        None,
        "Also log to tensorboard, wandb, or a tracker added with `register_tracker`; "
        "may be repeated.",
        "only metrics.jsonl",
    )
    overwrite: bool = setting(False, "Replace the run in the output folder.")
    resume: bool = setting(False, "Continue the interrupted run in the output folder.")
    dry_run: bool = setting(
        False,
        "Check settings, data and model, print what would be trained, and stop "
        "without writing anything.",
    )

    def __post_init__(self):
        for name, one in setting_options().items():
            value = getattr(self, name)
            if name in _PATHS and isinstance(value, os.PathLike):
                value = os.fspath(value)
            if name not in _WORDS or value is None:
                object.__setattr__(self, name, checked(one, value))
            elif name == "data" and value is not None:
                object.__setattr__(self, name, as_source(value))
        require_word("method", self.method_word, METHODS)
        require_word("dtype", self.dtype, DTYPES)
        after = self.select_after
        if not after >= 0 or (after > 1 and after % 1):
            raise InputError(
                "`select_after` must be a fraction of the updates in [0, 1), or a "
                f"number, got {after}. Leave it out to choose at once."
            )
        require_word("head_bias", self.head_bias, HEAD_BIASES)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None:
                require_positive(name, value)
        self._require_consistent()
        self.require_data_options(self.task)
        if self.is_causal and self.method_word == "head":
            raise InputError(
                f"`method` must not be 'head' with task {CAUSAL!r}: the model has no "
                "new head. Use lora or sift, or `dense='^lm_head/'` with full."
            )
        if self.packing and self.group_by_length:
            raise InputError(
                "`group_by_length` must be left out with `packing`, got True. All "
                "packed rows have one length."
            )
        self._require_stream()
        self._require_layers()
        self.require_recipe(self.task, self.method, self.sampler_word)
        self.require_update_in_backward(self._needing_all_gradients())
        self.require_evaluation_options(
            self.task, self.adapter, self.method, self.reselect_every, self.optimizer
        )
        if self.patch_every is not None and METHODS[self.method_word].adds_arrays:
            raise InputError(
                f"`patch_every` must be left out with method {self.method_word!r}, got "
                f"{self.patch_every}: it adds arrays, and a patch replaces entries of "
                "the base. Choose sift, or export the finished run."
            )

    @property
    def method_word(self) -> str:
        """The name of the method."""
        return self.method if isinstance(self.method, str) else word_of(self.method)

    @property
    def sampler_word(self) -> str | None:
        """The name of the sampler; None without one."""
        if self.sampler is None or isinstance(self.sampler, str):
            return self.sampler
        return word_of_sampler(self.sampler)

    @property
    def resolved_learning_rate(self) -> float | None:
        """Peak learning rate; None with an optimizer that brings its own."""
        if self.learning_rate is None and isinstance(self.optimizer, str):
            return learning_rate_of(self.method, vars(self))
        return self.learning_rate

    @property
    def is_causal(self) -> bool:
        """Whether the task is causal language modeling."""
        return self.task.lower() == CAUSAL

    def record(self) -> dict[str, object]:
        """Returns the settings as `config.json` holds them.

        Options that a method with a name has and that were left out are the usual
        ones. A method or sampler that is an object becomes a mapping of its `name` and
        its fields. Of an optimizer it only says that there was one.
        """
        record: dict[str, object] = {
            one.name: getattr(self, one.name) for one in fields(self)
        }
        if isinstance(self.method, str):
            record |= {n: usual for n, usual in USUAL.items() if record[n] is None}
        else:
            record["method"] = {"name": self.method_word, **self.method.to_settings()}
        if not isinstance(self.sampler, str | None):
            record["sampler"] = {"name": self.sampler_word, **to_json(self.sampler)}
        if not isinstance(self.optimizer, str):
            record["optimizer"] = OWN
        record["data"] = OWN if is_own_rows(self.data) else self.data
        return record

    def _require_consistent(self) -> None:
        """Raises if a setting breaks its rule, or two contradict each other."""
        from sparse_jax.sharding.mesh import parse_mesh

        self.require_method_options(self.method)
        self._require_objects()
        if not 0 <= self.seed < 2**32:
            raise InputError(f"`seed` must be in [0, 2**32), got {self.seed}.")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"`accumulate` must divide `batch_size`={self.batch_size}, got "
                f"{self.accumulate}. A batch is all examples of one update."
            )
        if self.overwrite and self.resume:
            raise InputError(
                "`overwrite` and `resume` must not be given together. The first "
                "starts over, the second continues."
            )
        if self.split_masters and self.dtype != DTYPES[1]:
            raise InputError(
                f"`split_masters` must be left out with dtype {self.dtype!r}, got "
                "True: such parameters are their own masters. Or set `dtype` to "
                "bfloat16."
            )
        if self.mesh is not None:
            parse_mesh(self.mesh)

    def _needing_all_gradients(self) -> dict[str, object]:
        """Returns the settings that go only with an update after the backward pass."""
        from sparse_jax.sharding.mesh import parse_mesh

        replicas = 1 if self.mesh is None else parse_mesh(self.mesh).data
        needing = {
            "accumulate": self.accumulate > 1,
            "sampler": self.sampler is not None,
            "mesh": replicas > 1,
            "method": self.method_word == "head",
        }
        return {name: getattr(self, name) for name, is_so in needing.items() if is_so}

    def _require_stream(self) -> None:
        """Raises if a setting asks of a stream what it cannot do."""
        usual = {one.name: one.default for one in fields(self)}
        if not self.streaming:
            if self.buffer_size != usual["buffer_size"]:
                raise InputError(
                    "`buffer_size` must come with `streaming`, got "
                    f"{self.buffer_size} alone."
                )
            return
        if not self.is_causal:
            raise InputError(
                f"`streaming` must be left out with task {self.task!r}, got True. It "
                f"belongs to {CAUSAL}."
            )
        if not isinstance(self.data, str | None):
            raise InputError(
                f"`data` must be a `.jsonl` file with `streaming`, got "
                f"{place_of(self.data)}. Write it to one, or leave out `streaming`."
            )
        if self.max_steps is None:
            raise InputError(
                "`max_steps` must be given with `streaming`, got nothing. A stream has "
                "no end: it starts over after the last record."
            )
        for name in ("epochs", "group_by_length", "max_train_samples"):
            if getattr(self, name) != usual[name]:
                raise InputError(
                    f"`{name}` must be left out with `streaming`, got "
                    f"{getattr(self, name)}. Its records are read a few at a time, for "
                    "`max_steps` updates."
                )

    def _require_layers(self) -> None:
        """Raises if the choice of layers breaks a rule."""
        if isinstance(self.sampler, str):
            require_word("sampler", self.sampler, SAMPLERS)
        self.require_sampler_options(self.sampler)
        if self.sampler_word is not None and self.method_word == "head":
            raise InputError(
                "`sampler` must be left out with method 'head', which trains no layer, "
                f"got {self.sampler_word!r}."
            )

    def _require_objects(self) -> None:
        """Raises if an object and another setting contradict each other."""
        if not isinstance(self.method, str) and None not in (
            self.dense,
            self.method.dense,
        ):
            raise InputError(
                f"`dense` must be left out with a method that has its own, got "
                f"{brief(self.dense)}."
            )


def setting_options() -> dict[str, Option]:
    """Returns the fields that are options, with words for objects.

    Example:
      >>> setting_options()["sampler"].type
      <class 'str'>
    """
    objects = {"Method": str, "Sampler": str, "GradientTransformation": str}
    objects |= {"DataSource": str, "Loss": str}
    return options_of(Settings, **objects)

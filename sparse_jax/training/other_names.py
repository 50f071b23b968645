"""Names that options have elsewhere: in transformers, TRL, PEFT and LLaMA-Factory."""

import difflib
import re
from collections.abc import Iterable

__all__ = ["OTHER_NAMES", "name_hint"]

_ROWS = "nothing to set: every update is a row of metrics.jsonl"
_EXPORT = "a command of its own: `sparse-jax export RUN --to merged --push NAME`"
_ABSENT = "not supported"
# Name elsewhere -> what it is here: an option and what to know of it, or a reason. The
# documents have the same pairs in their tables.
OTHER_NAMES = {
    "adam_beta1": "--betas",
    "adam_beta2": "--betas",
    "adam_epsilon": "--eps",
    "additional_target": "--dense",
    "assistant_only_loss": "--loss-on response",
    "badam_switch_interval": "--hold",
    "bf16": "--dtype bfloat16",
    "completion_only_loss": "--loss-on response",
    "cutoff_len": "--max-length",
    "dataset": "--data",
    "dataset_dir": "--data",
    "dataset_text_field": "--columns text=NAME",
    "deepspeed": "--mesh",
    "do_predict": "a command of its own: `sparse-jax predict`",
    "enable_liger_kernel": "nothing to set",
    "eval_dataset": "--eval-data",
    "eval_steps": "--eval-every",
    "eval_strategy": "--eval-every",
    "finetuning_type": "--method",
    "flash_attn": "nothing to set",
    "fp16": "--dtype bfloat16",
    "freeze_trainable_layers": "--sampler static",
    "gradient_accumulation_steps": "--accumulate, the parts of one --batch-size",
    "gradient_checkpointing": "--checkpointing",
    "greater_is_better": "nothing to set: it is known from the metric",
    "interleave_probs": "--data, such as a.jsonl=0.7,b.jsonl=0.3",
    "ist": "--sampler ist",
    "label_smoothing_factor": "--label-smoothing",
    "layers_to_transform": "--sampler static",
    "load_in_4bit": _ABSENT,
    "logging_steps": _ROWS,
    "lora_alpha": "--alpha",
    "lora_dropout": "--dropout",
    "lora_r": "--rank",
    "lora_rank": "--rank",
    "lora_target": "--where",
    "lr": "--learning-rate",
    "lr_scheduler_type": "--schedule",
    "max_samples": "--max-train-samples",
    "max_seq_length": "--max-length",
    "model_name_or_path": "--model",
    "mix_strategy": "--data, such as a.jsonl=0.7,b.jsonl=0.3",
    "modules_to_save": "--dense",
    "neat_packing": "--packing",
    "neftune_noise_alpha": "--neftune-noise",
    "num_decay_steps": "--cooldown",
    "num_train_epochs": "--epochs",
    "optim": "--optimizer",
    "optimizer_in_bwd": "--update-in-backward",
    "output_dir": "--output",
    "overwrite_output_dir": "--overwrite",
    "peft_config": "--method",
    "per_device_eval_batch_size": "--batch-size, for evaluations too",
    "per_device_train_batch_size": "--batch-size, all examples of an update",
    "plot_loss": "nothing to set: curve.png is always drawn",
    "preprocessing_num_workers": "nothing to set",
    "push_to_hub": _EXPORT,
    "quantization_bit": _ABSENT,
    "resume_from_checkpoint": "--resume",
    "save_steps": "--save-every",
    "save_total_limit": "--keep",
    "stage": "--task",
    "target_modules": "--where",
    "train_dataset": "--data",
    "train_on_prompt": "--loss-on all",
    "use_badam": "--sampler cyclic",
    "use_dora": "--method dora",
    "use_rslora": "--rslora",
    "val_size": "--held-out",
    "warmup_ratio": "--warmup",
    "warmup_steps": "--warmup",
}
_OPTION = re.compile(r"--([a-z-]+)(?: (\w+(?:=\w+)?)(?=,|$))?")


def name_hint(name: str, known: Iterable[str], *, joined: str = "=") -> str:
    """Returns what an unknown option may have meant, as a sentence after a space.

    Args:
      name: the option, with `_` between words.
      known: names of the options that there are.
      joined: what stands between an option and its value; a space for options as they
        are typed on the command line.

    Example:
      >>> name_hint("lr", ["learning_rate"]), name_hint("bf16", ["dtype"])
      (' Here it is `learning_rate`.', ' Here it is `dtype=bfloat16`.')
      >>> name_hint("densty", ["density"]), name_hint("colour", ["density"])
      (" Did you mean 'density'?", '')
    """
    known = [*known]

    def written(found: re.Match[str]) -> str:
        option = found[1].replace("-", "_")
        shown = f"--{found[1]}" if joined == " " else option
        return f"`{shown}{joined}{found[2]}`" if found[2] else f"`{shown}`"

    here = OTHER_NAMES.get(name, "")
    if not here.startswith("--"):
        if here:
            return f" Here it is {here}."
    elif (first := _OPTION.match(here)) and first[1].replace("-", "_") in known:
        return f" Here it is {_OPTION.sub(written, here)}."
    close = difflib.get_close_matches(name, known, 1)
    if not close:
        return ""
    typed = f"--{close[0].replace('_', '-')}" if joined == " " else repr(close[0])
    return f" Did you mean {typed}?"

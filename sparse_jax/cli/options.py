"""The options of the commands, with their help, and what is checked of them."""

from collections.abc import Sequence
from typing import Any

import typer
from typer import Option

from sparse_jax.errors import InputError

__all__ = ["require_used", "take_devices"]


def take_devices(
    devices: int | None,
    *,
    mesh: str | None = None,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Prepares JAX for a command; comes before all else.

    Args:
      devices: number to simulate on the CPU of this process; None takes what there is.
      mesh: what the devices are for; without one a single device is used.
      distributed: whether other processes run the same command.
      coordinator, processes, process: as for `join_processes`; each implies
        `distributed`.

    Raises:
      InputError: if a number is out of range, nothing uses the devices, or JAX has
        another kind of device.
    """
    if devices is not None and devices < 1:
        raise InputError(f"`devices` must be positive, got {devices}.")
    if devices is not None and devices > 1 and mesh is None:
        raise InputError(
            f"`devices` must come with a mesh, got {devices} and none. Say what they "
            f"are for, as in --mesh data={devices}."
        )
    given = (coordinator, processes, process)
    if devices is None and not distributed and given == (None, None, None):
        return
    import jax

    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    if distributed or given != (None, None, None):
        from sparse_jax.sharding.processes import join_processes, watch_processes

        join_processes(coordinator, processes, process)
        watch_processes()
    if devices is not None and jax.default_backend() != "cpu":
        raise InputError(
            f"`devices` must be left out where there are real ones, got {devices} and "
            f"{jax.device_count()} of kind {jax.default_backend()}. Set "
            "JAX_PLATFORMS=cpu to simulate some all the same."
        )


def require_used(
    context: typer.Context, runs: Sequence[tuple[str, str | None]]
) -> None:
    """Raises for an option that no run of a command has.

    `Settings` have a rank whatever the method, so that programs can share them. On the
    command line an option without an effect is a mistake, even at its default.

    Args:
      context: the options of the command.
      runs: method and sampler of every run, not empty.

    Raises:
      InputError: naming the option and what it belongs to.
    """
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        refusals = [_refusal(name, value, *run) for run in runs]
        if refusals[0] is not None and all(refusals):
            raise refusals[0]


def _refusal(
    name: str, value: Any, method: str, sampler: str | None
) -> InputError | None:
    """Returns the error of an option that a run does not have."""
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.methods.registry import METHODS
    from sparse_jax.training import settings

    try:
        if any(name in entry.options for entry in METHODS.values()):
            settings.require_method(name, value, method)
        if name in settings.LAYER_DEFAULTS:
            settings.require_sampler(name, value, sampler)
    except InputError as error:
        return error
    return None


# Imported as a module: `options.MODEL`.
__all__: list[str] = []


def _option(text: str, default: str | None = None, **more: Any) -> Any:
    """Returns an option; `default` says what leaving it out means."""
    if default is None:
        return Option(help=text, **more)
    return Option(help=f"{text}  [default: {default}]", show_default=False, **more)


def _flag(name: str, text: str) -> Any:
    """Returns an option that is given or not."""
    return Option(name, help=text)


MODEL = _option("Folder of a pre-trained model, or its id on the Hub.")
TASK = _option(
    "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte; classification, multilabel or "
    "regression with data of your own; or causal: to continue texts."
)
OUTPUT = _option("Folder to create for everything that comes out.")
DATA = _option(
    "Folder with train and dev files (TSV, CSV, JSON, JSON lines); for causal a file "
    "of instructions, chats (JSON, JSON lines) or text.",
    "GLUE from the Hub",
)
LOSS_ON = _option("Tokens that causal trains on: response or all.", "response")
PACKING = _flag("--packing", "Put several texts in a row, each seeing only itself.")
TEMPLATE = _option("Prompt around an instruction: alpaca or llm_adapters.", "alpaca")
HELD_OUT = _option("Share of a file of texts that the run is judged on.", "0.05")
DROP_UNLABELED = _flag(
    "--drop-unlabeled",
    "Leave out rows without a label: absent, null, NaN, - or, for classes, -1.",
)
_METHODS = (
    "full, head, bitfit, lora, dora, series, parallel, ia3, prefix, sift, random or "
    "magnitude."
)
METHOD = _option(_METHODS)
DENSITY = _option("Fraction of entries that sift, random and magnitude train.")
GRANULARITY = _option(
    "What sift, random and magnitude choose from: entry (all of a matrix) or lane "
    "(every 128 rows of a column, for TPUs)."
)
RANK = _option("Rank of the matrices that lora and dora add.")
ALPHA = _option(
    "What lora and dora add is scaled by alpha divided by the rank.", "twice the rank"
)
RSLORA = _flag("--rslora", "Divide alpha by the square root of the rank instead.")
DROPOUT = _option("Fraction of the input of lora and dora that is left out.", "0")
SIZE = _option("Width of the bottlenecks that series and parallel add.", "64")
ACTIVATION = _option(
    "In the bottlenecks of series and parallel: relu, gelu, silu or tanh.", "relu"
)
PREFIX_LENGTH = _option("Keys and values that prefix adds to a layer.", "16")
_WHERE = (
    "query, key, value and output of the attention; for series attention/output and "
    "mlp/down; for parallel mlp/down; for ia3 key and value"
)
WHERE = _option(
    "Parameters that a sparse method trains, or sites that others add to; may be "
    "repeated.",
    _WHERE,
    metavar="<regex>",
)
DENSE = _option(
    "Parameters trained in full; may be repeated.",
    "the head",
    metavar="<regex>",
)
IST = _flag("--ist", "Train the layers that matter: the same as --sampler ist.")
SAMPLER = _option(
    "Which layers an update trains: ist, uniform, cyclic, fixed, static or norm.", "all"
)
ACTIVE = _option("Fraction of the layers that an update trains.")
HOLD = _option("Updates that a choice of layers is kept for.")
LAYERS = _option(
    "Layer, from 0, that the sampler static trains; may be repeated.",
    "none",
    metavar="<int>",
)
LAYER_WEIGHTS = _option(
    "How often the sampler fixed draws a layer; once for every layer.",
    "none",
    metavar="<float>",
)
PROBE_EVERY = _option("Updates between two probes of ist.")
IMPORTANCE_RATE = _option("How far a probe moves the importance.")
RESTART_LAYERS = _flag(
    "--restart-layers", "Start the optimiser of a layer afresh when it comes back."
)
RECOMPUTE = _option(
    "Layers that run again in the backward pass, to save memory: none, frozen or all."
)
LEARNING_RATE = _option(
    "Peak of the learning rate, reached after 6 % of the updates; it then falls to 0.",
    "3e-5 for full, 7e-4 for sift, random and magnitude, 3e-3 for ia3, 1e-2 for "
    "prefix, 1e-3 for others",
)
BATCH_SIZE = _option("Examples per update.")
ACCUMULATE = _option("Parts that a batch is computed in, to save memory.")
EPOCHS = _option("Passes over the training examples.")
MAX_STEPS = _option("Updates after which to stop.", "no limit")
GROUP_BY_LENGTH = _flag(
    "--group-by-length",
    "Batch examples of similar length: less padding, but batches that are no longer "
    "random, which costs accuracy.",
)
MAX_LENGTH = _option(
    "Most tokens of an example; the rest is cut off.", "128, for causal 512"
)
DTYPE = _option("Type of the parameters: float32 or bfloat16.")
CHECKPOINTING = _flag(
    "--checkpointing", "Compute layers again in the backward pass, to save memory."
)
MESH = _option(
    "Devices along the axes data (replicas), fsdp (weights in parts) and tensor "
    "(layers in parts), such as data=2,fsdp=4.",
    "one device",
)
DEVICES = _option("Number of devices to simulate on the CPU, to try a mesh.", "none")
DISTRIBUTED = _flag(
    "--distributed", "This is one of several processes, as a TPU pod or SLURM says."
)
COORDINATOR = _option("Host and port of the first of several processes.", "none")
PROCESSES = _option("How many processes there are.", "1")
PROCESS = _option("Which of them this one is, from 0.", "0")
SEED = _option("Seed of the new head, the order of the examples, and dropout.")
SAVE_EVERY = _option("Updates between two checkpoints, beside every epoch's.")
KEEP = _option("Checkpoints to keep, the newest ones.")
OVERWRITE = _flag("--overwrite", "Replace the run in the output folder.")
RESUME = _flag("--resume", "Continue the interrupted run in the output folder.")

PLANNED_MODEL = _option("Folder or id of a model, or its config.json: no weights.")
PLANNED_METHOD = _option(_METHODS, "sift")
COMPARE = _option(
    "Methods to show side by side, such as full,lora,sift,sift+ist.", "--method alone"
)
PLANNED_WHERE = _option(
    "Parameters that a sparse method trains, or sites that others add to; may be "
    "repeated. In a comparison for the sparse methods only.",
    _WHERE,
    metavar="<regex>",
)
LENGTH = _option("Tokens of every example.", "2048, or the positions if fewer")
TARGET = _option(
    "What to compile for: cpu, gpu, or TPUs such as v5e:4x4, v6e:8x8 or v5p:2x2x1, "
    "which need not be here."
)
LARGEST_BATCH = _flag(
    "--largest-batch/--no-largest-batch", "Compile again to find the largest batch."
)
JSON = _option("File to write the plan to, in bytes and seconds.", "none")

ADAPTER = _option("Adapter file, or the folder of a run.")
_NAMED_BASE = "the adapter's, if it is on this machine"
BASE = _option("Folder or id of the base model.", _NAMED_BASE)
ADAPTER_TASK = _option("Task to evaluate on.", "the one it was trained on")
BATCH = _option("Examples at a time.", "as in training")
ADAPTER_LENGTH = _option("Most tokens of an example.", "as in training")

DECODER = _option("Folder of a pre-trained decoder, or its id on the Hub.", _NAMED_BASE)
PROMPT = _option("Text to continue; may be repeated.", "none", metavar="<str>")
PROMPT_FILE = _option("File of texts to continue, one a line.", "none")
CHAT = _flag("--chat", "Put a text as a message, in the tokenizer's chat template.")
PROMPT_TEMPLATE = _option(
    "Prompt to put a text in, as an instruction: alpaca or llm_adapters.", "none"
)
MAX_NEW_TOKENS = _option("Most tokens to write.")
TEMPERATURE = _option("Draw tokens at random; below 1 prefers likely ones.", "greedy")
TOP_K = _option("Draw among this many likeliest tokens.", "all")
TOP_P = _option("Draw among the likeliest tokens that add up to this.", "all")
BEAMS = _option("Search for the likeliest text, with this many at a time.", "greedy")
LENGTH_PENALTY = _option("Exponent of the length in the score of a beam.", "1")
STOP = _option(
    "Text, or the id of a token, that also ends what is written and is left out of "
    "it; may be repeated.",
    "the model's own",
    metavar="<str>",
)
DRAW_SEED = _option("Seed of the tokens that are drawn at random.")

"""The command `sparse-jax plan`."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

import typer

from sparse_jax.cli.json_file import require_json_place
from sparse_jax.cli.options import (
    CONFIG,
    IST,
    choose_settings,
    flag,
    named_on_command_line,
    option,
    require_used,
    takes_settings,
)
from sparse_jax.data.glue import CAUSAL
from sparse_jax.errors import InputError
from sparse_jax.methods.registry import METHODS, MethodOptions
from sparse_jax.planning.choices import CHOICES
from sparse_jax.samplers.registry import (
    SAMPLERS,
    SamplerOptions,
    options_of_sampler,
)
from sparse_jax.training.settings import Settings

__all__ = ["plan"]

# Those that an update depends on most; a file may have the others.
_SETTINGS = (
    "model", "method", "density", "granularity", "rank", "where", "sampler", "active",
    "recompute", "batch_size", "accumulate", "dtype", "select_batches", "checkpointing",
    "split_masters", "moment_dtype", "update_in_backward", "max_grad_norm", "clip_by",
    "mesh",
)  # fmt: skip
# What a comparison chooses.
_CHOICES = ("method", "sampler", "ist")


@takes_settings(*_SETTINGS, defaults={"batch_size": 1, "dtype": "bfloat16"})
def plan(
    *,
    context: typer.Context,
    compare: str | None = option(
        None,
        "Methods to compare side by side, such as full,lora,sift,sift+ist, each with "
        "the options that apply to it (--where only to sparse methods). Append a "
        "sampler or any of these: "
        f"{', '.join(CHOICES)}.",
        "--method alone",
    ),
    config: str | None = CONFIG,
    ist: bool = IST,
    length: int | None = option(
        None,
        "Tokens per example.",
        "the max_length of --config, else 2048 or the most that the model takes",
    ),
    target: str = option(
        "cpu",
        "What to compile for: cpu, the gpu of this machine, or TPUs such as v5e:4x4, "
        "v6e:8x8 or v5p:2x2x1, which need not be present.",
    ),
    largest_batch: bool | None = flag(
        "--largest-batch/--no-largest-batch",
        "Find the largest batch that fits, by compiling again.",
        None,
        "on, but off with --compare",
    ),
    json: str | None = option(
        None, "JSON file to write the plan to, in bytes and seconds.", "none"
    ),
    **settings: Any,
) -> None:
    """Print what one update needs, without running it.

    Only the config.json of the model is read, not its weights.
    """
    require_json_place(json)
    if target != "gpu":
        # Nothing runs; looking for accelerators takes long, and may take them.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # JAX takes seconds to import, and `--help` has to be quick.
    import jax

    from sparse_jax.cli.plan_table import print_plans, write_plans
    from sparse_jax.planning.abstract import read_model
    from sparse_jax.planning.plan import make_plan, with_largest_batch
    from sparse_jax.planning.target import find_target
    from sparse_jax.sharding.mesh import MeshShape, parse_mesh

    given = choose_settings(context, settings, config, ist)
    # A run needs them, and an update does not.
    given = {"task": CAUSAL, **given, "output": ""}
    shape = parse_mesh(mesh) if (mesh := given.pop("mesh")) else MeshShape()
    # Once JAX is initialized, as in a notebook, the number of devices is fixed.
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", shape.size)
    if compare is None:
        runs = [Settings(**given)]
    else:
        _require_alone(compare, named_on_command_line(context))
        runs = [_compared(word.strip(), given) for word in compare.split(",")]
    require_used(context, runs)
    found = find_target(target, shape.size)
    model = read_model(runs[0].model, runs[0].task)
    length = given.get("max_length") if length is None else length
    length = min(2048, model.config.max_positions) if length is None else length
    place: Any = {"length": length, "shape": shape, "target": found}
    plans = [make_plan(model, run, **place) for run in runs]
    if largest_batch is None:
        largest_batch = compare is None
    if largest_batch:
        plans = [
            with_largest_batch(model, run, one, **place)
            for run, one in zip(runs, plans, strict=True)
        ]
    print_plans(plans, found, shape, (runs[0].batch_size, length))
    if json is not None:
        asked = {name: given[name] for name in given if name not in _CHOICES}
        write_plans(json, plans, found, shape, {**asked, "length": length})


def _require_alone(compare: str, named: Mapping[str, object]) -> None:
    """Raises if methods to compare come with another one."""
    if {*_CHOICES} & named.keys():
        raise InputError(
            f"`compare` must be all methods, such as lora,sift+ist, got {compare!r} "
            "with --method, --sampler or --ist. Leave these out."
        )


def _compared(word: str, given: Mapping[str, Any]) -> Settings:
    """Returns the settings of a method in a comparison, with the options it has."""
    method, *others = word.split("+")
    samplers = [one for one in others if one in SAMPLERS]
    # Of two granularities, say, a plan can have one.
    chooses = [name for one in others for name in CHOICES.get(one, ["sampler"])]
    is_known = method in METHODS and {*others} <= {*SAMPLERS, *CHOICES}
    if not is_known or len({*chooses}) < len(chooses):
        raise InputError(
            f"`compare` must be methods separated by commas, such as full,lora,sift or "
            f"sift+ist, got {word!r}. Methods are {', '.join(METHODS)}. To each may "
            f"be added a sampler and {', '.join(CHOICES)}, one of a kind."
        )
    sampler = samplers[0] if samplers else None
    known = {*METHODS[method].options, *options_of_sampler(sampler)}
    # A rule of parameters means nothing to a method that goes by modules.
    known -= set() if "density" in known else {"where"}
    owned = {one.name for one in (*fields(MethodOptions), *fields(SamplerOptions))}
    kept = {name: given[name] for name in given if name in known or name not in owned}
    chosen: dict[str, Any] = {"method": method, "sampler": sampler}
    for one in others:
        chosen |= CHOICES.get(one, {})
    # An update in the backward pass that does not clip has no norm to clip by.
    if kept.get("max_grad_norm") == 0:
        chosen.pop("clip_by", None)
    return Settings(**{**kept, **chosen})

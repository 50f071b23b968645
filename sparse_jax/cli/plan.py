"""The command `sparse-jax plan`."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_jax.cli import options
from sparse_jax.cli.options import require_used
from sparse_jax.errors import InputError

if TYPE_CHECKING:
    from sparse_jax.training.settings import Settings

__all__ = ["plan"]


def plan(
    context: typer.Context,
    model: Annotated[str, options.PLANNED_MODEL],
    method: Annotated[str | None, options.PLANNED_METHOD] = None,
    compare: Annotated[str | None, options.COMPARE] = None,
    density: Annotated[float, options.DENSITY] = 0.008,
    granularity: Annotated[str, options.GRANULARITY] = "entry",
    rank: Annotated[int, options.RANK] = 8,
    where: Annotated[list[str] | None, options.PLANNED_WHERE] = None,
    ist: Annotated[bool, options.IST] = False,
    active: Annotated[float, options.ACTIVE] = 0.25,
    recompute: Annotated[str, options.RECOMPUTE] = "none",
    batch_size: Annotated[int, options.BATCH_SIZE] = 1,
    accumulate: Annotated[int, options.ACCUMULATE] = 1,
    length: Annotated[int | None, options.LENGTH] = None,
    dtype: Annotated[str, options.DTYPE] = "bfloat16",
    checkpointing: Annotated[bool, options.CHECKPOINTING] = False,
    mesh: Annotated[str | None, options.MESH] = None,
    target: Annotated[str, options.TARGET] = "cpu",
    largest_batch: Annotated[bool, options.LARGEST_BATCH] = True,
    json: Annotated[str | None, options.JSON] = None,
) -> None:
    """Print what an update needs, on devices you need not have."""
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

    shape = MeshShape() if mesh is None else parse_mesh(mesh)
    # A JAX that runs already, as in a notebook, has the devices that it has.
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", shape.size)
    shared = {
        "batch_size": batch_size,
        "accumulate": accumulate,
        "dtype": dtype,
        "checkpointing": checkpointing,
        "rank": rank,
        "density": density,
        "where": tuple(where) if where else None,
        "granularity": granularity,
        "active": active,
        "recompute": recompute,
    }
    if json is not None:
        _require_writable(json)
    words = _words(method, ist, compare)
    several = [_settings(model, word, len(words) > 1, shared) for word in words]
    require_used(context, [(one.method, one.sampler) for one in several])
    found = find_target(target, shape.size)
    base = read_model(model)
    if length is None:
        length = min(2048, base.config.max_positions)
    place: Any = {"length": length, "shape": shape, "target": found}
    plans = []
    for settings in several:
        one = make_plan(base, settings, **place)
        if largest_batch:
            one = with_largest_batch(base, settings, one, **place)
        plans.append(one)
    print_plans(plans, found, shape, (batch_size, length))
    if json is not None:
        asked = {"model": model, "length": length, **shared}
        write_plans(json, plans, found, shape, asked)


def _words(method: str | None, ist: bool, compare: str | None) -> list[str]:
    """Returns the methods to plan for."""
    from sparse_jax.methods.registry import METHODS
    from sparse_jax.training.settings import require_word

    if compare is None:
        method = method or "sift"
        require_word("method", method, tuple(METHODS))
        return [method + ("+ist" if ist else "")]
    if method is not None or ist:
        raise InputError(
            f"`compare` must be all methods, such as lora,sift+ist, got {compare!r} "
            "beside --method or --ist. Leave these out."
        )
    return [word.strip() for word in compare.split(",")]


def _require_writable(path: str) -> None:
    """Raises if a plan, which may take minutes, could not be written."""
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise InputError(
            f"`json` must be a file in a folder that exists, got {path!r}."
        )


def _settings(
    model: str, word: str, is_compared: bool, shared: dict[str, Any]
) -> "Settings":
    """Returns the settings of a method, with those options that it has."""
    from sparse_jax.methods.registry import METHODS
    from sparse_jax.training.settings import Settings

    method, _, sampler = word.partition("+")
    if method not in METHODS or sampler not in ("", "ist"):
        raise InputError(
            f"`compare` must be methods with commas between, such as full,lora,sift or "
            f"sift+ist, got {word!r}. Methods are {', '.join(METHODS)}."
        )
    given = dict(shared)
    # A rule of leaves means nothing to a method that goes by sites.
    if is_compared and "density" not in METHODS[method].options:
        given |= {"where": None, "granularity": "entry"}
    if not sampler:
        del given["active"], given["recompute"]
    return Settings(
        model=model, task="causal", output="", method=method,
        sampler=sampler or None, **given,
    )  # fmt: skip

"""The command `sparse-jax inspect`."""

import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from sparse_jax.cli.json_file import require_json_place, write_json
from sparse_jax.cli.options import (
    CONFIG,
    IST,
    choose_settings,
    option,
    require_used,
    takes_settings,
)
from sparse_jax.data.glue import CAUSAL

if TYPE_CHECKING:
    from sparse_jax.methods.method import Method
    from sparse_jax.models.functional import Params
    from sparse_jax.samplers.sampler import Sampler

__all__ = ["inspect"]

_SETTINGS = (
    "model", "method", "density", "granularity", "rank", "size", "prefix_length",
    "where", "dense", "score", "sampler", "active", "layers",
)  # fmt: skip
_SITE = "/kernel"


class _Leaf(NamedTuple):
    """A row of the table."""

    name: str
    shape: tuple[int, ...]
    trained: int  # entries of the leaf
    added: int  # parameters of what the method adds to its linear map

    @property
    def size(self) -> int:
        """Parameters of the model in it."""
        return math.prod(self.shape) if self.shape else 0


@takes_settings(*_SETTINGS)
def inspect(
    *,
    context: typer.Context,
    config: str | None = CONFIG,
    ist: bool = IST,
    json: str | None = option(None, "File to write the list to.", "none"),
    **settings: Any,
) -> None:
    """List the parameters of a model, and what a method trains of each.

    The names are those that --where and --dense match. Layers are stacked: the first
    axis of their shapes is the layer. Only the config.json of the model is read, not
    its weights.
    """
    require_json_place(json)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # JAX takes seconds to import, and `--help` has to be quick.
    from sparse_jax.models.causal_lm import CausalLM
    from sparse_jax.planning.abstract import read_model
    from sparse_jax.training.build import head_rules, method_of, sampler_of
    from sparse_jax.training.settings import Settings

    given = choose_settings(context, settings, config, ist)
    # A run needs them, and a list does not.
    run = Settings(**{"task": CAUSAL, **given, "output": ""})
    require_used(context, [run])
    model = read_model(run.model, run.task)
    head = () if model.head is CausalLM else head_rules(("classifier",), ())
    method, params = method_of(run, head), model.abstract()
    sampler = sampler_of(run, model.config.num_layers)
    leaves = _leaves(method, params, sampler)
    layers = model.config.num_layers
    kind = f"{model.family.name} with {layers} layers"
    _print(leaves, run.method_word, kind)
    if sampler is not None:
        active = f"{run.sampler_word} trains {sampler.num_active} of the {layers}"
        print(f"{active} layers in an update.")
    if json is not None:
        rows = [{**leaf._asdict(), "parameters": leaf.size} for leaf in leaves]
        write_json(json, rows)


def _leaves(
    method: "Method", params: "Params", sampler: "Sampler | None"
) -> Sequence[_Leaf]:
    """Returns the rows of a method on parameters that are shapes."""
    import jax

    from sparse_jax.params.names import leaves_by_name
    from sparse_jax.supports.roles import is_role

    reached = lambda size: size if sampler is None else sampler.reached(size)
    added = jax.eval_shape(method.added, params, jax.random.key(0))
    sites = {
        f"{method.stack}/{site}{_SITE}": reached(
            sum(one.size for one in jax.tree.leaves(parts))
        )
        for site, parts in added.items()
    }
    roles = jax.tree.leaves(method.roles(params), is_leaf=is_role)
    shapes, found = leaves_by_name(params), []
    for role in roles:
        leaf = shapes[role.name]
        trained = method.trained_size(role, leaf.shape)
        if role.name.startswith(f"{method.stack}/"):
            trained = reached(trained)
        found.append(_Leaf(role.name, leaf.shape, trained, sites.pop(role.name, 0)))
    # What belongs to no linear map, such as prefixes.
    others = [(site.removesuffix(_SITE), size) for site, size in sites.items()]
    return [*found, *(_Leaf(site, (), 0, size) for site, size in others)]


def _print(leaves: Sequence[_Leaf], method: str, kind: str) -> None:
    """Prints the table, and the sums below it."""
    # Rich takes a while to import, so it is imported where it is used.
    from rich.console import Console
    from rich.table import Table

    adds = any(leaf.added for leaf in leaves)
    table = Table(title=f"{method} on {kind}")
    columns = ("shape", "parameters", "trained", *(["added"] * adds))
    table.add_column("leaf", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for leaf in leaves:
        shape = " x ".join(map(str, leaf.shape))
        sizes = (leaf.size, leaf.trained, *([leaf.added] * adds))
        table.add_row(
            leaf.name, shape, *(f"{size:,}" if size else "" for size in sizes)
        )
    # A file or another program takes lines of any length.
    width = None if sys.stdout.isatty() else 120
    console = Console(highlight=False, markup=False, width=width)
    console.print(table)
    total = sum(leaf.size for leaf in leaves)
    trained = sum(leaf.trained + leaf.added for leaf in leaves)
    console.print(f"{trained:,} of {total:,} parameters ({trained / total:.3%}).")

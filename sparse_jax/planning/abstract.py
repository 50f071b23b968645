"""A run without its arrays: the shapes a step takes, where they lie, their bytes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.compact.compact import CompactState, Loss, Tuner
from sparse_jax.compact.in_backward import InBackward
from sparse_jax.compact.layerwise import Layerwise
from sparse_jax.compact.model_taps import in_stack
from sparse_jax.data.glue import CAUSAL
from sparse_jax.errors import InputError
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.model_files import config_folder
from sparse_jax.models.hf.read_config import read_config
from sparse_jax.params.names import map_named
from sparse_jax.samplers.simple import Static
from sparse_jax.sharding.mesh import MeshShape, make_mesh
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.runner import MeshRunner
from sparse_jax.supports.masters import current_values
from sparse_jax.training.build import head_rules, make_tuner, method_of, sampler_of
from sparse_jax.training.objective import make_loss, make_token_loss
from sparse_jax.training.optimizer import Schedule, schedule_of
from sparse_jax.training.settings import Settings

__all__ = ["AbstractRun", "abstract_run", "held_bytes", "read_model", "selected_by"]

_Dtypes = dict[str, np.dtype]


@dataclass(frozen=True, eq=False)
class AbstractRun:
    """A run that has shapes for arrays."""

    settings: Settings
    tuner: Tuner
    runner: MeshRunner
    placement: Placement
    state: CompactState
    batch: Mapping[str, jax.ShapeDtypeStruct]
    key: jax.Array
    schedule: Schedule
    head: Sequence[str]  # rules of the leaves that counts leave out


def read_model(model: str, task: str = CAUSAL) -> Model:
    """Returns a model from its `config.json` alone.

    Args:
      model: folder, `config.json`, or id on the Hub, of which nothing else is fetched.
      task: that a decoder is trained for, with a head for labels unless it is causal.

    Raises:
      InputError: as `read_config`.
    """
    path = Path(model)
    folder = path.parent if path.name == "config.json" else config_folder(model)
    family, config = read_config(folder)
    writes = CausalLM.__name__ in family.architectures and task.lower() == CAUSAL
    return Model(CausalLM if writes else SequenceClassifier, family, config)


def abstract_run(
    model: Model,
    settings: Settings,
    length: int,
    shape: MeshShape,
    devices: Sequence[Any],
) -> AbstractRun:
    """Returns a run on devices that need not be here.

    Args:
      model: what is fine-tuned.
      settings: of the run; task, data and output are not looked at.
      length: tokens of every example.
      shape: of the mesh.
      devices: as many as the mesh has.

    Raises:
      InputError: if the settings do not fit the model, or the mesh.
    """
    if not 1 <= length <= model.config.max_positions:
        raise InputError(
            f"`length` must be at least 1 and at most {model.config.max_positions}, "
            f"the positions of the model, got {length}."
        )
    params = model.abstract(jnp.dtype(settings.dtype))
    head = () if model.head is CausalLM else head_rules(("classifier",), ())
    method = method_of(settings, head)
    method.roles(params)
    sampler = sampler_of(settings, model.config.num_layers)
    if sampler is not None and sampler.measures:
        # The lowest layers need the longest backward pass.
        lowest = range(sampler.num_active)
        sampler = Static.of(*lowest, num_layers=sampler.num_layers)
    placement = Placement.of(params, make_mesh(shape, devices=devices))
    placement.require_batch(settings.batch_size, settings.accumulate, length)
    loss = _loss(model, settings)
    tuner = make_tuner(settings, loss, method, sampler, placement)
    runner = MeshRunner(tuner, placement)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = CompactState(*runner.abstract(params, key))
    batch = _batch(model, settings, length, placement)
    schedule = jax.eval_shape(lambda: schedule_of(1.0, 1))
    return AbstractRun(
        settings, tuner, runner, placement, state, batch, key, schedule, head
    )


def _loss(model: Model, settings: Settings) -> Loss:
    """Returns the loss, with a loop over the layers: these devices may be no CPUs."""
    make = make_token_loss if model.head is CausalLM else make_loss
    return make(model, checkpointing=settings.checkpointing, unroll=1)


def _batch(
    model: Model, settings: Settings, length: int, placement: Placement
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch on the mesh."""
    accumulate, sharding = settings.accumulate, placement.batch(settings.accumulate)
    rows = (settings.batch_size // accumulate,)
    rows = (accumulate, *rows) if accumulate > 1 else rows
    tokens = (*rows, length)
    array = lambda *args: jax.ShapeDtypeStruct(*args, sharding=sharding)
    batch = {
        "input_ids": array(tokens, np.int32),
        "attention_mask": array(tokens, np.int32),
        "weights": array(tokens if model.head is CausalLM else rows, np.float32),
    }
    if model.head is SequenceClassifier:
        batch["labels"] = array(rows, np.int32)
    return batch


def selected_by(
    run: AbstractRun, batches: int
) -> tuple[Mapping[str, jax.ShapeDtypeStruct], jax.Array]:
    """Returns the shapes of what a selection by some batches is by, and of its keys."""
    if batches == 1:
        return run.batch, run.key
    sharding, skipped = run.placement.batch(batches), int(run.settings.accumulate > 1)

    def several(one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (batches, *one.shape[skipped:])
        return jax.ShapeDtypeStruct(shape, one.dtype, sharding=sharding)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batches))
    return {name: several(one) for name, one in run.batch.items()}, keys


def held_bytes(run: AbstractRun) -> Mapping[str, int]:
    """Returns bytes of one device, exact for the state and for the gradients.

    Returns:
      `parameters`; `added` arrays of the method; `masters` of the trained values of
      leaves below float32; `supports`; `optimizer`; `batch`; and `gradients` of what is
      trained, which live for a part of the step only.
    """
    state = run.state
    return {
        "parameters": _bytes(state.params),
        "added": _bytes(state.added),
        "masters": _bytes(state.masters),
        "supports": _bytes(state.support),
        "optimizer": _bytes(state.opt_state),
        "batch": _bytes(run.batch),
        "gradients": _gradients(run),
    }


def _gradients(run: AbstractRun) -> int:
    """Returns the bytes of the gradients of what is trained."""
    roles = run.tuner.roles(run.state.params)

    def values(state: CompactState) -> CompactState:
        leaves = current_values(roles, state.support, state.masters, state.params)
        return state._replace(params=leaves, masters=(), opt_state=())

    with jax.set_mesh(run.placement.mesh):
        shapes = jax.eval_shape(values, run.state)
    placed = run.placement.trained(roles, shapes)
    # What is added up, over micro-batches or replicas, and rows of layers are float32.
    sums = run.tuner.accumulate > 1 or run.tuner.data_axes
    of_leaves = {} if sums or isinstance(run.tuner, Layerwise) else _dtypes(run)
    sizes = []

    def add(name: str, leaf: jax.Array, at: jax.NamedSharding, dtypes: _Dtypes) -> None:
        share = _active(run) if name.startswith("layers/") else 1.0
        sizes.append(int(share * _size(leaf.shape, dtypes.get(name, np.float32), at)))

    map_named(partial(add, dtypes=of_leaves), shapes.params, placed.params)
    map_named(partial(add, dtypes={}), shapes.added, placed.added)
    return sum(sizes)


def _dtypes(run: AbstractRun) -> _Dtypes:
    """Returns the dtypes of the parameters."""
    found: _Dtypes = {}
    map_named(lambda name, leaf: found.update({name: leaf.dtype}), run.state.params)
    return found


def _active(run: AbstractRun) -> float:
    """Returns the share of the layers whose gradients are kept at a time."""
    if isinstance(run.tuner, InBackward):
        layers: Any = in_stack(run.tuner.method, run.state.params)
        return 1.0 / jax.tree.leaves(layers)[0].shape[0]
    if not isinstance(run.tuner, Layerwise):
        return 1.0
    sampler = run.tuner.sampler_for(run.state.params)
    return sampler.num_active / sampler.num_layers


def _bytes(tree: object) -> int:
    """Returns the bytes of the parts of arrays that lie on one device."""
    return sum(
        _size(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)
    )


def _size(
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    sharding: jax.sharding.Sharding,
) -> int:
    """Returns the bytes of the part of an array that lies on one device."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8
    return math.prod(sharding.shard_shape(tuple(shape))) * np.dtype(dtype).itemsize

"""A run without its arrays: the shapes that a step takes, and where they would lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.compact import Compact, CompactState, Loss
from sparse_jax.errors import InputError
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import max_length_of
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf_config import read_config
from sparse_jax.models.hub import config_folder
from sparse_jax.models.pure import PureModel
from sparse_jax.sharding.devices import MeshDevices
from sparse_jax.sharding.mesh import MeshShape, make_mesh
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.runner import MeshRunner
from sparse_jax.training.loss import make_loss
from sparse_jax.training.methods import head_rules, method_of
from sparse_jax.training.optimizer import Schedule
from sparse_jax.training.sampling import sampler_of
from sparse_jax.training.settings import Settings
from sparse_jax.training.token_loss import make_token_loss
from sparse_jax.training.tuner import make_tuner

__all__ = ["AbstractRun", "abstract_run", "read_model"]


@dataclass(frozen=True, eq=False)
class AbstractRun:
    """A run that has shapes for arrays."""

    settings: Settings
    tuner: Compact
    runner: MeshRunner
    placement: Placement
    state: CompactState
    batch: Any
    key: Any
    schedule: Schedule
    head: Sequence[str]  # rules of the leaves that counts leave out


def read_model(model: str) -> PureModel:
    """Returns a model from its `config.json` alone.

    Args:
      model: folder, `config.json`, or id on the Hub, of which nothing else is fetched.

    Raises:
      InputError: as `read_config`.
    """
    path = Path(model)
    folder = path.parent if path.name == "config.json" else config_folder(model)
    family, config = read_config(folder)
    is_decoder = CausalLM.__name__ in family.architectures
    return PureModel(CausalLM if is_decoder else SequenceClassifier, family, config)


def abstract_run(
    model: PureModel,
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
    if not 1 <= length <= max_length_of(model.config):
        raise InputError(
            f"`length` must be at least 1 and at most {max_length_of(model.config)}, "
            f"the positions of the model, got {length}."
        )
    params = model.abstract(jnp.dtype(settings.dtype))
    head = () if model.head is CausalLM else head_rules(("classifier",), ())
    method = method_of(settings, head)
    method.roles(params)
    sampler = sampler_of(settings, model.config.num_layers)
    placement = Placement.of(params, make_mesh(shape, devices=devices))
    placement.require_batch(settings.batch_size, settings.accumulate)
    where = MeshDevices(placement)
    loss = _loss(model, settings)
    tuner = make_tuner(settings, loss, method, sampler, where)
    runner = MeshRunner(tuner, placement)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = CompactState(*runner.abstract(params, key))
    batch = _batch(model, settings, length, placement)
    number = jax.ShapeDtypeStruct((), np.float32)
    schedule = Schedule(number, number, number, number)
    return AbstractRun(
        settings, tuner, runner, placement, state, batch, key, schedule, head
    )


def _loss(model: PureModel, settings: Settings) -> Loss:
    """Returns the loss, with a loop over the layers: these devices may be no CPUs."""
    make = make_token_loss if model.head is CausalLM else make_loss
    return make(model, checkpointing=settings.checkpointing, unroll=1)


def _batch(
    model: PureModel, settings: Settings, length: int, placement: Placement
) -> Any:
    """Returns the shapes of a batch on the mesh."""
    accumulate = settings.accumulate
    rows: tuple[int, ...] = (settings.batch_size // accumulate,)
    rows = (accumulate, *rows) if accumulate > 1 else rows
    tokens = (*rows, length)
    shapes: dict[str, Any] = {
        "input_ids": (tokens, np.int32),
        "attention_mask": (tokens, np.int32),
        "weights": (tokens if model.head is CausalLM else rows, np.float32),
    }
    if model.head is SequenceClassifier:
        shapes["labels"] = (rows, np.int32)
    sharding = placement.batch(accumulate)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }

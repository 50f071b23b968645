"""A writer: a model, an adapter and a tokenizer that together continue texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.adapter_file import Adapter, load_adapter
from sparse_jax.adapter_use import apply_adapter, base_folder
from sparse_jax.errors import InputError, listed
from sparse_jax.generation.choice import Choice
from sparse_jax.generation.generate import generate
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.hf_config import read_config
from sparse_jax.models.hub import local_folder
from sparse_jax.models.pretrained import base_hash, new_leaves
from sparse_jax.models.pure import PureModel
from sparse_jax.sharding.devices import Devices, OneDevice
from sparse_jax.sharding.loading import load_onto
from sparse_jax.sharding.mesh import make_mesh, parse_mesh
from sparse_jax.sites import Attachment
from sparse_jax.tasks.glue import TASKS
from sparse_jax.tasks.tokens import load_tokenizer, warn_of_tokenizer

__all__ = ["Writer", "load_writer"]


@dataclass(frozen=True, eq=False)
class Writer:
    """Everything that is needed to continue a text."""

    model: PureModel
    params: Any
    attachment: Attachment
    tokenizer: Any
    stop: tuple[int, ...]  # tokens that end a text
    devices: Devices = OneDevice()

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        choice: Choice,
        max_new_tokens: int,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> list[str]:
        """Returns what follows each prompt, special tokens left out.

        Args:
          prompts: token ids.
          choice: how tokens are chosen.
          max_new_tokens: most tokens to write after a prompt.
          seed: of what is drawn at random.
          stop: tokens that end a text beside those that the model itself ends with.

        Raises:
          InputError: as `generate`.
        """
        with self.devices.active():
            rows = generate(
                self.model,
                self.params,
                prompts,
                max_new_tokens=max_new_tokens,
                choice=choice,
                stop=tuple(sorted({*self.stop, *stop})),
                attachment=self.attachment,
                key=jax.random.key(seed),
            )
        decode = self.tokenizer.decode
        return [decode(row.tolist(), skip_special_tokens=True) for row in rows]


def load_writer(
    model: str | Path | None,
    adapter: str | Path | None = None,
    mesh: str | None = None,
) -> Writer:
    """Loads a decoder and, perhaps, an adapter for it.

    Args:
      model: folder or id; None is where the adapter was trained.
      adapter: adapter file or run directory; None is none.
      mesh: devices to share the weights, such as "tensor=2"; None is one device.

    Raises:
      InputError: if neither is given, the model is no decoder, or the adapter cannot
        be read, is for a classification or belongs to another base.
    """
    found = None if adapter is None else _causal_adapter(adapter)
    folder = _base(model, found)
    _require_decoder(folder)
    made = None if mesh is None else make_mesh(parse_mesh(mesh))
    options: dict[str, Any] = {"head": CausalLM, **_as_trained(found)}
    pure, params, devices = load_onto(made, folder, **options)
    new = new_leaves(pure, folder)
    _require_head(folder, new, found)
    attachment = Attachment()
    if found is not None:
        base = {"base_hash": base_hash(folder), "model": pure}
        params, attachment = apply_adapter(params, found, **base, new=new)
    tokenizer = load_tokenizer(folder)
    if found is not None:
        warn_of_tokenizer(found.settings.get("tokenizer_hash"), tokenizer)
    stop = {*_ends(folder), tokenizer.eos_token_id} - {None}
    return Writer(pure, params, attachment, tokenizer, tuple(sorted(stop)), devices)


def _causal_adapter(path: str | Path) -> Adapter:
    """Reads an adapter of a model that writes."""
    adapter = load_adapter(path)
    if adapter.labels or adapter.task in TASKS:
        raise InputError(
            f"`adapter` must be one of a causal language model, got one for the task "
            f"{adapter.task}. Use `sparse-jax evaluate` for it."
        )
    return adapter


def _base(model: str | Path | None, adapter: Adapter | None) -> Path:
    """Returns the folder of the base model, given or named by the adapter."""
    if adapter is not None and adapter.base_model:
        return base_folder(adapter, model)
    if model is None:
        raise InputError(
            "`model` must be given without an adapter that names its base. Pass a "
            "folder or an id on the Hub."
        )
    return local_folder(model)


def _as_trained(adapter: Adapter | None) -> dict[str, Any]:
    """Returns how a base is loaded: as for the training of the adapter."""
    settings = adapter.settings if adapter is not None else {}
    # A head that the folder lacks is created here, and replaced by the adapter's.
    key = jax.random.key(settings.get("seed") or 0)
    return {"dtype": jnp.dtype(settings.get("dtype") or "float32"), "key": key}


def _require_decoder(folder: Path) -> None:
    """Raises if a folder has a model that cannot write."""
    family, _ = read_config(folder)
    if CausalLM.__name__ not in family.architectures:
        raise InputError(
            f"`model` must be a decoder, got model type {family.name!r} in `{folder}`. "
            "Encoders do not continue texts."
        )


def _require_head(folder: Path, new: Sequence[str], adapter: Adapter | None) -> None:
    """Raises if neither the model nor the adapter has some leaf of the head."""
    lacking = {*new} - {*(adapter.dense if adapter else ())}
    if lacking:
        raise InputError(
            f"`model` must have {listed(sorted(lacking))} to write text, and "
            f"`{folder}` has no such tensor. Copy the weights again, or pass the "
            "adapter that it was trained for."
        )


def _ends(folder: Path) -> list[int]:
    """Returns the tokens that `generation_config.json` ends a text with, if any."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"`{path}` must be a JSON object: {error}. Copy it again, or remove it."
        ) from error
    ends = ends if isinstance(ends, list) else [ends]
    return [end for end in ends if isinstance(end, int)]

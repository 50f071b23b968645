"""A writer: a model, an adapter and a tokenizer that together continue texts."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.adapter_file import Adapter, load_adapter
from sparse_jax.adapter_use import apply_adapter, base_folder
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.generation.choice import Choice
from sparse_jax.generation.ends import ends_of_model, require_ends
from sparse_jax.generation.generate import generate
from sparse_jax.generation.wording import Stop
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
from sparse_jax.tasks.rendering import warn_of_template
from sparse_jax.tasks.tokens import load_tokenizer, tokenizing, warn_of_tokenizer

__all__ = ["Writer", "load_writer"]

_log = logging.getLogger(__name__)


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
        stop: Sequence[Stop] = (),
    ) -> list[str]:
        """Returns what follows each prompt, special tokens left out.

        Args:
          prompts: token ids.
          choice: how tokens are chosen.
          max_new_tokens: most tokens to write after a prompt.
          seed: of what is drawn at random.
          stop: what ends a text beside the tokens that the model itself ends with.

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
                stop=[*self.stop, *(one.tokens for one in stop if one.tokens)],
                attachment=self.attachment,
                key=jax.random.key(seed),
            )
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        with tokenizing("`tokenizer` must be able to decode every token"):
            texts = [decode(row.tolist()) for row in rows]
        # A text can be spelled in other tokens than those it was expected in.
        return [_before(text, [one.text for one in stop if one.text]) for text in texts]


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
    attachment = Attachment()
    if found is None:
        _require_head(folder, new)
    else:
        base = {"base_hash": base_hash(folder), "model": pure}
        params, attachment = apply_adapter(params, found, **base, new=new)
    tokenizer = load_tokenizer(folder)
    if found is not None:
        warn_of_tokenizer(found.settings.get("tokenizer_hash"), tokenizer)
        warn_of_template(found.settings.get("chat_template_hash"), tokenizer)
    stop = ends_of_model(folder, pure.config.eos_ids, pure.config.vocab_size)
    stop |= {tokenizer.eos_token_id} - {None}
    stop |= {*_trained_ends(found, pure.config.vocab_size)}
    if not stop:
        _log.warning(
            "the model has no end-of-sequence token: only `max_new_tokens` ends a text"
        )
    return Writer(pure, params, attachment, tokenizer, tuple(sorted(stop)), devices)


def _before(text: str, ends: Sequence[str]) -> str:
    """Returns a text up to the first of some words."""
    return text[: min((text.index(end) for end in ends if end in text), default=None)]


def _trained_ends(adapter: Adapter | None, vocab_size: int) -> list[int]:
    """Returns the tokens that the adapter was trained to end a text with."""
    value = adapter.settings.get("eos_token_id") if adapter else None
    ends = require_ends(value, "`eos_token_id` of the adapter")
    if not all(0 <= end < vocab_size for end in ends):
        raise InputError(
            f"`eos_token_id` of the adapter must be in [0, {vocab_size}), got "
            f"{brief(ends)}. Use the tokenizer that it was trained with."
        )
    return ends


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


def _require_head(folder: Path, new: Sequence[str]) -> None:
    """Raises if a model lacks some leaf of the head; `apply_adapter` has its own."""
    if new:
        raise InputError(
            f"`model` must have {listed(new)} to write text, and "
            f"`{folder}` has no such tensor. Copy the weights again, or pass the "
            "adapter that it was trained for."
        )

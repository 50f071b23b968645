"""A writer: a model, an adapter and a tokenizer that together continue texts."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from sparse_jax.adapter.adapter import Adapter
from sparse_jax.adapter.use import apply_adapter, base_folder, require_base
from sparse_jax.data.chat import render_prompt
from sparse_jax.data.chat_template import warn_of_template
from sparse_jax.data.conversations import PromptTemplate
from sparse_jax.data.glue import TASKS
from sparse_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    tokenizing,
    warn_of_tokenizer,
)
from sparse_jax.errors import InputError, brief, listed
from sparse_jax.generation.choice import Choice
from sparse_jax.generation.ends import ends_of_model, require_ends
from sparse_jax.generation.generate import generate
from sparse_jax.interchange.open_adapter import open_adapter
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model, Params
from sparse_jax.models.hf.model_files import local_folder
from sparse_jax.models.hf.pretrained import base_hash, new_leaves
from sparse_jax.models.hf.read_config import read_config
from sparse_jax.sharding.mesh import mesh_of
from sparse_jax.sharding.placement import Placement, load_placed

__all__ = [
    "Stop",
    "Writer",
    "chat_tokens",
    "encoded",
    "load_writer",
    "read_stop",
    "text_tokens",
]


class Stop(NamedTuple):
    """What ends a text and is not part of it."""

    tokens: tuple[int, ...]  # that it is most likely written in; none if not known
    text: str = ""  # none for a token that has no text


def text_tokens(
    text: str, tokenizer: Tokenizer, template: PromptTemplate | None = None
) -> list[int]:
    """Returns the tokens of a text that is to be continued.

    Args:
      text: the beginning of a text, or an instruction.
      tokenizer: a tokenizer of transformers.
      template: the prompt to put an instruction in; None leaves the text as it is.

    Raises:
      InputError: if the text has broken characters.
    """
    _require_whole("prompt", text)
    text = text if template is None else template.fill(text)
    ids, bare = _ids(tokenizer, text), _ids(tokenizer, text, add_special_tokens=False)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    # Some texts begin with what the tokenizer adds, which is there once.
    if begin is not None and ids[:2] == [begin, begin] and bare[:1] == [begin]:
        ids = ids[1:]
    # Some tokenizers end every text, and a model continues none that has ended.
    while ids and ids[-1] == end != begin:
        ids = ids[:-1]
    return ids


def chat_tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of a chat in which the assistant is to answer a message.

    Raises:
      InputError: if the tokenizer has no chat template, or it does not write the
        message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "`model` must have a tokenizer with a chat template for a chat, got none. "
            "Use the instruction-tuned variant, or leave out `chat`."
        )
    _require_whole("prompt", text)
    prompt = render_prompt([{"role": "user", "content": text}], tokenizer, "`prompt`")
    return encoded(tokenizer, prompt)


def read_stop(word: str, tokenizer: Tokenizer) -> Stop:
    """Returns what ends a text, given as text, as a token or, in digits, as its id.

    Raises:
      InputError: if the tokenizer cannot write it.
    """
    _require_whole("stop", word)
    if word.isdecimal() and int(word) < len(tokenizer):
        return Stop((int(word),))
    known = tokenizer.get_vocab()
    if word in known:
        added = tokenizer.added_tokens_decoder.get(known[word])
        # A special token is left out of a text.
        return Stop((known[word],), "" if added and added.special else word)
    # After a line break, where no tokenizer puts a space of its own before a text.
    head, whole = _ids(tokenizer, "\n", False), _ids(tokenizer, f"\n{word}", False)
    ids = whole[len(head) :] if whole[: len(head)] == head else []
    ids = ids or _ids(tokenizer, word, False)
    if not ids or tokenizer.unk_token_id in ids:
        raise InputError(
            f"`stop` must be a text or a token of the model's vocabulary, got "
            f"{brief(word)}, which the tokenizer does not know."
        )
    with tokenizing():
        is_spelled = word in tokenizer.decode(ids)
    return Stop(tuple(ids) if is_spelled else (), word)


def encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the tokens of a prompt that a chat template has written."""
    # The template has written the special tokens itself.
    return _ids(tokenizer, prompt, add_special_tokens=False)


def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Returns the tokens of a text."""
    # Not verbose: it warns of long texts, which are refused later.
    with tokenizing():
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)[
            "input_ids"
        ]


def _require_whole(name: str, text: str) -> None:
    """Raises if a text has a part of a character, as words of a command line may."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(
            f"`{name}` must have whole characters, got {brief(text)}. Write UTF-8."
        )


_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Writer:
    """Everything that is needed to continue a text."""

    model: Model
    params: Params
    attachment: Attachment
    tokenizer: Tokenizer
    stop: tuple[int, ...]  # tokens that end a text
    placement: Placement

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        choice: Choice,
        max_new_tokens: int,
        seed: int = 0,
        stop: Sequence[Stop] = (),
        keep_space: bool = False,
        batch_size: int | None = None,
        first: int = 0,
    ) -> list[str]:
        """Returns what follows each prompt, special tokens left out.

        Args:
          prompts: token ids.
          choice: how tokens are chosen.
          max_new_tokens: most tokens to write after a prompt.
          seed: of what is drawn at random.
          stop: what ends a text beside the tokens that the model itself ends with.
          keep_space: whether prompt and text are one text, such as a program. Without
            it tokenizers of SentencePiece leave out a space that a text begins with.
          batch_size, first: as of `generate`.

        Raises:
          InputError: as `generate`.
        """
        with self.placement.active():
            rows = generate(
                self.model,
                self.params,
                prompts,
                max_new_tokens=max_new_tokens,
                choice=choice,
                stop=[*self.stop, *(one.tokens for one in stop if one.tokens)],
                attachment=self.attachment,
                key=jax.random.key(seed),
                batch_size=batch_size,
                first=first,
            )
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        with tokenizing("`tokenizer` must be able to decode every token"):
            texts = [cast("str", decode(row.tolist())) for row in rows]
            if keep_space:
                befores = [cast("str", decode([*prompt])) for prompt in prompts]
                both = zip(prompts, rows, strict=True)
                wholes = [
                    cast("str", decode([*one, *row.tolist()])) for one, row in both
                ]
                texts = [*map(_after, befores, wholes, texts)]
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
      adapter: adapter file, run directory, or folder of PEFT; None is none.
      mesh: devices to share the weights, such as "tensor=2"; None is one device.

    Raises:
      InputError: if neither is given, the model is no decoder, or the adapter cannot
        be read, is for a classification or belongs to another base.
    """
    found = None if adapter is None else _causal_adapter(adapter, model)
    folder = _base(model, found)
    _require_decoder(folder)
    settings = found.settings if found is not None else {}
    lm, params, placement = load_placed(
        mesh_of(mesh),
        folder,
        head=CausalLM,
        dtype=jnp.dtype(settings.get("dtype") or "float32"),
        # A head that the folder lacks is created here, and replaced by the adapter's.
        key=jax.random.key(settings.get("seed") or 0),
    )
    new = new_leaves(lm, folder)
    attachment = Attachment()
    if found is None:
        _require_head(folder, new)
    else:
        require_base(found, base_hash(folder), lm, folder)
        params, attachment = apply_adapter(params, found, model=lm, new=new)
    tokenizer = load_tokenizer(folder)
    warn_of_tokenizer(settings.get("tokenizer_hash"), tokenizer)
    warn_of_template(settings.get("chat_template_hash"), tokenizer)
    stop = ends_of_model(folder, lm.config.eos_ids, lm.config.vocab_size)
    if tokenizer.eos_token_id is not None:
        stop.add(cast("int", tokenizer.eos_token_id))
    stop |= {*_trained_ends(settings.get("eos_token_id"), lm.config.vocab_size)}
    if not stop:
        _log.warning(
            "the model has no end-of-sequence token: only `max_new_tokens` ends a text"
        )
    return Writer(lm, params, attachment, tokenizer, tuple(sorted(stop)), placement)


def _after(before: str, whole: str, alone: str) -> str:
    """Returns what follows a text in a whole one, or what it is alone."""
    return whole[len(before) :] if whole.startswith(before) else alone


def _before(text: str, ends: Sequence[str]) -> str:
    """Returns a text up to the first of some words."""
    return text[: min((text.index(end) for end in ends if end in text), default=None)]


def _trained_ends(value: object, vocab_size: int) -> list[int]:
    """Returns the tokens that the adapter was trained to end a text with."""
    ends = require_ends(value, "`eos_token_id` of the adapter")
    if not all(0 <= end < vocab_size for end in ends):
        raise InputError(
            f"`eos_token_id` of the adapter must be in [0, {vocab_size}), got "
            f"{brief(ends)}. Use the tokenizer that it was trained with."
        )
    return ends


def _causal_adapter(path: str | Path, model: str | Path | None) -> Adapter:
    """Reads an adapter of a model that writes."""
    adapter = open_adapter(path, model)
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

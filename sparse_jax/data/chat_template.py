"""A tokenizer's chat template: tried once in a process of its own, then rendered."""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_jax.data import template_trial
from sparse_jax.data.template_trial import MEMORY, OUT_OF_MEMORY, SECONDS
from sparse_jax.data.tokenizer import Tokenizer
from sparse_jax.errors import InputError, listed, reason_of

__all__ = ["render", "require_template", "template_digest", "warn_of_template"]

_log = logging.getLogger(__name__)

Fields = Mapping[str, object]

# The system's clock runs on while other programs have the processor.
_WALL_SECONDS = 60
# Characters that a template may add to a chat, and how often it may repeat it.
_MOST_ADDED, _MOST_REPEATED = 1_000_000, 100
# Templates that have been tried; each costs a tenth of a second, once.
_tried: set[str] = set()


def require_template(tokenizer: Tokenizer, place: str) -> None:
    """Raises unless a tokenizer has one chat template to use.

    Raises:
      InputError: if it has none, or several and no default.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise InputError(
            f"{place} has messages, so `tokenizer` must have a chat template, got "
            "none. Set `tokenizer.chat_template`, or use the tokenizer of the "
            "model's instruction-tuned variant and save it next to the model."
        )
    if isinstance(template, dict) and "default" not in template:
        raise InputError(
            f"{place} has messages, so `tokenizer` must have a default chat template, "
            f"got {listed(template)}. Name one of them `default`."
        )


def template_digest(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 of a tokenizer's chat template, of all if it has several."""
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()


def warn_of_template(digest: str | None, tokenizer: Tokenizer) -> None:
    """Warns if a chat template is not the one of a digest; None is not known."""
    if digest is not None and digest != template_digest(tokenizer):
        _log.warning(
            "the chat template of the model is not the one that the adapter was "
            "trained with: chats are written differently, and results are worse or "
            "wrong"
        )


def render(
    messages: Sequence[Fields],
    tokenizer: Tokenizer,
    place: str,
    *,
    tools: Sequence[Fields] | None = None,
    asks: bool = False,
) -> str:
    """Returns messages as the chat template writes them.

    Args:
      messages: as the template takes them, at least one.
      tokenizer: a tokenizer of transformers with a chat template.
      place: file and line, for messages of errors.
      tools: schemas of the functions that the assistant may call.
      asks: whether the assistant is to answer.

    Raises:
      InputError: if the template does not accept the messages, or takes more time or
        memory than any honest one.
    """
    # Values of any kind, which the annotations of transformers do not foresee.
    chat: list[Any]
    chat, schemas = list(map(dict, messages)), list(map(dict, tools or ())) or None
    options = {"tools": schemas, "add_generation_prompt": asks}
    try:
        template = tokenizer.get_chat_template(tools=schemas)
        words = {name: str(word) for name, word in tokenizer.special_tokens_map.items()}
        call = {**words, "messages": chat, **options}
        _try(template, [call, {**call, "add_generation_prompt": not asks}])
        text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except InputError:
        raise
    # A template raises what it likes.
    except Exception as error:
        raise InputError(
            f"{place} must be messages that the chat template accepts: "
            f"{reason_of(error)}."
        ) from error
    given = len(json.dumps([chat, options]))
    if not isinstance(text, str) or len(text) > _MOST_ADDED + _MOST_REPEATED * given:
        raise InputError(
            f"{place} must be messages for which the chat template writes a text of "
            f"their size, got {len(text):,} characters for {given:,}. Use another "
            "chat template."
        )
    return text


def _try(template: str, calls: Sequence[Fields]) -> None:
    """Renders a template that was not used before in a process with bounds."""
    if template in _tried or not sys.executable:
        return
    try:
        trial = subprocess.run(
            [sys.executable, "-P", template_trial.__file__],
            input=json.dumps({"template": template, "calls": calls}).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_WALL_SECONDS,
            check=False,
        )
        code, said = trial.returncode, trial.stderr
    except subprocess.TimeoutExpired:
        code, said = -1, b""
    except OSError:  # there can be no more processes
        return
    # The system ends a process with a signal, whose code is negative.
    if code < 0 or code == OUT_OF_MEMORY:
        raise InputError(
            f"`tokenizer` must have a chat template that needs at most {SECONDS} s and "
            f"{MEMORY >> 30} GiB for a chat, got one that needs more. Use another chat "
            "template."
        )
    if code:
        raise RuntimeError(
            "the process that tries a chat template did not run: "
            f"{said.decode(errors='replace').strip()[-500:]}"
        )
    _tried.add(template)

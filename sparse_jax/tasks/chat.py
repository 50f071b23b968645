"""Chats: messages, written as one text by a tokenizer's template."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparse_jax.errors import InputError
from sparse_jax.tasks.conversations import Conversation, Piece, join

__all__ = ["render_chat"]

Message = Mapping[str, Any]


def render_chat(
    messages: Sequence[Message], tokenizer: Any, place: str
) -> list[Conversation]:
    """Returns messages as conversations whose responses are the assistant's turns.

    A response is all that the template writes between the prompt for generation and
    the white space after the turn: the text and the token that ends the turn. Turns
    share a conversation if the template leaves earlier turns as they were; where it
    rewrites them (Qwen 3 removes old thoughts), each turn is a conversation of its
    own, with the very prompt that a model meets. What follows the last turn of the
    assistant is left out.

    Args:
      messages: each has a `role` and a `content`.
      tokenizer: a tokenizer of transformers with a chat template.
      place: file and line, for messages of errors.

    Raises:
      InputError: if the tokenizer has no template, no message is the assistant's, or
        the template does not accept the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{place} has messages, so `tokenizer` must have a chat template, got "
            "none. Set `tokenizer.chat_template`, or use the tokenizer of the "
            "model's instruction-tuned variant and save it beside the model."
        )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError(f"{place} must have a message of the assistant, got none.")
    chats: list[list[Piece]] = []
    written = ""
    for turn in turns:
        before, response = _turn(messages[: turn + 1], tokenizer, place)
        if not (chats and before.startswith(written)):
            chats.append([])
            written = ""
        chats[-1] += [Piece(before[len(written) :], False), Piece(response, True)]
        written = before + response
    return [Conversation(join(chat), is_rendered=True) for chat in chats]


def _turn(messages: Sequence[Message], tokenizer: Any, place: str) -> tuple[str, str]:
    """Returns the text before the last message, and its own."""
    whole = _rendered(messages, tokenizer, place)
    for has_prompt in (True, False):
        before = _rendered(
            messages[:-1], tokenizer, place, add_generation_prompt=has_prompt
        )
        if whole.startswith(before):
            return before, whole[len(before) :].rstrip()
    raise InputError(
        f"{place} must be messages to which the chat template adds the last one at "
        "the end, and it changes the text before it. Use another chat template."
    )


def _rendered(
    messages: Sequence[Message], tokenizer: Any, place: str, **options: bool
) -> str:
    """Returns messages as the template writes them."""
    # jinja2 comes with transformers and is slow, so it is imported where it is used.
    from jinja2 import TemplateError

    if not messages:
        return ""
    try:
        return tokenizer.apply_chat_template(
            list(map(dict, messages)), tokenize=False, **options
        )
    except TemplateError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"{place} must be messages that the chat template accepts: {reason}."
        ) from error

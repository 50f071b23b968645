"""From a user's words to the tokens that a model reads."""

from typing import Any, NamedTuple

from sparse_jax.errors import InputError, brief
from sparse_jax.tasks.chat import render_prompt
from sparse_jax.tasks.prompts import PromptTemplate
from sparse_jax.tasks.tokens import tokenizing

__all__ = ["Stop", "chat_tokens", "read_stop", "text_tokens"]


class Stop(NamedTuple):
    """What ends a text and is not part of it."""

    tokens: tuple[int, ...]  # that it is most likely written in; none if not known
    text: str = ""  # none for a token that has no text


def text_tokens(
    text: str, tokenizer: Any, template: PromptTemplate | None = None
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


def chat_tokens(text: str, tokenizer: Any) -> list[int]:
    """Returns the tokens of a chat in which the assistant is to answer a message.

    Raises:
      InputError: if the tokenizer has no chat template, or it does not write the
        message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "`model` must have a tokenizer with a chat template for a chat, got none. "
            "Use the instruction-tuned variant, or leave out --chat."
        )
    _require_whole("prompt", text)
    prompt = render_prompt([{"role": "user", "content": text}], tokenizer, "`prompt`")
    # The template has written the special tokens itself.
    return _ids(tokenizer, prompt, add_special_tokens=False)


def read_stop(word: str, tokenizer: Any) -> Stop:
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


def _ids(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
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

"""From a user's words to the tokens that a model reads."""

from typing import Any

from sparse_jax.errors import InputError
from sparse_jax.tasks.prompts import PromptTemplate

__all__ = ["chat_tokens", "stop_token", "text_tokens"]


def text_tokens(
    text: str, tokenizer: Any, template: PromptTemplate | None = None
) -> list[int]:
    """Returns the tokens of a text that is to be continued.

    Args:
      text: the beginning of a text, or an instruction.
      tokenizer: a tokenizer of transformers.
      template: the prompt to put an instruction in; None leaves the text as it is.
    """
    ids = tokenizer(text if template is None else template.fill(text))["input_ids"]
    # Some tokenizers end every text, and a model continues none that has ended.
    while ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids = ids[:-1]
    return ids


def chat_tokens(text: str, tokenizer: Any) -> list[int]:
    """Returns the tokens of a chat in which the assistant is to answer a message.

    Raises:
      InputError: if the tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "`model` must have a tokenizer with a chat template for a chat, got none. "
            "Use the instruction-tuned variant, or leave out --chat."
        )
    message = {"role": "user", "content": text}
    written = tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True
    )
    # The template has written the special tokens itself.
    return tokenizer(written, add_special_tokens=False)["input_ids"]


def stop_token(word: str, tokenizer: Any) -> int:
    """Returns the id of a token, given as text or, in digits, as its id.

    Raises:
      InputError: if the tokenizer has no such token.
    """
    if word.isdecimal() and int(word) < len(tokenizer):
        return int(word)
    known = tokenizer.get_vocab()
    if word in known:
        return known[word]
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    why = f"is {len(ids)} tokens" if len(ids) > 1 else "the tokenizer does not know"
    raise InputError(
        f"`stop` must be one token or its id, got {word!r}, which {why}. Pass a token "
        "of the model's vocabulary."
    )

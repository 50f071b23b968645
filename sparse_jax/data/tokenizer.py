"""Tokens: the texts of examples as numbers."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sparse_jax.data.batches import Encoded
from sparse_jax.data.examples import Examples
from sparse_jax.errors import InputError, brief, reason_of
from sparse_jax.models.hf.model_files import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Tokenizer",
    "encode",
    "load_tokenizer",
    "tokenizer_digest",
    "tokenizing",
    "warn_of_tokenizer",
]

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"

_log = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# Letters in both cases, digits, signs and spaces: what a change of rules would touch.
_SAMPLE = "Sphinx of BLACK quartz,\n judge  my vow: 1234567890 (don't) {x}[y] <z>/a_b!"
# A fast tokenizer also keeps the offset and the spelling of every token until its
# result is dropped: a gigabyte for the 400 thousand pairs of MNLI at once.
_CHUNK = 4096


def load_tokenizer(model: str | Path) -> Tokenizer:
    """Returns the tokenizer of a model.

    Args:
      model: local folder, or the id of a model on the Hugging Face Hub.

    Raises:
      InputError: if `model` is neither, or has no tokenizer.
    """
    # transformers takes seconds to import, so it is imported where it is used.
    from transformers import AutoTokenizer

    folder = local_folder(model)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            f"`{folder}` must hold a tokenizer ({', '.join(_TOKENIZER_FILES)}), and "
            "has none of these files. Save it there with "
            "`tokenizer.save_pretrained(folder)`."
        )
    rule = f"`{folder}` must hold a whole tokenizer"
    with tokenizing(rule, "Save it there again"), _quiet_panics():
        try:
            # The code in a model's folder is a stranger's.
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise InputError(
                f"`{folder}` must hold a tokenizer that transformers has, got one with "
                "code of its own (`auto_map`), which is never run. Save a "
                "`tokenizer.json` there without it."
            ) from error
        # Some faults of the files show when they are used.
        tokenizer.decode(tokenizer("")["input_ids"])
        _ = tokenizer.eos_token_id, tokenizer.added_tokens_decoder
    if not tokenizer.chat_template:
        tokenizer.chat_template = _old_template(folder / "chat_template.json")
    return tokenizer


@contextlib.contextmanager
def tokenizing(
    rule: str = "`tokenizer` must be able to encode every text",
    remedy: str = "Use the tokenizer that belongs to the model",
) -> Iterator[None]:
    """Turns whatever a tokenizer raises into an `InputError`.

    Args:
      rule: what is broken then.
      remedy: what to do.

    Raises:
      InputError: with the reason, instead of any other error.
    """
    try:
        yield
    except InputError:
        raise
    # A torn file gives a KeyError, a TypeError or a bare Exception of the library, and
    # a panic of its Rust half, which is no Exception at all.
    except BaseException as error:
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise InputError(f"{rule}: {reason_of(error)}. {remedy}.") from error


def _is_panic(error: BaseException) -> bool:
    """Says whether Rust gave up; the class cannot be imported."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _quiet_panics() -> Iterator[None]:
    """Keeps back what a panic prints; the error has it."""
    with contextlib.ExitStack() as stack:
        try:
            saved = os.dup(2)
        except OSError:  # there is no standard error
            yield
            return
        stack.callback(os.close, saved)
        kept = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(kept.fileno(), 2)
        is_shown = True
        try:
            yield
        except BaseException as error:
            is_shown = not _is_panic(error)
            raise
        finally:
            os.dup2(saved, 2)
            kept.seek(0)
            if is_shown:
                os.write(2, kept.read())


def _old_template(path: Path) -> str | None:
    """Returns the chat template of a file as older versions wrote it, if any."""
    if not path.is_file():
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(
            f"`{path}` must be a JSON object with a `chat_template`: "
            f"{reason_of(error)}. Copy it again, or remove it."
        ) from error
    if not isinstance(template, str):
        raise InputError(
            f"`chat_template` in `{path}` must be a text, got {brief(template)}."
        )
    return template


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 of a vocabulary, and of what it makes of a sample text.

    It stays the same if a library writes the files of the tokenizer in another way.
    """
    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    sample = []
    # A vocabulary of words may have none for the unknown.
    with contextlib.suppress(InputError), tokenizing():
        sample = tokenizer(_SAMPLE)["input_ids"]
    return hashlib.sha256(json.dumps([words, sample]).encode()).hexdigest()


def warn_of_tokenizer(digest: str | None, tokenizer: Tokenizer) -> None:
    """Warns if a tokenizer is not the one of a digest; None is not known."""
    if digest is not None and digest != tokenizer_digest(tokenizer):
        _log.warning(
            "the tokenizer of the model is not the one that the adapter was trained "
            "with: if it gives other tokens, results are wrong"
        )


def encode(
    examples: Examples,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    positions: int,
) -> Encoded:
    """Returns the token ids of examples, truncated to `max_length`.

    Of a pair, tokens are taken from the end of whichever text is longer.

    Args:
      examples: texts or pairs of texts.
      tokenizer: a tokenizer of transformers.
      max_length: most tokens of an example, special tokens included.
      positions: tokens that the model can tell apart, its `config.max_positions`.

    Raises:
      InputError: if `max_length` is more than `positions`, or leaves no room for
        tokens beside the special ones.
    """
    _check_max_length(max_length, positions, tokenizer, examples.text_b is not None)
    input_ids, token_type_ids, num_truncated = [], [], 0
    for start in range(0, len(examples), _CHUNK):
        part = slice(start, start + _CHUNK)
        text_a = examples.text_a[part]
        text_b = None if examples.text_b is None else examples.text_b[part]
        with tokenizing():
            tokens = tokenizer(
                text_a,
                text_b,
                truncation="longest_first",
                max_length=max_length,
                return_attention_mask=False,
            )
        input_ids += [np.array(row, np.int32) for row in tokens["input_ids"]]
        types = tokens.get("token_type_ids", [])
        token_type_ids += [np.array(row, np.int32) for row in types]
        full = [len(row) == max_length for row in tokens["input_ids"]]
        num_truncated += _num_longer(text_a, text_b, full, tokenizer, max_length)
    return Encoded(
        input_ids,
        token_type_ids or None,
        examples.labels,
        max_length,
        # Any id will do for a tokenizer without one: no token attends to padding.
        getattr(tokenizer, "pad_token_id", None) or 0,
        num_truncated,
        weights=examples.weights,
    )


def _num_longer(
    text_a: list[str],
    text_b: list[str] | None,
    is_full: list[bool],
    tokenizer: Tokenizer,
    max_length: int,
) -> int:
    """Returns how many of the examples that fill `max_length` have more tokens."""
    # Not every tokenizer says what it cut off, so these are tokenized whole.
    if not any(is_full):
        return 0
    a = list(compress(text_a, is_full))
    b = None if text_b is None else list(compress(text_b, is_full))
    whole = tokenizer(a, b, return_attention_mask=False, verbose=False)
    return sum(len(row) > max_length for row in whole["input_ids"])


def _check_max_length(
    max_length: int, positions: int, tokenizer: Tokenizer, is_pair: bool
) -> None:
    """Raises unless a model can read texts of this length."""
    if max_length > positions:
        raise InputError(
            f"`max_length` must be at most the {positions} positions of the model, "
            f"got {max_length}."
        )
    # One token of each text is the least that is worth reading.
    least = tokenizer.num_special_tokens_to_add(pair=is_pair) + 1 + is_pair
    if max_length < least:
        raise InputError(
            f"`max_length` must be at least {least}, the special tokens and one of "
            f"each text, got {max_length}."
        )

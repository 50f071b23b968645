"""Token sequences for causal language models, and which tokens are trained on."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np

from sparse_jax.data.batches import TokenSequences
from sparse_jax.data.conversations import Conversation
from sparse_jax.data.tokenizer import Tokenizer, tokenizing
from sparse_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import BatchEncoding

__all__ = ["Loss", "tokenize"]

Loss = Literal["response", "all"]

_ODD = "\N{EGYPTIAN HIEROGLYPH A001}"  # which few vocabularies have
# Conversations that are tokenized at once, to bound the memory.
_CHUNK = 1024


class _Ends(NamedTuple):
    """The special tokens round a text."""

    begin: list[int]  # what the tokenizer puts before a text
    end: int  # the end-of-sequence token
    added: frozenset[int]  # tokens that no other text has


def tokenize(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    positions: int,
    loss: Loss = "response",
    may_be_empty: bool = False,
) -> TokenSequences:
    """Returns the tokens of conversations, each with a token that ends it.

    That is the tokenizer's end-of-sequence token, unless the text has it already or a
    chat template wrote an end of its own.

    A response has the tokens that follow those of its prompt: where the two would
    share a token, they are tokenized apart, as they are when a model writes the
    response. A conversation is truncated to `max_length` tokens, and dropped if no
    target is left. A plain text is not truncated but split into sequences,
    each of which begins with the last token of the one before it, so that every token
    but the first is predicted exactly once.

    Args:
      conversations: texts in pieces.
      tokenizer: a tokenizer of transformers.
      max_length: most tokens of a sequence, special tokens included.
      positions: tokens that the model can tell apart.
      loss: "response" trains on the responses and their end, "all" on every token.
      may_be_empty: whether none of the conversations needs a target.

    Raises:
      InputError: if `max_length` is not in [2, `positions`], if `loss` is unknown, if
        the tokenizer has no end-of-sequence token, or if there are no targets.
    """
    _check(max_length, positions, loss, tokenizer)
    ends = _ends(tokenizer)
    all_ids, targets, weights = [], [], []
    num_long = num_truncated = num_dropped = 0
    end_ids: set[int] = set()
    for marked in _marked(conversations, tokenizer, ends):
        ids, marks = marked.ids, marked.marks
        marks[1:] |= (loss == "all") & ~marked.is_excluded[1:]
        marks[:1] = False
        spans = _spans(len(ids), max_length, marked.is_plain)
        is_long = len(ids) > max_length and not marked.is_plain
        kept = [span for span in spans if marks[span][1:].any()]
        num_long += is_long
        num_truncated += is_long and bool(kept)
        num_dropped += not kept
        end_ids |= marked.ends
        all_ids += [ids[span] for span in kept]
        weights += [marked.weight] * len(kept)
        targets += [_without_first(marks[span]) for span in kept]
    if not (all_ids or num_long or may_be_empty):
        raise InputError(
            f"`data` must have responses to train on, got none in {num_dropped} "
            "examples."
        )
    if not (all_ids or may_be_empty):
        raise InputError(
            f"`max_length` must leave tokens to train on, got {max_length}: each of "
            f"the {num_dropped} examples lost its response. Raise it."
        )
    # Any id will do for a tokenizer without one: no token attends to padding.
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0
    stop = tuple(sorted(end_ids))
    return TokenSequences(
        all_ids, targets, max_length, pad_id, num_truncated, num_dropped, stop,
        weights=np.array(weights, np.float32) if {*weights} - {1.0} else None,
    )  # fmt: skip


def _check(max_length: int, positions: int, loss: str, tokenizer: Tokenizer) -> None:
    """Raises if a number or word is outside its range."""
    if not 2 <= max_length <= positions:
        raise InputError(
            f"`max_length` must be in [2, {positions}], the positions of the model, "
            f"got {max_length}."
        )
    if loss not in ("response", "all"):
        raise InputError(f'`loss` must be "response" or "all", got {loss!r}.')
    if tokenizer.eos_token_id is None:
        raise InputError(
            "`tokenizer` must have an end-of-sequence token, got none, and a model "
            "could not learn to stop. Set `tokenizer.eos_token` and save it."
        )


def _ends(tokenizer: Tokenizer) -> _Ends:
    """Returns the special tokens that belong round a text."""
    (bare,) = _ids(tokenizer, ["a"])
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    begin = next((i for i in starts if whole[i : i + len(bare)] == bare), 0)
    end = cast("int", tokenizer.eos_token_id)
    return _Ends(whole[:begin], end, frozenset({*tokenizer.added_tokens_decoder, end}))


class _Marked(NamedTuple):
    """The tokens of a conversation, not truncated yet."""

    ids: np.ndarray  # shape=(tokens,), int32
    marks: np.ndarray  # the same, bool: tokens of responses
    is_excluded: np.ndarray  # the same: tokens that are never targets
    is_plain: bool
    ends: set[int]  # tokens that end its responses
    weight: float  # of its tokens in the loss


def _marked(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, ends: _Ends
) -> Iterator[_Marked]:
    """Yields the tokens of conversations."""
    tokens = _Pieces(tokenizer, ends)
    for start in range(0, len(conversations), _CHUNK):
        chunk = conversations[start : start + _CHUNK]
        pieces = tokens.of(chunk)
        for conversation in chunk:
            parts = list(islice(pieces, len(conversation.pieces)))
            yield _with_ends(conversation, parts, ends)


def _with_ends(
    conversation: Conversation, parts: list[list[int]], ends: _Ends
) -> _Marked:
    """Returns the tokens of the pieces between those that begin and end a text."""
    ids = list(chain.from_iterable(parts))
    # The text itself may begin with them.
    is_begun = conversation.is_rendered or ids[: len(ends.begin)] == ends.begin
    begin = [] if is_begun else ends.begin
    is_ended = conversation.is_ended or ids[-1:] == [ends.end]
    end = [] if is_ended else [ends.end]
    all_ids = np.array([*begin, *ids, *end], np.int32)
    marks, is_excluded = np.zeros((2, len(all_ids)), bool)
    start = len(begin)
    for piece, part in zip(conversation.pieces, parts, strict=True):
        own = slice(start, start + len(part))
        marks[own], is_excluded[own] = piece.is_response, piece.is_excluded
        start += len(part)
    # The end is of the kind of the last piece.
    marks[start:], is_excluded[start:] = conversation.pieces[-1][1:]
    responses = zip(conversation.pieces, parts, strict=True)
    last_ids = {part[-1] for piece, part in responses if piece.is_response and part}
    found = last_ids & ends.added if conversation.is_ended else {ends.end}
    about = conversation.is_plain, found, conversation.weight
    return _Marked(all_ids, marks, is_excluded, *about)


class _Pieces:
    """The tokens of the pieces of conversations, as they are after the piece before.

    A text is tokenized once if it can be split: if a token ends where a piece does, and
    the tokens up to there are those of the text up to there. Where two tokens meet,
    merges of the first are those it has alone; what follows may only change where rules
    split spaces from words, as in "a\n\nb" by GPT-2's, or digits from digits, so this
    is looked up.
    """

    def __init__(self, tokenizer: Tokenizer, ends: _Ends):
        self.tokenizer = tokenizer
        self.added = ends.added
        self.known: dict[tuple[str, str], bool] = {}
        # A token that is a whole word only is another one if letters follow.
        single = any(
            token.single_word for token in tokenizer.added_tokens_decoder.values()
        )
        # A tokenizer that drops what it cannot spell counts characters without it.
        bare, odd = _ids(tokenizer, ["a", f"a{_ODD}"])
        self.is_worth_trying = not single and bare != odd
        self.dropped = _dropped(tokenizer)

    def of(self, conversations: Sequence[Conversation]) -> Iterator[list[int]]:
        """Yields the tokens of every piece."""
        split: list[list[list[int]] | None] = [None] * len(conversations)
        whole: dict[str, list[int]] = {}
        if self.is_worth_trying:
            split, whole = self._split_all(conversations)
        pairs = [*zip(conversations, split, strict=True)]
        apart = [conversation for conversation, parts in pairs if parts is None]
        rest = self._after_each_other(apart, whole)
        for conversation, parts in pairs:
            yield from (
                islice(rest, len(conversation.pieces)) if parts is None else parts
            )

    def _split_all(
        self, conversations: Sequence[Conversation]
    ) -> tuple[list[list[list[int]] | None], dict[str, list[int]]]:
        """Returns the tokens of the pieces of each text, or None, and of the texts."""
        texts = [conversation.text for conversation in conversations]
        found = _encoded(self.tokenizer, texts)
        ids: list[list[int]] = found["input_ids"]
        # Only tokenizers written in Rust report which characters a token covers.
        encodings = found.encodings or [None] * len(texts)
        encodings = [
            None if self._drops_of(text) else encoding
            for text, encoding in zip(texts, encodings, strict=True)
        ]
        columns = (conversations, ids, encodings)
        split = [
            self._split([piece.text for piece in conversation.pieces], own, encoding)
            for conversation, own, encoding in zip(*columns, strict=True)
        ]
        self.is_worth_trying = 2 * split.count(None) <= len(split)
        return split, dict(zip(texts, ids, strict=True))

    def _split(
        self, texts: list[str], ids: list[int], encoding: "Encoding | None"
    ) -> list[list[int]] | None:
        """Returns the tokens of the pieces of a text, None if they may share some."""
        if len(texts) == 1:
            return [ids]
        if encoding is None or not all(texts):
            return None
        starts, text = [0], ""
        for before, after in pairwise(texts):
            text += before
            place = len(text)
            at = encoding.char_to_token(place)
            if not at:
                return None
            # Tokens may leave out the spaces round them, but not where both meet.
            _, end = encoding.token_to_chars(at - 1) or (None, None)
            start, _ = encoding.token_to_chars(at) or (None, None)
            if not end == place == start:
                return None
            is_known = bool(self.added & {*ids[at - 1 : at + 1]})
            if not (is_known or self._is_end(text, after[0], ids, encoding)):
                return None
            starts.append(at)
        return [ids[slice(*part)] for part in pairwise([*starts, len(ids)])]

    def _drops_of(self, text: str) -> bool:
        """Says whether the tokens of a text leave out some of its bytes."""
        raw = text.encode("utf-8", "surrogatepass")
        return len(raw.translate(None, self.dropped)) < len(raw)

    def _is_end(
        self, text: str, first: str, ids: list[int], encoding: "Encoding"
    ) -> bool:
        """Says whether what ends a text is the same without what follows."""
        last = text[self._start_of_end(text, ids, encoding) :]
        if (last, first) not in self.known:
            found = _encoded(self.tokenizer, [last, last + first])
            head, whole = found["input_ids"]
            # Some tokenizers drop spaces at the end of a text.
            _, both = cast("list[Encoding]", found.encodings)
            at = both.char_to_token(len(last))
            self.known[last, first] = at == len(head) and whole[:at] == head
        return self.known[last, first]

    def _start_of_end(self, text: str, ids: list[int], encoding: "Encoding") -> int:
        """Returns where the part of a text begins that what follows may change."""
        end = len(text)
        while end and not text[end - 1].isalnum():
            end -= 1
        start = max(end - 1, 0)
        # Some rules count digits from their end.
        while start and text[start : start + 1].isdigit() and text[start - 1].isdigit():
            start -= 1
        token = encoding.char_to_token(start)
        if token is not None and ids[token] in self.added:
            start, _ = encoding.token_to_chars(token) or (start, end)
        return start

    def _after_each_other(
        self, conversations: Sequence[Conversation], known: dict[str, list[int]]
    ) -> Iterator[list[int]]:
        """Yields the tokens of every piece, from texts with the piece before it."""
        texts, before = [], []
        for conversation in conversations:
            pieces = [piece.text for piece in conversation.pieces]
            texts += pieces
            before += ["", *pieces][: len(pieces)]
        both = [context + text for context, text in zip(before, texts, strict=True)]
        # A prompt is a text, and the context of its response: once is enough.
        needed = [*{*before, *both} - known.keys()]
        known |= zip(needed, _ids(self.tokenizer, needed), strict=True)
        for text, context, joined in zip(texts, before, both, strict=True):
            head, whole = known[context], known[joined]
            if whole[: len(head)] == head:
                yield whole[len(head) :]
            else:
                yield _apart(self.tokenizer, text)


def _dropped(tokenizer: Tokenizer) -> bytes:
    """Returns the bytes that a tokenizer of bytes cannot spell, and drops."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None or "ByteLevel" not in f"{rust.normalizer}{rust.pre_tokenizer}":
        return b""
    from tokenizers.pre_tokenizers import ByteLevel

    # Printable bytes are spelled as they are, the others by later letters, in order.
    alphabet = sorted(ByteLevel.alphabet())
    order = sorted(range(256), key=lambda byte: (chr(byte) not in alphabet, byte))
    known = tokenizer.get_vocab()
    pairs = zip(order, alphabet, strict=True)
    return bytes(byte for byte, letter in pairs if letter not in known)


def _apart(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the tokens of a text that follows another one but shares no token."""
    # Many tokenizers put a space before a text; after a line break they do not.
    for context in ("\n", "."):
        head, whole = _ids(tokenizer, [context, context + text])
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return _ids(tokenizer, [text])[0]


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Returns the tokens of texts without special ones."""
    return _encoded(tokenizer, texts)["input_ids"]


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> "BatchEncoding":
    """Returns texts without special tokens, and what each token covers."""
    # Not verbose: it warns of long texts, which are split here, not by the tokenizer.
    with tokenizing():
        return tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )


def _spans(num_tokens: int, max_length: int, is_plain: bool) -> list[slice]:
    """Returns the parts of a sequence that fit."""
    if not is_plain:
        return [slice(0, max_length)]
    # The last token of one part is the first of the next, where it is only read.
    starts = range(0, max(num_tokens - 1, 1), max_length - 1)
    return [slice(start, start + max_length) for start in starts]


def _without_first(marks: np.ndarray) -> np.ndarray:
    """Returns marks of which the first is not set."""
    return np.concatenate([[False], marks[1:]])

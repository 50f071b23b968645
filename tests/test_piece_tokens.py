"""A text that is tokenized once has the tokens of its pieces."""

import random

import numpy as np
import pytest
from tiny_tokenizers import characters
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from sparse_jax.data import causal_tokens
from sparse_jax.data.causal_tokens import tokenize
from sparse_jax.data.conversations import Conversation, Piece

SPECIAL = ["<unk>", "</s>", "<|im_end|>"]
CORPUS = [
    "don't do that, they've said: it's the bar's 1234 foo, or 56 of 3456!",
    "foo bar\n\nfoo\n  bar\n\n\nthe foo: the bar... THE Bar \t of\r\n it",
] * 20
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PARTS = (
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "a", "B", "foo", "Bar's", "'", "t"),
    *("12", "3456", "!", ":", "...", "é", "日本", "\u0301", "<|im_end|>", "_x"),
)


def _bytes(*before):
    """Returns merges of bytes, after some rules that split a text."""
    tokenizer = Tokenizer(models.BPE())
    split = [*before, pre_tokenizers.ByteLevel(False, use_regex=not before)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer, {"initial_alphabet": alphabet}


def gpt_2():
    return _bytes()


def llama_3():
    return _bytes(pre_tokenizers.Split(Regex(LLAMA_3), "isolated"))


def whole_words():
    """Returns merges of bytes, to which a token comes that is a whole word only."""
    return _bytes()


def cohere():
    split = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated")
    return _bytes(split, pre_tokenizers.ByteLevel(False))


def stripped():
    tokenizer, trainer, options = _bytes()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer, trainer, options


def without_accents():
    tokenizer, trainer, options = _bytes()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()]
    )
    return tokenizer, trainer, options


def some_bytes():
    """Returns merges of those bytes that some texts have, among them half of "日"."""
    tokenizer, trainer, options = _bytes()
    return tokenizer, trainer, {**options, "initial_alphabet": ["æ", "Ĺ", "ð", "ĵ"]}


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer, {"unk_token": "<unk>"}


def words():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer, {}


def trained(make):
    """Returns a tokenizer of some kind."""
    tokenizer, trainer, options = make()
    options |= {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainer(**options))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if make is whole_words:
        tokenizer.add_tokens([AddedToken("B", single_word=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def conversations(count, parts):
    """Returns texts in pieces that begin and end in all kinds of characters."""
    draw = random.Random(0)
    text = lambda: "".join(draw.choices(parts, k=draw.randint(1, 6)))
    pieces = lambda: [Piece(text(), i % 2 == 1) for i in range(draw.randint(2, 5))]
    return [Conversation(tuple(pieces())) for _ in range(count)]


@pytest.mark.parametrize("make", [gpt_2, llama_3, unigram, words])
def test_a_text_that_is_tokenized_once_has_the_tokens_of_its_pieces(make, monkeypatch):
    tokenizer = trained(make)
    # As likely are "." with ".." and "..", "."; a unigram model may take either.
    parts = [part for part in PARTS if part != "..." or make is not unigram]
    chats = conversations(1000, parts)
    options = {"max_length": 512, "positions": 512}
    once, split = [], causal_tokens._Pieces._split
    spy = lambda *args: once.append(split(*args)) or once[-1]
    monkeypatch.setattr(causal_tokens._Pieces, "_split", spy)
    found = tokenize(chats, tokenizer, **options)
    assert sum(parts is not None for parts in once) > 100
    monkeypatch.setattr(causal_tokens._Pieces, "_split", lambda *args: None)
    expected = tokenize(chats, tokenizer, **options)
    for ours, theirs in zip(
        (*found.input_ids, *found.is_target),
        (*expected.input_ids, *expected.is_target),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("make", "pieces"),
    [
        (cohere, ["5656", "_x"]),  # three digits from the end of a word
        (stripped, ["foo ", "日本"]),  # the prompt alone ends before the space
        (stripped, ["foo", " ", "日本"]),
        (without_accents, ["foo\n\u0301\n", "bar"]),  # the line breaks meet
        (some_bytes, ["!日", "日!!"]),
        (whole_words, ["foo\n\n", "Bar"]),  # unlike "B"
    ],
)
def test_a_piece_has_the_tokens_that_it_has_where_nothing_follows(
    make, pieces, monkeypatch
):
    tokenizer = trained(make)
    chat = Conversation(tuple(Piece(text, i > 0) for i, text in enumerate(pieces)))
    found = tokenize([chat], tokenizer, max_length=64, positions=64)
    monkeypatch.setattr(causal_tokens._Pieces, "_split", lambda *args: None)
    expected = tokenize([chat], tokenizer, max_length=64, positions=64)
    np.testing.assert_array_equal(found.input_ids[0], expected.input_ids[0])
    np.testing.assert_array_equal(found.is_target[0], expected.is_target[0])


@pytest.mark.parametrize(("make", "breaks"), [(gpt_2, ["ĊĊ"]), (llama_3, ["ĊĊ"])])
def test_a_prompt_that_ends_in_blank_lines_has_its_own_tokens(make, breaks):
    tokenizer = trained(make)
    # GPT-2's rules would split the line breaks, as a word follows them.
    chat = Conversation((Piece("foo\n\n", False), Piece("bar", True)))
    found = tokenize([chat], tokenizer, max_length=64, positions=64)
    spelled = tokenizer.convert_ids_to_tokens(found.input_ids[0].tolist())
    assert spelled == ["foo", *breaks, "bar", "</s>"]


def test_a_tokenizer_that_drops_what_it_cannot_spell_is_asked_for_each_piece():
    # By what it reports, "d" is the second character.
    chat = Conversation((Piece("c日", False), Piece("de", True)))
    found = tokenize([chat], characters(), max_length=64, positions=64)
    spelled = characters().convert_ids_to_tokens(found.input_ids[0].tolist())
    assert spelled == ["<s>", "c", "d", "e", "</s>"]
    assert found.is_target[0].tolist() == [False, False, True, True, True]


def test_texts_that_cannot_be_split_are_not_tried_for_long(monkeypatch):
    tried = []
    monkeypatch.setattr(
        causal_tokens._Pieces, "_split", lambda *args: tried.append(args) and None
    )
    chats = [Conversation((Piece("c", False), Piece("d", True)))] * 3000
    tokenize(chats, trained(gpt_2), max_length=8, positions=8)
    assert len(tried) == 1024

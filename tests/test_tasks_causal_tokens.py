import numpy as np
import pytest
from tiny_tokenizers import CHATML, characters
from tokenizers import processors

from sparse_jax.data.causal_tokens import tokenize
from sparse_jax.data.chat import render_chat
from sparse_jax.data.conversations import (
    Conversation,
    Piece,
    plain_text,
    prompt_and_response,
)
from sparse_jax.data.instructions import load_conversations
from sparse_jax.data.tokenizer import load_tokenizer
from sparse_jax.errors import InputError

END = 1


def tokens_of(conversation, tokenizer=None, *, max_length=64, loss="response"):
    """Returns the spelling of the tokens and of those that are targets."""
    tokenizer = tokenizer or characters()
    sequences = tokenize(
        [conversation], tokenizer, max_length=max_length, positions=1024, loss=loss
    )
    (ids,), (marks,) = sequences.input_ids, sequences.is_target
    assert (ids.dtype, marks.dtype) == (np.int32, bool)
    words = tokenizer.convert_ids_to_tokens(ids.tolist())
    return words, [word for word, mark in zip(words, marks, strict=True) if mark]


def test_the_targets_are_the_response_and_its_end():
    words, targets = tokens_of(prompt_and_response("2+2=", "4"))
    assert words == ["<s>", "2", "+", "2", "=", "4", "</s>"]
    assert targets == ["4", "</s>"]


def test_all_tokens_but_the_first_are_targets_if_wanted():
    words, targets = tokens_of(prompt_and_response("2+2=", "4"), loss="all")
    assert targets == words[1:]


@pytest.mark.parametrize("adds_begin", [True, False])
def test_the_beginning_is_the_tokenizers_own(adds_begin):
    words, _ = tokens_of(plain_text("c"), characters(adds_begin=adds_begin))
    assert words == ["<s>"] * adds_begin + ["c", "</s>"]


def test_a_tokenizer_that_appends_an_end_gives_one_end():
    tokenizer = characters()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    words, _ = tokens_of(plain_text("c"), tokenizer)
    assert words == ["<s>", "c", "</s>"]


def test_an_end_that_is_written_out_is_not_doubled():
    words, targets = tokens_of(prompt_and_response("c", "d</s>"))
    assert words == ["<s>", "c", "d", "</s>"]
    assert targets == ["d", "</s>"]


@pytest.mark.parametrize("last", ["<|im_end|>", "<|im_start|>", "<s>"])
def test_another_special_token_is_no_end(last):
    _, targets = tokens_of(prompt_and_response("c", f"d{last}"))
    assert targets == ["d", last, "</s>"]


@pytest.mark.parametrize("loss", ["response", "all"])
@pytest.mark.parametrize("text", ["<s>c", "c"])
def test_a_text_has_one_beginning(text, loss):
    words, targets = tokens_of(plain_text(text), loss=loss)
    assert (words, targets) == (["<s>", "c", "</s>"], ["c", "</s>"])
    words, targets = tokens_of(prompt_and_response(text, "d"))
    assert (words, targets) == (["<s>", "c", "d", "</s>"], ["d", "</s>"])


def test_padding_like_the_end_leaves_the_end_a_target():
    tokenizer = characters(pad_token="</s>", padding_side="left")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == END
    assert tokens_of(prompt_and_response("c", "d"), tokenizer)[1] == ["d", "</s>"]


def test_settings_of_a_tokenizer_file_cut_and_pad_nothing():
    tokenizer = characters()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert tokens_of(prompt_and_response("cc", "dd"), tokenizer)[1] == [*"dd", "</s>"]


def test_the_ends_of_responses_are_counted():
    chats = [plain_text("c"), prompt_and_response("c", "d</s>")]
    found = tokenize(chats, characters(), max_length=8, positions=8)
    assert found.end_ids == (END,)
    rendered = Conversation((Piece("c", False), Piece("d<|im_end|>", True)), True, True)
    found = tokenize([rendered, *chats], characters(), max_length=8, positions=8)
    assert found.end_ids == (END, 3)


@pytest.mark.parametrize(
    ("prompt", "response", "targets"),
    [
        ("c:", "\nd", ["\n", "d"]),  # as one text, the two share the token ":\n"
        ("ca", "bd", ["b", "d"]),  # the same with letters
        ("c:\n", "ab", ["ab"]),
        ("c", "", []),
    ],
)
@pytest.mark.parametrize("adds_space", [False, True])
def test_a_response_shares_no_token_with_its_prompt(
    prompt, response, targets, adds_space
):
    tokenizer = characters(adds_space=adds_space)
    words, marked = tokens_of(prompt_and_response(prompt, response), tokenizer)
    assert marked == [*targets, "</s>"]
    assert "".join(words[1:-1]).removeprefix("▁") == prompt + response


def test_a_response_gets_no_space_that_is_not_in_the_text():
    tokenizer = characters(adds_space=True)
    words, targets = tokens_of(prompt_and_response("c", "d"), tokenizer)
    assert words == ["<s>", "▁", "c", "d", "</s>"]
    assert tokens_of(prompt_and_response("c", " a"), tokenizer)[1] == ["▁a", "</s>"]


def test_the_tokens_of_a_prompt_are_those_of_the_prompt_alone():
    tokenizer = characters(adds_space=True)
    for prompt in ("c:", "ca", "c ", "c:\n"):
        alone = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
        words, _ = tokens_of(prompt_and_response(prompt, "\nabd"), tokenizer)
        assert words[: len(alone)] == alone


def test_every_turn_of_the_assistant_is_a_target():
    tokenizer = characters(chat_template=CHATML)
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [
        {"role": role, "content": content}
        for role, content in zip(roles, "cdefg", strict=True)
    ]
    (chat,) = render_chat(messages, tokenizer, "here")
    words, targets = tokens_of(chat, tokenizer, max_length=256)
    assert targets == ["e", "<|im_end|>", "g", "<|im_end|>"]
    # The template writes no beginning, so there is none.
    assert words[0] == "<|im_start|>"
    assert words.count("</s>") == 0


def test_a_template_without_an_end_gets_one():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = characters(chat_template=template)
    messages = [
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    (chat,) = render_chat(messages, tokenizer, "here")
    assert tokens_of(chat, tokenizer)[1][-2:] == ["d", "</s>"]


def test_a_long_response_is_truncated():
    words, targets = tokens_of(prompt_and_response("cc", "d" * 9), max_length=8)
    assert words == ["<s>", "c", "c", *"ddddd"]
    assert targets == [*"ddddd"]  # no end: the response does not end here


def test_a_conversation_without_targets_is_dropped_and_counted():
    conversations = [
        prompt_and_response("c" * 9, "d"),
        prompt_and_response("c" * 5, "dddd"),
        prompt_and_response("c", "d"),
    ]
    sequences = tokenize(conversations, characters(), max_length=8, positions=8)
    assert [len(ids) for ids in sequences.input_ids] == [8, 4]
    assert (sequences.num_truncated, sequences.num_dropped) == (1, 1)
    assert sequences.num_targets == 4


def test_a_plain_text_becomes_blocks_that_predict_every_token_once():
    text = "".join(np.random.default_rng(0).choice([*"cdefgh"], 100))
    tokenizer = characters()
    sequences = tokenize([plain_text(text)], tokenizer, max_length=16, positions=16)
    predicted = [
        token
        for ids, marks in zip(sequences.input_ids, sequences.is_target, strict=True)
        for token in ids[marks].tolist()
    ]
    assert predicted == [*tokenizer(text)["input_ids"][1:], END]
    lengths = [len(ids) for ids in sequences.input_ids]
    assert lengths == [16] * 6 + [12]
    assert not any(marks[0] for marks in sequences.is_target)
    assert (sequences.num_truncated, sequences.num_dropped) == (0, 0)


@pytest.mark.parametrize("num_letters", range(12, 18))
def test_no_block_is_without_a_target(num_letters):
    sequences = tokenize(
        [plain_text("c" * num_letters)], characters(), max_length=8, positions=8
    )
    assert all(marks.any() for marks in sequences.is_target)
    assert sequences.num_targets == num_letters + 1


def test_chunks_keep_the_order():
    conversations = [
        Conversation((Piece("c" * (i % 7 + 1), False), Piece("d" * (i % 5 + 1), True)))
        for i in range(2500)
    ]
    sequences = tokenize(conversations, characters(), max_length=32, positions=32)
    assert [int(m.sum()) for m in sequences.is_target] == [
        i % 5 + 2 for i in range(2500)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, r"`max_length` must be in \[2, 64\], the positions of"),
        ({"max_length": 1}, r"`max_length` must be in \[2, 64\]"),
        ({"loss": "prompt"}, '`loss` must be "response" or "all", got \'prompt\'.'),
        ({"max_length": 4}, "leave tokens to train on, got 4: each of the 1 examples"),
    ],
)
def test_a_wrong_setting_is_an_error(options, message):
    settings = {"max_length": 64, "positions": 64} | options
    with pytest.raises(InputError, match=message):
        tokenize([prompt_and_response("ccccc", "d")], characters(), **settings)


def test_a_tokenizer_without_an_end_is_an_error():
    tokenizer = characters(eos_token=None)
    with pytest.raises(InputError, match="`tokenizer` must have an end-of-sequence"):
        tokenize([plain_text("c")], tokenizer, max_length=8, positions=8)


@pytest.mark.parametrize("name", ["babyllama-1m", "tinystories-656k"])
def test_genuine_tokenizers_give_back_the_text(shared_data, name):
    folder = shared_data / "models" / name
    data = shared_data / "instruct/alpaca_en_demo.json"
    if not (folder.is_dir() and data.is_file()):
        pytest.skip(f"needs {folder} and {data}")
    tokenizer = load_tokenizer(folder)
    conversations = load_conversations(data, tokenizer, held_out=0)["train"][:100]
    options = {"max_length": 8192, "positions": 8192}
    sequences = tokenize(conversations, tokenizer, **options)
    assert (len(sequences), sequences.num_truncated) == (100, 0)
    for conversation, ids, marks in zip(
        conversations, sequences.input_ids, sequences.is_target, strict=True
    ):
        prompt = tokenizer(conversation.pieces[0].text)["input_ids"]
        assert ids[: len(prompt)].tolist() == prompt
        assert marks.tolist() == [False] * len(prompt) + [True] * (
            len(ids) - len(prompt)
        )
        assert ids[-1] == tokenizer.eos_token_id
        # Neither has all characters, so the text is the one they can spell.
        spelled = tokenizer.decode(tokenizer(conversation.text)["input_ids"][1:])
        assert tokenizer.decode(ids[1:-1]) == spelled


def test_genuine_long_text_is_cut_into_full_blocks(shared_data):
    folder = shared_data / "models/babyllama-1m"
    path = shared_data / "instruct/tinystories.txt"
    if not (folder.is_dir() and path.is_file()):
        pytest.skip(f"needs {folder} and {path}")
    tokenizer = load_tokenizer(folder)
    train = load_conversations(path, tokenizer)["train"]
    sequences = tokenize(train, tokenizer, max_length=256, positions=256)
    assert {len(ids) for ids in sequences.input_ids[:-1]} == {256}
    num_tokens = len(tokenizer(train[0].text)["input_ids"]) + 1
    assert len(sequences) == -(-(num_tokens - 1) // 255)
    assert sequences.num_targets == num_tokens - 1

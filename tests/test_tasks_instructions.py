import json
import re

import pytest
from tiny_tokenizers import CHATML, characters

from sparse_jax.data.chat import render_chat
from sparse_jax.data.conversations import (
    ALPACA,
    LLM_ADAPTERS,
    Piece,
    plain_text,
    prompt_and_response,
)
from sparse_jax.data.instructions import load_conversations
from sparse_jax.errors import InputError

ADD = {"instruction": "Add.", "input": "1, 2", "output": "3"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you."},
    ]
}
PIECES = (
    Piece(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        False,
    ),
    Piece("Hello.<|im_end|>", True),
    Piece("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
    Piece("See you.<|im_end|>", True),
)
# As Qwen 3 does: thoughts are shown in the last turn only.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if loop.last and m.role == 'assistant' %}(thought){% endif %}"
    "{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PICKY = "{{ raise_exception('Roles must alternate.') }}"


@pytest.fixture
def write(tmp_path):
    def write(**contents):
        for name, content in contents.items():
            stem, _, suffix = name.rpartition("_")
            path = tmp_path / f"{stem}.{suffix}"
            path.write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        return tmp_path

    return write


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def load(data, **options):
    tokenizer = characters(chat_template=CHATML)
    return load_conversations(data, tokenizer, **{"held_out": 0} | options)


def only(data, **options):
    """Returns the only conversation of a file."""
    ((conversation,),) = load(data, **options).values()
    return conversation


@pytest.mark.parametrize(
    ("record", "conversation"),
    [
        (ADD, prompt_and_response(ALPACA.fill("Add.", "1, 2"), "3")),
        (ADD | {"input": ""}, prompt_and_response(ALPACA.fill("Add."), "3")),
        (ADD | {"input": None}, prompt_and_response(ALPACA.fill("Add."), "3")),
        (
            {"instruction": "Add.", "output": "3", "text": "rendered"},
            prompt_and_response(ALPACA.fill("Add."), "3"),
        ),
        (
            {"prompt": "1 + 2 =", "completion": " 3"},
            prompt_and_response("1 + 2 =", " 3"),
        ),
        ({"text": "Once.", "url": "x"}, plain_text("Once.")),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_record_becomes_a_conversation(write, record, conversation, suffix):
    content = json.dumps([record]) if suffix == "json" else lines(record)
    assert only(write(**{f"train_{suffix}": content})) == conversation


def test_the_prompt_can_be_chosen(write):
    data = write(train_jsonl=lines(ADD))
    prompt = only(data, template=LLM_ADAPTERS).pieces[0].text
    assert prompt == LLM_ADAPTERS.fill("Add.", "1, 2")


def test_a_chat_is_written_by_its_template(write):
    chat = only(write(train_jsonl=lines(CHAT)))
    assert chat.is_rendered
    assert chat.pieces == PIECES


def test_share_gpt_says_the_same_in_other_words(write):
    names = {"user": "human", "assistant": "gpt"}
    turns = [
        {"from": names[message["role"]], "value": message["content"]}
        for message in CHAT["messages"][1:]
    ]
    record = {"id": 1, "system": "Be brief.", "conversations": turns}
    assert only(write(train_json=json.dumps([record]))).pieces == PIECES


def test_what_follows_the_last_answer_is_left_out(write):
    messages = [*CHAT["messages"], {"role": "user", "content": "Wait"}]
    assert only(write(train_jsonl=lines({"messages": messages}))).pieces == PIECES


def test_a_template_that_rewrites_old_turns_gives_one_conversation_for_each():
    tokenizer = characters(chat_template=FORGETFUL)
    first, second = render_chat(CHAT["messages"][1:], tokenizer, "here")
    assert first.pieces == (
        Piece("<user>Hi</s><assistant>", False),
        Piece("(thought)Hello.</s>", True),
    )
    assert second.pieces == (
        Piece("<user>Hi</s><assistant>Hello.</s><user>Bye</s><assistant>", False),
        Piece("(thought)See you.</s>", True),
    )


def test_a_text_file_is_one_document(write):
    text = "Once.\n\nUpon a time.\n"
    assert only(write(story_txt="\ufeff" + text)) == plain_text(text)


def test_a_folder_has_files_for_its_splits(write):
    folder = write(train_jsonl=lines(ADD, ADD), val_json=json.dumps([ADD]), x_md="")
    splits = load(folder, held_out=0.5)
    assert {name: len(records) for name, records in splits.items()} == {
        "train": 2,
        "validation": 1,
    }


def test_a_better_name_for_validation_wins(write):
    folder = write(train_txt="a", dev_txt="b", validation_txt="c")
    assert load(folder)["validation"] == [plain_text("c")]


@pytest.mark.parametrize(
    ("num_records", "held_out", "sizes"),
    [
        (100, 0.05, {"train": 95, "validation": 5}),
        (2, 0.05, {"train": 1, "validation": 1}),
        (3, 0.99, {"train": 1, "validation": 2}),
        (3, 0, {"train": 3}),
    ],
)
def test_a_share_is_held_out_of_a_single_file(write, num_records, held_out, sizes):
    records = [{"text": f"text {i}"} for i in range(num_records)]
    path = write(data_jsonl=lines(*records)) / "data.jsonl"
    splits = load(path, held_out=held_out)
    assert {name: len(split) for name, split in splits.items()} == sizes
    texts = [conversation.text for split in splits.values() for conversation in split]
    assert sorted(texts) == sorted(record["text"] for record in records)
    assert splits == load(path, held_out=held_out)


def test_the_seed_chooses_what_is_held_out(write):
    folder = write(train_jsonl=lines(*({"text": f"text {i}"} for i in range(100))))
    chosen = [load(folder, held_out=0.1, seed=seed)["validation"] for seed in (0, 1)]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("space", [" ", "\n"])
def test_the_end_of_a_document_is_held_out(write, space):
    text = space.join(["word"] * 100)
    splits = load(write(train_txt=text), held_out=0.1)
    ((train,), (validation,)) = splits.values()
    assert train.text + validation.text == text
    assert validation.text == space.join(["word"] * 11)  # the cut is in a word


BAD = [
    ("train_jsonl", "", "train.jsonl` must have examples, got none."),
    ("train_json", "[]", "train.json` must have examples, got none."),
    ("train_txt", " \n", "train.txt` must have examples, got none."),
    ("train_jsonl", lines(ADD) + "{", "line 2 must be a JSON object: Expecting"),
    ("train_json", '[\n{"text": }]', "train.json` line 2 must be JSON: Expecting"),
    ("train_json", "{}", "train.json` must be a list of objects, got dict."),
    ("train_jsonl", "[1]", "line 1 must be an object, got list."),
    ("train_jsonl", b'{"text": "a"}\n\xff', "line 2 must be UTF-8, got the byte 0xff"),
    ("train_txt", b"a\nb\xff", "train.txt` line 2 must be UTF-8, got the byte 0xff."),
    (
        "train_jsonl",
        r'{"text": "\ud83d"}',
        "line 1 must have whole characters in `text",
    ),
    (
        "train_jsonl",
        lines({"question": "a"}),
        "line 1 must have a column `messages`, `conversations`, `instruction`, "
        "`prompt` or `text`, got the columns question.",
    ),
    ("train_jsonl", "{}", "`text`, got the columns of an empty object."),
    ("train_jsonl", lines({"instruction": "a"}), "line 1 must have a column `output`"),
    ("train_jsonl", lines(ADD | {"output": 3}), "must have a text in `output`, got 3."),
    ("train_jsonl", lines(ADD | {"input": []}), "must have a text in `input`, got []."),
    ("train_jsonl", lines({"text": None}), "must have a text in `text`, got None."),
    ("train_jsonl", lines({"prompt": "a"}), "must have a column `completion`"),
    (
        "train_jsonl",
        lines(ADD, ADD | {"history": [["a", "b"]]}),
        "line 2 must have no `history`: the prompt has no place for it.",
    ),
    ("train_jsonl", lines({"messages": []}), "must have a list of turns in `messages`"),
    ("train_jsonl", lines({"messages": ["a"]}), "turn 1 must be an object, got str."),
    (
        "train_jsonl",
        lines({"messages": [{"role": "user"}]}),
        "line 1 turn 1 must have a column `content`, got the columns role.",
    ),
    (
        "train_jsonl",
        lines({"messages": [{"role": "assistant", "content": None}]}),
        "line 1 turn 1 must have a text in `content`, got None.",
    ),
    (
        "train_jsonl",
        lines({"messages": CHAT["messages"][:2]}),
        "line 1 must have a message of the assistant to train on, got none.",
    ),
    (
        "train_jsonl",
        lines(CHAT | {"tools": [{"name": "search"}]}),
        "line 1 must have no `tools`, which the chat template leaves out, got 'search'",
    ),
    (
        "train_jsonl",
        lines({"conversations": [{"from": "bard", "value": "a"}]}),
        "line 1 turn 1 must be from system, human, user, gpt, assistant, got 'bard'.",
    ),
    (
        "train_csv",
        "words\na\n",
        "train.csv` line 2 must have a column `messages`, ",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_an_error_says_what_is_wrong_and_where(write, name, content, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load(write(**{name: content}))


@pytest.mark.parametrize(
    ("contents", "options", "message"),
    [
        ({"a_txt": "a", "b_txt": "b"}, {}, "or a single file, got a.txt, b.txt."),
        ({}, {}, "or a single file, got none of these kinds."),
        ({"train_txt": "a", "train_json": "[]"}, {}, "must hold one file `train`, got"),
        (
            {"a_txt": "a b"},
            {"held_out": 1},
            "at least 2 examples to hold one out, got 1.",
        ),
        (
            {"a_txt": "a b"},
            {"held_out": -0.1},
            "`held_out` must not be negative, got -0.1.",
        ),
        ({"a_txt": "one"}, {"held_out": 0.5}, "must have words to hold the last of"),
        (
            {"a_jsonl": lines(ADD)},
            {"held_out": 0.5},
            "must have at least 2 examples to hold one out, got 1.",
        ),
        (
            {"a_jsonl": lines(ADD, ADD)},
            {"held_out": 0.5, "seed": -1},
            "`seed` must not be negative, got -1.",
        ),
    ],
)
def test_a_wrong_folder_or_option_is_an_error(write, contents, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load(write(**contents), **options)


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(InputError, match="`data` must be a file .* and there is none"):
        load(tmp_path / "none")


def test_a_file_of_another_kind_is_an_error(write):
    with pytest.raises(
        InputError, match=r"must end in .json, .jsonl, .txt, .csv, .tsv, .parquet, got"
    ):
        load(write(train_xml="<a/>") / "train.xml")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "line 1 has messages, so `tokenizer` must have a chat template, got no"),
        (PICKY, "line 1 must be messages that the chat template accepts: Roles must"),
        (
            "{{ messages | length }}",
            "to which the chat template adds the assistant's te",
        ),
    ],
)
def test_a_template_that_cannot_write_a_chat_is_an_error(write, template, message):
    folder = write(train_jsonl=lines(CHAT))
    with pytest.raises(InputError, match=re.escape(message)):
        load_conversations(folder, characters(chat_template=template))


@pytest.mark.parametrize(
    ("name", "sizes", "begins"),
    [
        ("alpaca_en_demo.json", (949, 50), "Below is an instruction that describes"),
        ("c4_demo.jsonl", (285, 15), ""),
        ("wiki_demo.txt", (1, 1), "Anarchism is a political philosophy"),
        ("tinystories.txt", (1, 1), "One day, a little girl named Lily"),
    ],
)
def test_genuine_files_are_read(shared_data, name, sizes, begins):
    path = shared_data / "instruct" / name
    if not path.is_file():
        pytest.skip(f"needs {path}")
    splits = load(path, held_out=0.05)
    assert tuple(map(len, splits.values())) == sizes
    assert splits["train"][0].text.startswith(begins)
    assert all(chat.pieces[-1].text.strip() for chat in splits["train"])

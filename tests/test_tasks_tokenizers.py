"""Tokenizer folders that are broken, or that want a stranger's code to run."""

import json
import random

import pytest
from tiny_tokenizers import CHATML, characters

from sparse_jax.data.causal_tokens import tokenize
from sparse_jax.data.conversations import ALPACA
from sparse_jax.data.instructions import read_record
from sparse_jax.data.tokenizer import load_tokenizer, tokenizing
from sparse_jax.errors import InputError
from sparse_jax.generation.writer import chat_tokens, text_tokens

CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
}


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with a whole tokenizer, its template in the configuration."""
    characters(chat_template=CHATML).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    change(tmp_path / "tokenizer_config.json", {"chat_template": CHATML})
    return tmp_path


def change(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoTokenizer": ["code.Theirs", None]}},
        {"auto_map": {"AutoTokenizer": ["owner/name--code.Theirs", "code.Theirs"]}},
        {"auto_map": ["code.Theirs", None]},
    ],
)
@pytest.mark.parametrize("config", [None, {"model_type": "theirs"}])
def test_the_code_of_a_folder_is_never_run(folder, changes, config, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("a question"))
    (folder / "code.py").write_text("raise SystemExit('a stranger ran')\n")
    change(folder / "tokenizer_config.json", changes | {"tokenizer_class": "Theirs"})
    if config is not None:
        named = config | {"auto_map": {"AutoConfig": "code.Theirs"}}
        (folder / "config.json").write_text(json.dumps(named))
    with pytest.raises(
        InputError, match="code of its own .`auto_map`., which is never"
    ):
        load_tokenizer(folder)
    change(folder / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"})
    assert text_tokens("ab", load_tokenizer(folder)) == text_tokens("ab", characters())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"model_max_length": "../../etc/passwd"}),
        ("tokenizer_config.json", {"auto_map": "code"}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
        ("tokenizer_config.json", {"eos_token": {"a": 1}}),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}),
        ("tokenizer.json", {"model": {"type": "WordLevel"}}),
        ("tokenizer.json", {"added_tokens": None}),
    ],
)
def test_a_broken_file_is_one_line(folder, name, changes):
    change(folder / name, changes)
    with pytest.raises(InputError, match="must hold a whole tokenizer: ") as info:
        load_tokenizer(folder)
    assert "\n" not in str(info.value)


def test_a_panic_is_an_error_and_prints_nothing(folder, capfd):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokens = tokenizer["post_processor"]["special_tokens"]
    tokens["other"] = tokens.pop("<s>")
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="must hold a whole tokenizer: "):
        load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")


def test_other_errors_of_a_tokenizer_are_input_errors():
    message = "`tokenizer` must be able to encode every text: "
    with pytest.raises(InputError, match=message), tokenizing():
        characters()([None])
    with pytest.raises(KeyboardInterrupt), tokenizing():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"chat_template": 1}', "[" * 9999]
)
def test_a_broken_old_template_is_one_line(folder, content):
    change(folder / "tokenizer_config.json", {"chat_template": None})
    (folder / "chat_template.json").write_text(content)
    with pytest.raises(InputError, match="chat_template.json` must be"):
        load_tokenizer(folder)


VALUES = (
    None, True, -1, 2**63, 10**400, 0.5, "", "\x1b[2J", "x" * 300, "\ud800", "<s>",
    [], [None], {}, {"content": "x"}, "{{ 1 / 0 }}", "{% for", "../../etc/passwd",
)  # fmt: skip


def places(value, place=()):
    """Yields the places of all values in a value, its vocabulary left out."""
    yield place
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, part in inner:
        if key not in ("vocab", "merges"):
            yield from places(part, (*place, key))


def changed(value, choose):
    """Returns a value of which one part is another or gone."""
    value = json.loads(json.dumps(value))
    *outer, last = choose.choice([place for place in places(value) if place])
    holder = value
    for key in outer:
        holder = holder[key]
    if choose.random() < 0.2:
        del holder[last]
    else:
        holder[last] = choose.choice(VALUES)
    return value


def test_no_change_of_a_chat_raises_anything_else():
    choose, tokenizer = random.Random(0), characters(chat_template=CHATML)
    call = {"function": {"name": "add", "arguments": {"x": 1}}}
    last = {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}],
        "weight": 1,
    }
    whole = {
        "messages": [*CHAT["messages"], {**last, "tool_calls": [call]}],
        "tools": [{"function": {"name": "add"}}],
        "system": "Brief",
    }
    shares = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}
    asked = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    read = 0
    for _ in range(600):
        record = changed(choose.choice([whole, shares, asked, CHAT]), choose)
        try:
            chats = read_record("here", record, tokenizer, ALPACA)
        except InputError as error:
            assert str(error).startswith(("here", "`tokenizer`"))
            assert len(str(error)) < 600 and str(error).isprintable()
            continue
        found = tokenize(chats, tokenizer, max_length=512, positions=512)
        assert all(marks.any() for marks in found.is_target)
        read += 1
    assert 0 < read < 600


def test_no_change_of_a_file_raises_anything_else(folder):
    choose, loaded = random.Random(0), 0
    names = ("tokenizer.json", "tokenizer_config.json")
    contents = {name: json.loads((folder / name).read_text()) for name in names}
    for _ in range(80):
        name = choose.choice(names)
        (folder / name).write_text(json.dumps(changed(contents[name], choose)))
        try:
            tokenizer = load_tokenizer(folder)
            chat_tokens("ab", tokenizer)
            chats = read_record("here", CHAT, tokenizer, ALPACA)
            tokenize(chats, tokenizer, max_length=512, positions=512)
            loaded += 1
        except InputError as error:
            assert len(str(error)) < 600 and "\n" not in str(error)
        (folder / name).write_text(json.dumps(contents[name]))
    assert 0 < loaded < 80

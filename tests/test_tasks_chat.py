"""Chats in the shapes of well-known templates: targets, prompts, what is refused."""

import json
import re

import pytest
from tiny_tokenizers import CHATML, characters

from sparse_jax.data.causal_tokens import tokenize
from sparse_jax.data.chat import render_chat, render_prompt
from sparse_jax.data.conversations import ALPACA, Piece
from sparse_jax.data.instructions import read_record
from sparse_jax.errors import InputError

# Each of a well-known shape, with what a model writes between the tags.
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{{- '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{- '\n' }}"
    "{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{{- '\n' }}{% endif %}" + _CHATML
)
_LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% if m.role == 'user' %}<s>[INST] {% if loop.index0 == 1 and messages[0].role =="
    " 'system' %}<<{{ messages[0].content }}>>\n\n{% endif %}{{ m.content | trim }}"
    " [/INST]{% else %}{% generation %} {{ m.content | trim }} </s>{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
_LLAMA_3 = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }}<|head|>\n\n{{- '\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content | trim }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|head|>\n\n"
    "{{- '\n\n' }}{% endif %}"
)
_GEMMA = (
    "<s>{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == "
    "0) %}{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>"
    "{% if m.role == 'assistant' %}model\n{{- '\n' }}{% generation %}"
    "{{ m.content | trim }}<|im_end|>{% endgeneration %}{% else %}{{ m.role }}\n"
    "{{- '\n' ~ m.content | trim }}<|im_end|>{% endif %}\n{{- '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{{- '\n' }}{% endif %}"
)
# A system message stands before the last message of the user, if that is the last.
_MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and "
    "messages[0].role == 'system' %}{{ messages[0].content }}\n\n{{- '\n\n' }}"
    "{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{% generation %} "
    "{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{- '\n' }}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}"
    "<|{{ m.role }}|>\n{{- '\n' ~ m.content }}</s>{% endif %}\n{{- '\n' }}{% if "
    "loop.last and add_generation_prompt %}<|assistant|>\n{{- '\n' }}{% endif %}"
    "{% endfor %}"
)
# A file's end follows the end of the last turn.
_PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{- '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{{- '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{{- '\n' }}{% else %}</s>{% endif %}"
)
# Older thoughts are removed, and the prompt for an answer begins new ones.
_R1 = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}"
    "</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n"
    "{{- '\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": _CHATML, "default system": _DEFAULT_SYSTEM, "Llama 2": _LLAMA_2,
    "Llama 3": _LLAMA_3, "Gemma": _GEMMA, "Mistral": _MISTRAL, "Zephyr": _ZEPHYR,
    "Phi": _PHI,
}  # fmt: skip
ENDS = {"Llama 2": " </s>", "Mistral": "</s>", "Zephyr": "</s>"}
SPACES = {"Llama 2": " ", "Mistral": " "}
ASK = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
AGAIN = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Ta ta."}]
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."}
SYSTEM = {"role": "system", "content": "Brief"}


def tokenizer_of(template, **options):
    """Returns a tokenizer that has the special tokens of all the templates."""
    tokenizer = characters(chat_template=template, **options)
    words = ["[INST]", "[/INST]", "<|head|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.add_tokens(words, special_tokens=True)
    return tokenizer


def responses(turns, template=CHATML, **options):
    """Returns the responses of every conversation."""
    chats = render_chat(turns, tokenizer_of(template), "here", **options)
    return [
        [piece.text for piece in chat.pieces if piece.is_response] for chat in chats
    ]


def flat(chats):
    return [text for chat in chats for text in chat]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("has_system", [False, True])
def test_targets_are_the_answers_and_their_ends(name, has_system):
    turns = [SYSTEM] * has_system + [ASK, ANSWER, *AGAIN]
    if name == "Gemma" and has_system:
        with pytest.raises(
            InputError, match="here must be messages that the chat temp"
        ):
            responses(turns, TEMPLATES[name])
        return
    space, end = SPACES.get(name, ""), ENDS.get(name, "<|im_end|>")
    wanted = [f"{space}{text}{end}" for text in ("Hello.", "Ta ta.")]
    assert flat(responses(turns, TEMPLATES[name])) == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_targets_are_the_tokens_that_transformers_marks(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    turns = [ASK, ANSWER, *AGAIN]
    theirs = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marks = theirs["input_ids"], theirs["assistant_masks"]
    wanted = [number for number, mark in zip(ids, marks, strict=True) if mark]
    chats = render_chat(turns, tokenizer, "here")
    ours = tokenize(chats, tokenizer, max_length=512, positions=512)
    (row,), (is_target,) = ours.input_ids, ours.is_target
    assert row[is_target].tolist() == wanted
    # What follows the last end is left out.
    assert row.tolist() == ids[: len(row)]
    assert ours.end_ids == (tokenizer.convert_tokens_to_ids(name_of_end(name)),)


def name_of_end(name):
    return ENDS.get(name, "<|im_end|>").strip()


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "Gemma"])
def test_the_header_of_a_chat_that_the_assistant_begins_is_no_target(name):
    turns = [ANSWER, ASK, {"role": "assistant", "content": "How are you?"}]
    end = ENDS.get(name, "<|im_end|>")
    found = [text.strip() for text in flat(responses(turns, TEMPLATES[name]))]
    assert found == [f"Hello.{end}", f"How are you?{end}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_training_is_the_prompt_of_generation(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    (chat,) = render_chat([ASK, ANSWER], tokenizer, "here")
    prompt = tokenizer.apply_chat_template(
        [ASK], tokenize=False, add_generation_prompt=True
    )
    assert chat.pieces[0].text == render_prompt([ASK], tokenizer, "here") == prompt


def test_a_system_message_that_only_prompts_have_is_trained_with():
    (first,), (second,) = (
        render_chat([SYSTEM, ASK, ANSWER], tokenizer_of(_MISTRAL), "here"),
        render_chat([SYSTEM, ASK, ANSWER, *AGAIN], tokenizer_of(_MISTRAL), "here")[1:],
    )
    assert first.pieces[0].text == "<s>[INST] Brief\n\nHi[/INST]"
    assert second.pieces[0].text == (
        "<s>[INST] Hi[/INST] Hello.</s>[INST] Brief\n\nBye[/INST]"
    )


def test_a_role_that_the_prompt_lacks_becomes_a_prompt():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = tokenizer_of(template)
    (chat,) = render_chat([ASK, ANSWER, *AGAIN], tokenizer, "here")
    prompt = "user: Hi\nassistant:"
    assert chat.pieces == (
        Piece(prompt, False),
        Piece(" Hello.", True),
        Piece("\nuser: Bye\nassistant:", False),
        Piece(" Ta ta.", True),
    )
    assert render_prompt([ASK], tokenizer, "here") == prompt


def test_thoughts_follow_the_prompt_that_begins_them():
    later = [ASK, THOUGHT, AGAIN[0], {**THOUGHT, "content": "<think>\n</think>Ta."}]
    first, second = render_chat(later, tokenizer_of(_R1), "here")
    asked = "<s><|user|>Hi<|assistant|><think>\n"
    assert first.pieces == (
        Piece(asked, False),
        Piece("Hm.\n</think>\n\nHello.</s>", True),
    )
    assert second.pieces == (
        Piece(
            "<s><|user|>Hi<|assistant|>\n\nHello.</s><|user|>Bye<|assistant|><think>\n",
            False,
        ),
        Piece("</think>Ta.</s>", True),
    )
    assert render_prompt([ASK], tokenizer_of(_R1), "here") == asked


def test_thoughts_that_a_template_removes_are_trained_on():
    template = _R1.replace("<think>\n{{- '\n' }}", "")
    assert responses([ASK, THOUGHT], template) == [[f"{THOUGHT['content']}</s>"]]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"train": 0}])
@pytest.mark.parametrize("loss", ["response", "all"])
def test_an_answer_that_is_not_to_be_trained_on_is_context(mark, loss):
    turns = [ASK, {**ANSWER, **mark}, AGAIN[0], {**AGAIN[1], "weight": 1}]
    tokenizer = tokenizer_of(CHATML)
    chats = render_chat(turns, tokenizer, "here")
    ours = tokenize(chats, tokenizer, max_length=512, positions=512, loss=loss)
    (ids,), (marks,) = ours.input_ids, ours.is_target
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    targets = tokenizer.decode(ids[marks])
    assert "Hello." not in targets and targets.endswith("Ta ta.<|im_end|>")
    assert (targets == "Ta ta.<|im_end|>") == (loss == "response")


@pytest.mark.parametrize("mark", [{"weight": 1}, {"weight": 1.0}, {"train": None}, {}])
def test_an_answer_is_trained_on_otherwise(mark):
    assert responses([ASK, {**ANSWER, **mark}]) == [["Hello.<|im_end|>"]]


def read(record, template=CHATML, **options):
    tokenizer = tokenizer_of(template, **options)
    return read_record("here", record, tokenizer, ALPACA)


def test_parts_of_a_text_are_one_text():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    turns = [ASK, {"role": "assistant", "content": parts}]
    assert read({"messages": turns}) == read({"messages": [ASK, ANSWER]})


def test_share_gpts_words_and_columns_are_read_alike():
    wanted = read({"messages": [SYSTEM, ASK, ANSWER]})
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    for column in ("messages", "conversations"):
        for turns in (share, [ASK, ANSWER]):
            assert read({column: turns, "system": "Brief", "tools": None}) == wanted
    named = [{**ASK, "role": "human"}, {**ANSWER, "role": "gpt"}]
    assert read({"messages": [SYSTEM, *named]}) == wanted
    first = {"from": "gpt", "value": "Ta.", "weight": 0}
    (chat,) = read({"conversations": [*share[:1], first, *share]})
    assert [p.text for p in chat.pieces if p.is_response] == ["Hello.<|im_end|>"]


def test_a_prompt_of_messages_is_only_read():
    (chat,) = read({"prompt": [ASK, ANSWER, AGAIN[0]], "completion": AGAIN[1:]})
    assert [p.text for p in chat.pieces if p.is_response] == ["Ta ta.<|im_end|>"]
    assert "Hello." in chat.pieces[0].text
    assert not any(piece.is_excluded for piece in chat.pieces)


TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize("arguments", [{"x": [1, 2]}, '{"x": [1, 2]}'])
@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD])])
def test_calls_of_functions_are_answers(arguments, tools):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    turns = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '"3"', "name": "add"},
        ANSWER,
    ]
    (chat,) = read({"messages": turns, "tools": tools}, TOOLS)
    assert chat.pieces[0].text.startswith('[{"type": "function", "function": {"name"')
    assert [piece.text for piece in chat.pieces[1:]] == [
        '<call>add {"x": [1, 2]}<|im_end|>',
        '<|im_start|>tool "3"<|im_end|><|im_start|>assistant ',
        "Hello.<|im_end|>",
    ]


CALL = {"function": {"name": "add", "arguments": "{}"}}
_WRONG = [
    ([ASK, {**ANSWER, "weight": 0.5}], "turn 2 must have 0 or 1 as `weight`, got 0.5."),
    ([ASK, {**ANSWER, "weight": "0"}], "turn 2 must have 0 or 1 as `weight`, got '0'."),
    ([ASK, {**ANSWER, "train": []}], "turn 2 must have 0 or 1 as `train`, got []."),
    ([ASK, {**ANSWER, "train": 0, "weight": 1}], "a `train` that agree, got 1 and 0"),
    ([{**ASK, "train": True}, ANSWER], "must be the assistant's to be trained on, got"),
    ([ASK, {**ANSWER, "weight": 0}], "must have a message of the assistant to train"),
    ([SYSTEM], "must have a message of the assistant to train on, got none"),
    ([ASK, {"role": "assistant"}], "turn 2 must have a column `content`, got the col"),
    ([ASK, {**ANSWER, "content": None}], "must have a text in `content`, got None."),
    ([ASK, {**ANSWER, "content": ["a"]}], "part 1 must be of the type 'text', got 'a'"),
    (
        [ASK, {**ANSWER, "content": [{"type": "image"}]}],
        "turn 2 part 1 must be of the type 'text', got 'image'.",
    ),
    ([ASK, {**ANSWER, "content": [{"type": "text"}]}], "part 1 must have a column `te"),
    ([ASK, {**ANSWER, "role": 3}], "must have a text in `role`, got 3."),
    ([{**ASK, "role": "User"}, ANSWER], "must have a role in lower case, got 'User"),
    ([ASK, {**ANSWER, "tool_calls": [CALL]}], "no `tool_calls`, which the chat templ"),
    ([ASK, {**ANSWER, "tool_calls": [{}]}], "list of functions with names in `tool_ca"),
    ([ASK, {**ANSWER, "tool_calls": "x"}], "functions with names in `tool_calls`, got"),
    (
        [ASK, {**ANSWER, "tool_calls": [{"name": "a", "arguments": "x"}]}],
        "turn 2 must have an object as the `arguments` of a call, got 'x'.",
    ),
    ([ASK, {**ANSWER, "reasoning_content": "Hm."}], "must have no `reasoning_content`"),
]


@pytest.mark.parametrize(("turns", "message"), _WRONG)
def test_a_wrong_turn_is_refused_where_it_is(turns, message):
    with pytest.raises(InputError, match=f"^here .*{re.escape(message)}"):
        read({"messages": turns})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [ASK, ANSWER], "tools": [ADD]}, "must have no `tools`, which"),
        ({"messages": [ASK, ANSWER], "tools": [{}]}, "have a list of functions"),
        ({"messages": [ASK, ANSWER], "tools": "["}, "have a list of functions"),
        ({"messages": [SYSTEM, ANSWER], "system": "x"}, "must have one system message"),
        ({"messages": None}, "must have a list of turns in `messages`, got None."),
        ({"prompt": [ASK], "completion": "Hi"}, "turns in `completion`, got 'Hi"),
        ({"prompt": "Hi", "completion": [ANSWER]}, "must have a text in `comple"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_refused(record, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read(record)


@pytest.mark.parametrize(
    ("turns", "template", "message"),
    [
        ([ASK, ANSWER], _R1, "turn 2 must begin with '<think>\\n', as the answer does"),
        (
            [{"role": "critic", "content": "No!"}, ASK, THOUGHT],
            _R1,
            "turn 1 must be a message that the chat template writes, and it leaves one "
            "of the role 'critic' out.",
        ),
        ([ANSWER, ANSWER], _GEMMA, "chat template accepts: roles must alternate."),
        (
            [ASK, ANSWER],
            "{{ messages | length }}",
            "adds the assistant's text, and it ",
        ),
        ([ASK, ANSWER], "{{ messages[-1].content }}", "turn 2 must be a message that"),
    ],
)
def test_a_template_that_does_not_write_a_chat_is_refused(turns, template, message):
    with pytest.raises(InputError, match=re.escape(message)):
        responses(turns, template)


def test_two_answers_in_a_row_have_a_header_each():
    assert responses([ASK, ANSWER, AGAIN[1]]) == [
        ["Hello.<|im_end|>", "Ta ta.<|im_end|>"]
    ]


def test_words_before_the_end_of_a_turn_are_learnt():
    template = CHATML.replace("<|im_end|>", "\n--\n<|im_end|>")
    (chat,) = render_chat([ASK, ANSWER], tokenizer_of(template), "here")
    assert chat.pieces[1].text == "Hello.\n--\n<|im_end|>" and chat.is_ended


@pytest.mark.parametrize("name", [*TEMPLATES, "roles"])
def test_an_empty_answer_is_its_end(name):
    roles = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = tokenizer_of(TEMPLATES.get(name, roles))
    chats = render_chat([ASK, {"role": "assistant", "content": ""}], tokenizer, "here")
    ours = tokenize(chats, tokenizer, max_length=512, positions=512)
    targets = tokenizer.decode(ours.input_ids[0][ours.is_target[0]])
    assert targets.strip() == ("</s>" if name == "roles" else name_of_end(name))


# As Qwen 3 does: thoughts have a place of their own, and old ones are removed.
_QWEN_3 = (
    "{% for m in messages %}{% set parts = m.content.split('</think>') %}<|im_start|>"
    "{{ m.role }}\n{{- '\n' }}{% if m.role == 'assistant' and loop.last %}<think>"
    "{{ '\n' ~ (m.reasoning_content or parts[0].split('<think>')[1] | default('')) |"
    " trim ~ '\n' }}</think>{{ '\n\n' }}{% endif %}{{ parts[-1] | trim }}<|im_end|>"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
    "{{ '\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("turn", "thoughts"),
    [
        (THOUGHT, "Hm."),
        ({**ANSWER, "reasoning_content": "Hm."}, "Hm."),
        (ANSWER, ""),
    ],
)
def test_thoughts_of_the_last_answer_are_trained_on(turn, thoughts):
    first, second = render_chat([ASK, turn, *AGAIN], tokenizer_of(_QWEN_3), "here")
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    answer = f"<think>\n{thoughts}\n</think>\n\nHello.<|im_end|>"
    assert first.pieces == (Piece(asked, False), Piece(answer, True))
    assert second.pieces[0].text.startswith(f"{asked}Hello.<|im_end|>\n")
    assert second.pieces[1].text == "<think>\n\n</think>\n\nTa ta.<|im_end|>"

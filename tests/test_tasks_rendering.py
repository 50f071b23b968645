"""Chat templates that fail, never end, or write more than any memory holds."""

import json
import random
import re
import time

import pytest
from tiny_tokenizers import CHATML, characters

from sparse_jax.data.chat import render_chat
from sparse_jax.data.chat_template import render, require_template
from sparse_jax.data.tokenizer import load_tokenizer
from sparse_jax.errors import InputError

CHAT = [{"role": "user", "content": "Hi"}]
NESTED = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
DOUBLING = (
    "{% set ns = namespace(text='a' * 100) %}{% for i in range(40) %}"
    "{% set ns.text = ns.text ~ ns.text %}{% endfor %}"
)


def written(template, chat=CHAT, **options):
    return render(chat, characters(chat_template=template), "here", **options)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate."),
        ("{{ 1 / 0 }}", "division by zero."),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ messages[0].content.a.b }}", "has no attribute 'a'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{% for", "unexpected 'end of template'"),
        ("{% include 'other' %}", "no loader for this environment"),
        ("{{ messages | unknown }}", "No filter named 'unknown'"),
        ("{{ range(1000000) | list }}", "Range too big"),
        ("{{ ''.__class__.a }}", "attribute '__class__' of 'str' object is unsafe"),
    ],
)
def test_a_template_that_fails_is_one_line(template, reason):
    with pytest.raises(
        InputError, match="^here must be messages that the chat"
    ) as info:
        written(template)
    assert reason in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize(
    "template",
    [
        NESTED,
        "{{ 'a' * 3000000000 }}",
        "{{ 'a' | center(3000000000) }}",
        DOUBLING,
    ],
)
def test_a_template_without_bounds_is_stopped(template):
    began = time.monotonic()
    with pytest.raises(InputError, match="needs at most 2 s and 1 GiB for a chat"):
        written(template)
    assert time.monotonic() - began < 60


def test_a_text_out_of_all_proportion_is_refused():
    template = "{{ messages[0].content * 200 }}"
    assert written(template) == "Hi" * 200
    long = [{"role": "user", "content": "Hi" * 10_000}]
    message = "a text of their size, got 4,000,000 characters for"
    with pytest.raises(InputError, match=message):
        written(template, long)


def test_a_template_that_writes_another_text_each_time_is_refused():
    random.seed(0)
    tokenizer = characters(chat_template="{{ range(9999) | random }} " + CHATML)
    turns = [*CHAT, {"role": "assistant", "content": "Hello."}]
    with pytest.raises(InputError, match="and it changes that text"):
        render_chat(turns, tokenizer, "here")


def test_templates_have_what_transformers_gives_them():
    template = (
        "{{ bos_token }}{% generation %}{{ messages[0] | tojson(indent=1) }}"
        "{% endgeneration %}{{ strftime_now('%Y') | length }}{{ dict(a=1).a }}"
        "{% for m in messages %}{% break %}{% endfor %}"
    )
    wanted = f"<s>{json.dumps(CHAT[0], indent=1)}41"
    assert written(template) == wanted


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "must have a chat template, got none."),
        ({"rag": "a", "tool_use": "b"}, "a default chat template, got rag, tool_use."),
        ({}, "must have a chat template, got none."),
    ],
)
def test_a_tokenizer_needs_one_template(template, message):
    with pytest.raises(InputError, match=re.escape(message)):
        require_template(characters(chat_template=template), "here")


def test_the_default_of_several_templates_is_used():
    templates = {"rag": "{{ 1 / 0 }}", "default": CHATML, "tool_use": "{{ tools[0] }}"}
    assert written(templates) == "<|im_start|>user\nHi<|im_end|>\n"
    assert written(templates, tools=[{"name": "add"}]) == "{'name': 'add'}"


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_template_in_a_file_of_its_own_is_read(tmp_path, name):
    characters().save_pretrained(tmp_path)
    is_json = name.endswith("json")
    content = json.dumps({"chat_template": CHATML}) if is_json else CHATML
    (tmp_path / name).write_text(content, encoding="utf-8")
    text = render(CHAT, load_tokenizer(tmp_path), "here")
    assert text == "<|im_start|>user\nHi<|im_end|>\n"

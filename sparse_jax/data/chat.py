"""Chats: messages, written as one text by a tokenizer's template."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from sparse_jax.data.chat_template import render, require_template
from sparse_jax.data.conversations import Conversation, Piece, join
from sparse_jax.data.messages import (
    Message,
    Turn,
    function_name,
    read_messages,
    read_tools,
)
from sparse_jax.data.tokenizer import Tokenizer
from sparse_jax.errors import InputError, brief

__all__ = ["render_chat", "render_prompt"]

# Stands for the text of an answer, to see what a template writes round it. Nothing
# that a template does to a text changes it, and no text has it.
_MARK = "\ue0a0\ue0a1"


def render_chat(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    place: str,
    *,
    tools: object = None,
    first: int = 0,
) -> list[Conversation]:
    """Returns messages as conversations whose responses are the assistant's turns.

    A response is what the template writes after the prompt for generation: the text
    and the special token that ends the turn. Turns share a conversation if the
    template leaves earlier turns as they were; where it rewrites them (Qwen 3 removes
    old thoughts), each turn is a conversation of its own, with the very prompt that a
    model meets. What follows the last turn of the assistant is left out.

    Args:
      turns: messages as `read_messages` takes them.
      tokenizer: a tokenizer of transformers with a chat template.
      place: file and line, for messages of errors.
      tools: functions that the assistant may call, as `read_tools` takes them.
      first: turns before this one are read only.

    Raises:
      InputError: if the tokenizer has no template, no message is to be trained on, or
        the template does not accept the messages or leaves a part of them out.
    """
    require_template(tokenizer, place)
    messages = read_messages(turns, place, first=first)
    chat = _Chat(messages, tokenizer, place, tuple(read_tools(tools, place)))
    trained = [i for i, message in enumerate(messages) if message.is_trained]
    if not trained:
        raise InputError(
            f"{place} must have a message of the assistant to train on, got none."
        )
    groups: list[list[_Answer]] = []
    for number, message in enumerate(messages[: trained[-1] + 1]):
        if not (message.is_trained or (message.is_answer and message.is_excluded)):
            continue
        answer = _answer(chat, number)
        if not (groups and answer.prompt.startswith(groups[-1][-1].text)):
            groups.append([])
        groups[-1].append(answer)
    _require_whole(chat, trained[-1], groups[-1][-1].prompt)
    return [
        _conversation(answers)
        for answers in groups
        if any(answer.message.is_trained for answer in answers)
    ]


def render_prompt(turns: Sequence[Turn], tokenizer: Tokenizer, place: str) -> str:
    """Returns messages as a prompt for the assistant's answer, as training has it.

    The arguments and errors are those of `render_chat`.
    """
    require_template(tokenizer, place)
    chat = _Chat(read_messages(turns, place), tokenizer, place)
    prompt = _frame(chat, len(turns)).prompt
    _require_whole(chat, len(turns), prompt)
    return prompt


@dataclass(frozen=True)
class _Chat:
    """Messages and all that is needed to write them."""

    messages: Sequence[Message]
    tokenizer: Tokenizer
    place: str
    tools: tuple[Mapping[str, object], ...] = ()

    def text(self, count: int, *more: Mapping[str, object], asks: bool = False) -> str:
        """Returns the first messages, and some more, as the template writes them."""
        fields = [message.fields for message in self.messages[:count]]
        return render(
            [*fields, *more], self.tokenizer, self.place, tools=self.tools, asks=asks
        )


class _Frame(NamedTuple):
    """What a template writes round an answer."""

    prompt: str  # that asks for the answer
    header: str  # before the text of an answer
    tail: str  # after the text of an answer


class _Answer(NamedTuple):
    """An answer as a model has to write it."""

    message: Message
    prompt: str
    response: str
    is_ended: bool  # whether it has a token that ends the turn

    @property
    def text(self) -> str:
        """All that is written up to its end."""
        return self.prompt + self.response


def _conversation(answers: Sequence[_Answer]) -> Conversation:
    """Returns answers of which each has those before it in its prompt."""
    pieces, written = [], 0
    for answer in answers:
        message = answer.message
        pieces += [
            Piece(answer.prompt[written:], False),
            Piece(answer.response, message.is_trained, message.is_excluded),
        ]
        written = len(answer.text)
    # An empty answer stays, for the end that may follow it.
    last = pieces.pop()
    joined = (*join(pieces), last) if not last.text else join([*pieces, last])
    return Conversation(joined, is_rendered=True, is_ended=answers[-1].is_ended)


def _frame(chat: _Chat, count: int) -> _Frame:
    """Returns what a template writes round an answer to the first messages."""
    asked = chat.text(count, asks=True) if count else ""
    probe = chat.text(count, {"role": "assistant", "content": _MARK})
    header, mark, tail = probe.rpartition(_MARK)
    if not mark:
        raise InputError(
            f"{chat.place} must be messages to which the chat template adds the "
            "assistant's text, and it does not. Use another chat template."
        )
    # Some templates know no prompt, and yet write the role before an answer. Then the
    # role belongs to the prompt, but a space to the word after it.
    has_more = header.startswith(asked) and header[len(asked) :].strip()
    if has_more and (not count or asked == chat.text(count)):
        return _Frame(header.rstrip(" "), header, tail)
    return _Frame(asked, header, tail)


def _answer(chat: _Chat, number: int) -> _Answer:
    """Returns a message of the assistant after the prompt that asks for it."""
    message, frame = chat.messages[number], _frame(chat, number)
    body = _body(chat, number, frame)
    kept, is_ended = _kept(frame.tail, chat.tokenizer)
    if body is None:
        response = _as_given(message, frame) + kept
    elif body.endswith(frame.tail):
        response = body[: len(body) - len(frame.tail)] + kept
    # Calls of functions may end otherwise.
    else:
        response = body.rstrip()
        is_ended = response.endswith(_added_tokens(chat.tokenizer))
    if not is_ended:
        response = response.rstrip()
    return _Answer(message, frame.prompt, response, is_ended)


def _body(chat: _Chat, number: int, frame: _Frame) -> str | None:
    """Returns what a template writes after a prompt, None if it lacks the answer."""
    message, whole = chat.messages[number], chat.text(number + 1)
    if whole.startswith(frame.prompt):
        body = whole[len(frame.prompt) :]
    # Some write a system message only into the prompt.
    elif whole.startswith(frame.header) and _end_alike(chat, number, frame):
        gap = frame.header[len(frame.header.rstrip()) :]
        is_given = frame.prompt.endswith(gap)
        body = whole[len(frame.header) - (0 if is_given else len(gap)) :]
    elif frame.header and frame.prompt.startswith(frame.header):
        return None
    else:
        raise InputError(
            f"{message.place} must be a message that the chat template adds to the "
            "text of those before it, and it changes that text. Use another chat "
            "template."
        )
    _require_calls_and_thoughts(message, body)
    if _is_written(message.content, body):
        return body
    if message.calls:
        raise InputError(
            f"{message.place} must have no text besides `tool_calls`, which the chat "
            "template leaves out. Use another chat template."
        )
    return None


def _as_given(message: Message, frame: _Frame) -> str:
    """Returns an answer of which the template removes a part, such as its thoughts."""
    content = message.content
    has_more = frame.prompt.startswith(frame.header)
    begun = frame.prompt[len(frame.header) :] if has_more else ""
    if not content.startswith(begun):
        raise InputError(
            f"{message.place} must begin with {brief(begun)}, as the answer does in "
            f"the chat template's prompt, got {brief(content)}. Write the thoughts "
            "into the message, or use another chat template."
        )
    return content[len(begun) :]


def _end_alike(chat: _Chat, number: int, frame: _Frame) -> bool:
    """Says whether prompt and header are alike after the message before an answer."""
    last = chat.messages[number - 1].content.strip() if number else ""
    if not last or last not in frame.prompt or last not in frame.header:
        return False
    ends = (text.rpartition(last)[2] for text in (frame.prompt, frame.header))
    return len({end.strip() for end in ends}) == 1


def _require_calls_and_thoughts(message: Message, body: str) -> None:
    """Raises if a template leaves out what an answer has beside its text."""
    for call in message.calls:
        if not _is_written(call, body):
            raise InputError(
                f"{message.place} must have no `tool_calls`, which the chat template "
                f"leaves out, got {brief(call)}. Use another chat template."
            )
    for name in ("reasoning_content", "reasoning", "thinking"):
        thoughts = message.fields.get(name)
        if isinstance(thoughts, str) and not _is_written(thoughts, body):
            raise InputError(
                f"{message.place} must have no `{name}`, which the chat template "
                "leaves out. Use another chat template."
            )


def _require_whole(chat: _Chat, count: int, prompt: str) -> None:
    """Raises if a prompt lacks tools, or one of the messages before it."""
    for message in chat.messages[:count]:
        # Templates do not repeat the thoughts of earlier answers.
        if not message.is_answer and not _is_written(message.content, prompt):
            raise InputError(
                f"{message.place} must be a message that the chat template writes, and "
                f"it leaves one of the role {brief(message.fields['role'])} out. Use "
                "another chat template, or remove the message."
            )
    for tool in chat.tools:
        name = function_name(tool)
        if not _is_written(name, prompt):
            raise InputError(
                f"{chat.place} must have no `tools`, which the chat template leaves "
                f"out, got {brief(name)}. Put them into the system message."
            )


def _is_written(part: str, text: str) -> bool:
    """Says whether a text has a part, as it is or as JSON; white space aside."""
    text = "".join(text.split())
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1])
    return any("".join(form.split()) in text for form in forms)


@functools.lru_cache(maxsize=64)
def _kept(tail: str, tokenizer: Tokenizer) -> tuple[str, bool]:
    """Returns what a model learns to write of a tail, and whether that ends a turn.

    The special tokens that come first, or all but white space if none does.
    """
    tokens, rest = _added_tokens(tokenizer), tail.lstrip()
    while rest.startswith(tokens):
        rest = rest[max(len(token) for token in tokens if rest.startswith(token)) :]
    if rest != tail.lstrip():
        return tail[: len(tail) - len(rest)], True
    return tail.rstrip(), tail.rstrip().endswith(tokens)


@functools.lru_cache(maxsize=4)
def _added_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the tokens that a tokenizer does not make of other text."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    return tuple({*added, cast("str | None", tokenizer.eos_token)} - {None, ""})

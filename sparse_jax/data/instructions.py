"""The data of a causal language model: instructions, chats or plain text."""

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from sparse_jax.data.batches import random_of
from sparse_jax.data.chat import render_chat
from sparse_jax.data.conversations import (
    ALPACA,
    Conversation,
    PromptTemplate,
    plain_text,
    prompt_and_response,
)
from sparse_jax.data.examples import text_of
from sparse_jax.data.files import find_file, is_folder
from sparse_jax.data.read_rows import read_objects, read_text
from sparse_jax.data.tokenizer import Tokenizer
from sparse_jax.errors import InputError, brief, listed

__all__ = ["data_files", "load_conversations", "load_whole", "read_record"]

Record = Mapping[str, object]


def read_record(
    place: str, record: Record, tokenizer: Tokenizer, template: PromptTemplate
) -> list[Conversation]:
    """Returns the conversations of a record, nearly always one.

    Its columns say the layout:

    - `messages` or `conversations`: a list of `{"role", "content"}`, or of
      `{"from", "value"}` as ShareGPT has them with the roles `human` and `gpt`,
      written by the chat template; perhaps `system` and `tools`.
    - `instruction`, `output` and perhaps `input`: Alpaca, written by `template`.
    - `prompt`, `completion`: as they stand, or both lists of messages.
    - `text`: a plain text, trained on from its beginning.

    Args:
      place: file and line, for messages of errors.
      record: values by column.
      tokenizer: for its chat template.
      template: for instructions.

    Raises:
      InputError: if there is no such column, or a value is not as described.
    """
    for column, read in _LAYOUTS.items():
        if column in record:
            return read(_Record(place, record, tokenizer, template))
    *names, last = (f"`{name}`" for name in _LAYOUTS)
    raise InputError(
        f"{place} must have a column {', '.join(names)} or {last}, got the columns "
        f"{listed(record) or 'of an empty object'}."
    )


class _Record(NamedTuple):
    """A record, and what is needed to read it."""

    place: str
    fields: Record
    tokenizer: Tokenizer
    template: PromptTemplate

    def chat(self, column: str) -> list[Conversation]:
        turns = self._turns(column)
        if self.fields.get("system"):
            if turns[0].get("role", turns[0].get("from")) == "system":
                raise InputError(
                    f"{self.place} must have one system message, got a column `system` "
                    "and a turn. Leave one of them out."
                )
            turns.insert(0, {"role": "system", "content": self._text_of("system")})
        return self._rendered(turns)

    def instruction(self) -> list[Conversation]:
        for column in ("history", "system"):
            if self.fields.get(column):
                raise InputError(
                    f"{self.place} must have no `{column}`: the prompt has no place "
                    "for it. Write the record as `messages`."
                )
        instruction = self._text_of("instruction")
        # The files have null for no input as well as an empty text.
        has_input = self.fields.get("input") is not None
        given = self._text_of("input") if has_input else ""
        prompt = self.template.fill(instruction, given)
        return [prompt_and_response(prompt, self._text_of("output"))]

    def completion(self) -> list[Conversation]:
        if isinstance(self.fields["prompt"], list):
            read = self._turns("prompt")
            return self._rendered([*read, *self._turns("completion")], first=len(read))
        prompt = self._text_of("prompt")
        return [prompt_and_response(prompt, self._text_of("completion"))]

    def text(self) -> list[Conversation]:
        return [plain_text(self._text_of("text"))]

    def _text_of(self, column: str) -> str:
        return text_of(self.place, self.fields, (column,))

    def _rendered(self, turns: list[Record], first: int = 0) -> list[Conversation]:
        tools = self.fields.get("tools")
        return render_chat(turns, self.tokenizer, self.place, tools=tools, first=first)

    def _turns(self, column: str) -> list[Record]:
        turns = self.fields.get(column)
        if not isinstance(turns, list) or not turns:
            raise InputError(
                f"{self.place} must have a list of turns in `{column}`, got "
                f"{brief(turns)}."
            )
        for number, turn in enumerate(turns, start=1):
            if not isinstance(turn, dict):
                raise InputError(
                    f"{self.place} turn {number} must be an object, got "
                    f"{type(turn).__name__}."
                )
        return list(turns)


# The Alpaca files also have a column `text`, the rendered prompt, so that `text` is
# the last one to look for.
_LAYOUTS: Mapping[str, Callable[[_Record], list[Conversation]]] = MappingProxyType(
    {
        "messages": lambda record: record.chat("messages"),
        "conversations": lambda record: record.chat("conversations"),
        "instruction": _Record.instruction,
        "prompt": _Record.completion,
        "text": _Record.text,
    }
)


_SUFFIXES = (".json", ".jsonl", ".txt")
_VALIDATION = ("validation", "valid", "val", "dev")
# Other random numbers than those of the first epoch.
_HOLDING_OUT = 2

# The conversations of a record stay together when some records are held out.
Texts = list[Conversation]


def load_conversations(
    data: str | Path,
    tokenizer: Tokenizer,
    *,
    template: PromptTemplate = ALPACA,
    held_out: float = 0.05,
    seed: int = 0,
) -> dict[str, list[Conversation]]:
    """Returns the conversations of a file or folder, by split.

    A file is `.jsonl` (a record in each line), `.json` (a list of records), both in
    any layout of `read_record`, or `.txt`, which is one long document. A folder has a
    file `train` and perhaps a file `validation` (or `valid`, `val`, `dev`), or it has
    a single file of any name.

    Without a file for validation, a share of the records is held out at random, or
    of a single document its end, from the start of a word on.

    Args:
      data: file or folder.
      tokenizer: of the model, for its chat template.
      template: the prompt for records with an `instruction`.
      held_out: fraction of the records held out, in [0, 1); 0 gives no validation.
      seed: of the choice of these records, not negative.

    Returns:
      "train", and "validation" if there is any.

    Raises:
      InputError: if there is no such file, if it holds nothing, or if a record is
        wrong: the message has the file and the line.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"`held_out` must be in [0, 1), got {held_out}.")
    train_file, validation_file = data_files(data)
    train = _records(train_file, tokenizer, template)
    validation: list[Texts] = []
    if validation_file is not None:
        validation = _records(validation_file, tokenizer, template)
    elif held_out:
        train, validation = _hold_out(train, held_out, seed, train_file)
    splits = {"train": train, "validation": validation}
    return {name: list(chain(*records)) for name, records in splits.items() if records}


def load_whole(
    data: str | Path, tokenizer: Tokenizer, *, template: PromptTemplate = ALPACA
) -> dict[str, list[Conversation]]:
    """Returns all conversations of a file as "validation".

    The arguments and errors are those of `load_conversations`.
    """
    return {"validation": list(chain(*_records(Path(data), tokenizer, template)))}


def data_files(data: str | Path) -> tuple[Path, Path | None]:
    """Returns the files to train on and, perhaps, for validation.

    The argument and the errors are those of `load_conversations`.
    """
    data = Path(data)
    is_one = is_folder(data)
    if not is_one and data.is_file():
        return data, None
    if not is_one:
        raise InputError(
            f"`data` must be a file ({', '.join(_SUFFIXES)}) or a folder, got "
            f"{brief(str(data))}, and there is none."
        )
    train = find_file(data, ("train",), _SUFFIXES)
    validations = (find_file(data, (stem,), _SUFFIXES) for stem in _VALIDATION)
    validation = next(filter(None, validations), None)
    known = [
        path for path in sorted(data.iterdir()) if path.suffix.lower() in _SUFFIXES
    ]
    if train is None and len(known) == 1:
        return known[0], None
    if train is None:
        found = listed(path.name for path in known) or "none of these kinds"
        raise InputError(
            f"`{data}` must hold a file `train.jsonl`, `train.json` or `train.txt`, or "
            f"a single file, got {found}."
        )
    return train, validation


def _records(path: Path, tokenizer: Tokenizer, template: PromptTemplate) -> list[Texts]:
    """Returns the records of a file."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"`{path}` must end in {', '.join(_SUFFIXES)}, got {path.suffix!r}. "
            "Convert the file to one of these."
        )
    if path.suffix.lower() == ".txt":
        text = read_text(path)
        records = [[plain_text(text)]] if text.strip() else []
    else:
        rows = read_objects(path)
        records = [
            read_record(rows.source.at(number), record, tokenizer, template)
            for number, record in rows.numbered
        ]
    if not records:
        raise InputError(f"`{path}` must have examples, got an empty file.")
    return records


def _hold_out(
    records: list[Texts], share: float, seed: int, path: Path
) -> tuple[list[Texts], list[Texts]]:
    """Returns the records to train on and those held out."""
    if len(records) == 1 and records[0][0].is_plain:
        return _hold_out_end(records[0][0].text, share, path)
    if len(records) == 1:
        raise InputError(
            f"`{path}` must have at least two examples to hold one out, got 1. Pass a "
            "folder with a file `train.jsonl` and a file `validation.jsonl`."
        )
    # At least one on either side.
    size = min(max(round(share * len(records)), 1), len(records) - 1)
    order = random_of(seed, 0, _HOLDING_OUT).permutation(len(records))
    chosen = set(order[:size].tolist())
    return (
        [record for i, record in enumerate(records) if i not in chosen],
        [record for i, record in enumerate(records) if i in chosen],
    )


def _hold_out_end(
    text: str, share: float, path: Path
) -> tuple[list[Texts], list[Texts]]:
    """Returns a document without its end, and the end."""
    end = round(len(text) * (1 - share))
    start = max(text.rfind(space, 0, end) for space in " \n") + 1
    parts = (text[:start], text[start:])
    if not all(part.strip() for part in parts):
        raise InputError(
            f"`{path}` must have words to hold the last of them out, got one word. "
            "Pass a folder with a file `train.txt` and a file `validation.txt`."
        )
    train, validation = ([[plain_text(part)]] for part in parts)
    return train, validation

"""The data of a causal language model: instructions, chats or plain text."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

from sparse_jax.data.chat import render_chat
from sparse_jax.data.conversations import (
    ALPACA,
    Conversation,
    PromptTemplate,
    plain_text,
    prompt_and_response,
)
from sparse_jax.data.examples import choose_held_out, text_of, weight_of
from sparse_jax.data.files import find_file, is_folder
from sparse_jax.data.read_rows import JSON_LINES, PARQUET, Record, Rows, read_text
from sparse_jax.data.sources import (
    HUB,
    Part,
    is_hub_name,
    load_from_hub,
    one_part,
    own_splits,
    place_of,
    rename_columns,
)
from sparse_jax.data.tokenizer import Tokenizer
from sparse_jax.errors import InputError, brief, listed

__all__ = [
    "data_parts",
    "file_part",
    "load_conversations",
    "load_whole",
    "read_conversations",
    "read_record",
    "streamed_files",
]


def read_record(
    place: str, record: Record, tokenizer: Tokenizer, template: PromptTemplate
) -> list[Conversation]:
    """Returns the conversations of a record, nearly always one.

    Its columns say the layout:

    - `messages` or `conversations`: a list of `{"role", "content"}`, or of
      `{"from", "value"}` as ShareGPT has them with the roles `human` and `gpt`,
      written by the chat template; perhaps `system` and `tools`.
    - `instruction`, `output` and perhaps `input`: Alpaca, written by `template`.
    - `prompt`, `completion` (or `response`): as they stand, or both lists of messages.
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
            answer = next((one for one in _COMPLETION if one in self.fields), "")
            return self._rendered([*read, *self._turns(answer)], first=len(read))
        response = text_of(self.place, self.fields, _COMPLETION)
        return [prompt_and_response(self._text_of("prompt"), response)]

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


_COMPLETION = ("completion", "response")
# Ours, for those who rename theirs.
_COLUMNS = (
    ("messages",), ("conversations",), ("instruction",), ("input",), ("output",),
    ("prompt",), _COMPLETION, ("text",), ("system",), ("tools",), ("history",),
)  # fmt: skip
_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".tsv", PARQUET)
_VALIDATION = ("validation", "valid", "val", "dev")

# The conversations of a record stay together when some records are held out.
Texts = list[Conversation]


class _Reading(NamedTuple):
    """How records become conversations."""

    tokenizer: Tokenizer
    template: PromptTemplate
    columns: Mapping[str, str] | None
    is_trained: bool = False  # whether weights count


def load_conversations(
    data: object,
    tokenizer: Tokenizer,
    *,
    template: PromptTemplate = ALPACA,
    columns: Mapping[str, str] | None = None,
    held_out: float = 0.05,
    seed: int = 0,
) -> dict[str, list[Conversation]]:
    """Returns the conversations of a file, folder or another source, by split.

    A file has a record in each row, in any layout of `read_record`: `.jsonl`, `.json`,
    `.csv`, `.tsv` or `.parquet`; or it is `.txt`, one long document. A folder has a
    file `train` and perhaps a file `validation` (or `valid`, `val`, `dev`), or it has
    a single file of any name.

    Without data for validation, a share of the records is held out at random, or
    of a single document its end, from the start of a word on.

    Args:
      data: file or folder, or what else `as_source` returns.
      tokenizer: of the model, for its chat template.
      template: the prompt for records with an `instruction`.
      columns: our names of columns -> those of the data; None are the usual ones.
      held_out: fraction of the records held out below 1, else their number; 0 gives no
        validation.
      seed: of the choice of these records, not negative.

    Returns:
      "train", and "validation" if there is any.

    Raises:
      InputError: if there is no such file, if it holds nothing, or if a record is
        wrong: the message has the file and the line.
    """
    if held_out < 0:
        raise InputError(f"`held_out` must not be negative, got {held_out}.")
    reading = _Reading(tokenizer, template, columns, is_trained=True)
    train_part, validation_part = data_parts(data, seed=seed)
    train = _records(train_part, reading)
    validation: list[Texts] = []
    if validation_part is not None:
        validation = _records(validation_part, reading._replace(is_trained=False))
    elif held_out:
        train, validation = _hold_out(train, held_out, seed, train_part.name)
    splits = {"train": train, "validation": validation}
    return {name: list(chain(*records)) for name, records in splits.items() if records}


def load_whole(
    data: str | Path | Part,
    tokenizer: Tokenizer,
    *,
    template: PromptTemplate = ALPACA,
    columns: Mapping[str, str] | None = None,
) -> dict[str, list[Conversation]]:
    """Returns all conversations of a file, or another list of rows, as "validation".

    The arguments and errors are those of `load_conversations`.
    """
    part = data if isinstance(data, Part) else file_part(data)
    reading = _Reading(tokenizer, template, columns)
    return {"validation": list(chain(*_records(part, reading)))}


def read_conversations(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    template: PromptTemplate = ALPACA,
    columns: Mapping[str, str] | None = None,
) -> list[Conversation]:
    """Returns all conversations of rows that are trained on.

    The arguments and errors are those of `load_conversations`.
    """
    reading = _Reading(tokenizer, template, columns, is_trained=True)
    return list(chain(*_records_of(rows, reading)))


def streamed_files(data: object) -> tuple[Path, Part | None]:
    """Returns the file of JSON lines to stream and, perhaps, a file for validation.

    Raises:
      InputError: if the data are something else.
    """
    place = Path(data) if isinstance(data, str) else None
    if place is not None and (is_folder(place) or place.is_file()):
        train, validation = _data_files(place)
        if train.suffix.lower() == JSON_LINES:
            return train, validation and file_part(validation)
        place = train
    raise InputError(
        "`data` must be a `.jsonl` file with `streaming`, or a folder with "
        f"`train.jsonl`, got {brief(str(place or place_of(data)))}. Write an object a "
        "line, or leave out `streaming`."
    )


def file_part(path: str | Path) -> Part:
    """Returns a file of records, or a document.

    Raises:
      InputError: if its extension is another one.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"`{path}` must end in {', '.join(_SUFFIXES)}, got {path.suffix!r}. "
            "Convert the file to one of these."
        )
    part = one_part(str(path))
    if part is None:
        raise InputError(f"`{path}` must be a file, and there is none.")
    return part


def data_parts(data: object, *, seed: int = 0) -> tuple[Part, Part | None]:
    """Returns what to train on and, perhaps, what there is for validation.

    The arguments and the errors are those of `load_conversations`.
    """
    if isinstance(data, str | Path):
        place = str(data)
        is_there = not place.startswith(HUB) and (
            is_folder(Path(place)) or Path(place).is_file()
        )
        if is_there:
            train, validation = _data_files(Path(place))
            return file_part(train), validation and file_part(validation)
        data = place
    part = one_part(data, seed=seed)
    if part is not None:
        return part, None
    if isinstance(data, str) and not (data.startswith(HUB) or is_hub_name(data)):
        raise InputError(
            f"`data` must be a file ({', '.join(_SUFFIXES)}), a folder or hub:NAME, "
            f"got {brief(data)}, and there is none."
        )
    splits = load_from_hub(data) if isinstance(data, str) else data
    parts = own_splits(cast("Mapping[str, Iterable[Record]]", splits))
    if "train" not in parts:
        raise InputError(f"`data` must have a split `train`, got {listed(parts)}.")
    return parts["train"], next(filter(None, map(parts.get, _VALIDATION)), None)


def _data_files(data: Path) -> tuple[Path, Path | None]:
    """Returns the files of a folder, or the one that is named."""
    if data.is_file():
        return data, None
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


def _records(part: Part, reading: _Reading) -> list[Texts]:
    """Returns the records of a list of rows."""
    if part.path is not None and part.path.suffix.lower() == ".txt":
        text = read_text(part.path)
        records = [[plain_text(text)]] if text.strip() else []
    else:
        records = _records_of(part.read(), reading)
    if not records:
        raise InputError(f"{part.name} must have examples, got none.")
    return records


def _records_of(rows: Rows, reading: _Reading) -> list[Texts]:
    """Returns the records of rows."""
    tokenizer, template, columns, is_trained = reading
    rows = rename_columns(rows, columns, _COLUMNS, is_trained=is_trained)
    found = []
    for number, record in rows.numbered:
        place = rows.source.at(number)
        texts = read_record(place, record, tokenizer, template)
        weight = weight_of(place, record) if rows.is_weighted else 1.0
        found.append([replace(text, weight=weight) for text in texts])
    return found


def _hold_out(
    records: list[Texts], share: float, seed: int, where: str
) -> tuple[list[Texts], list[Texts]]:
    """Returns the records to train on and those held out."""
    if len(records) == 1 and records[0][0].is_plain and share < 1:
        return _hold_out_end(records[0][0].text, share, where)
    chosen = {*choose_held_out(len(records), share, seed, where)}
    return (
        [record for i, record in enumerate(records) if i not in chosen],
        [record for i, record in enumerate(records) if i in chosen],
    )


def _hold_out_end(
    text: str, share: float, where: str
) -> tuple[list[Texts], list[Texts]]:
    """Returns a document without its end, and the end."""
    end = round(len(text) * (1 - share))
    start = max(text.rfind(space, 0, end) for space in " \n") + 1
    parts = (text[:start], text[start:])
    if not all(part.strip() for part in parts):
        raise InputError(
            f"{where} must have words to hold the last of them out, got one word. "
            "Pass a folder with a file `train.txt` and a file `validation.txt`."
        )
    train, validation = ([[plain_text(part)]] for part in parts)
    return train, validation

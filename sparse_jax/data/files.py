"""The data of a task: a folder of files, or a data set of the Hub."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

import numpy as np

from sparse_jax.data.data_checks import kind_of, oddities
from sparse_jax.data.examples import Columns, Examples, Splits, read_columns
from sparse_jax.data.glue import Task
from sparse_jax.data.json_lines import id_of
from sparse_jax.data.labels import (
    class_numbers,
    flag_count,
    has_labels,
    labels_of_flags,
    number_labels,
    resolved,
    without_unlabeled,
)
from sparse_jax.data.read_rows import SUFFIXES, Record, Rows, Source, read_rows
from sparse_jax.errors import InputError, brief, first_line, listed, reason_of
from sparse_jax.models.hf.labels import order_of

__all__ = [
    "GLUE",
    "OneSplit",
    "fetch_rows",
    "find_file",
    "is_file",
    "is_folder",
    "is_hub_name",
    "load",
    "load_one",
    "require_new_split",
]

GLUE = "nyu-mll/glue"  # on the Hub


def is_hub_name(name: str) -> bool:
    """Says whether a word has the form of a data set's name, `owner/name`.

    Example:
      >>> is_hub_name("nyu-mll/glue"), is_hub_name("./glue"), is_hub_name("glue")
      (True, False, False)
    """
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def fetch_rows(task: Task, name: str | None) -> dict[str, Callable[[], Rows]]:
    """Returns readers of the splits of a data set, the training one first.

    Args:
      task: says which splits count, and which configuration of GLUE.
      name: `owner/name`; None is `nyu-mll/glue`.

    Raises:
      InputError: if the data set cannot be fetched or has no split "train".
    """
    splits = _fetch(task, name or GLUE)
    readers = {}
    for split in ("train", *task.evaluation):
        # The Hub calls the main evaluation of MNLI "validation_matched".
        for theirs in (split, f"{split}_matched"):
            if theirs in splits and split not in readers:
                source = Source(f"`{name or GLUE}` {theirs}", "row")
                readers[split] = partial(_rows, source, splits[theirs], task)
    if "train" not in readers:
        raise InputError(
            f"`{name or GLUE}` must have a split `train`, got {listed(splits)}."
        )
    return readers


def _fetch(task: Task, name: str) -> Mapping[str, Iterable[Record]]:
    """Returns a data set's splits by name."""
    # datasets takes seconds to import, so it is imported where it is used.
    from datasets import load_dataset

    configuration = task.name if name == GLUE else None
    try:
        found = load_dataset(name, configuration)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"`data` must be a folder or a data set on the Hugging Face Hub, got "
            f"{name!r}, which is no folder and cannot be fetched: {reason}. Check the "
            "spelling and the connection, or download the files and pass their folder."
        ) from error
    return cast("Mapping[str, Iterable[Record]]", found)


def _rows(source: Source, rows: Iterable[Record], task: Task) -> Rows:
    """Returns the rows of one split, whose classes may be numbered in another order."""
    features = getattr(rows, "features", None) or {}
    for column in task.label:
        names = getattr(features.get(column), "names", None)
        order = order_of(task.labels or (), names or ())
        if order:
            rows = map(partial(_renumbered, column, order), rows)
    return Rows(source, enumerate(rows))


def _renumbered(column: str, order: tuple[int, ...], row: Record) -> Record:
    """Returns a row with the number that a task gives to its class."""
    label = row[column]
    is_known = isinstance(label, int) and label in order
    return {**row, column: order.index(label)} if is_known else row


# Earlier names win. Official folders hold both `train.tsv` and the original files of
# MRPC; a part of the training data held out as `val` gives way to the real `dev`.
_STEMS = MappingProxyType(
    {
        "train": ("train", "msr_paraphrase_train"),
        "validation": ("dev", "validation", "val", "dev_matched", "validation_matched"),
        "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
        "test": ("test", "msr_paraphrase_test"),
    }
)


def load(
    task: Task,
    data: str | Path | None = None,
    *,
    order: Sequence[str] = (),
    drop_unlabeled: bool = False,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Splits:
    """Returns the training and evaluation examples of a task.

    A folder has one file for each split: `train` for training, and for evaluation
    `dev` (or `validation`, or else `val`), `dev_mismatched`, and `test`, with the
    extension `.tsv`, `.txt`, `.csv`, `.json` or `.jsonl`. A split without labels is
    not an evaluation split. Files with other names are not read: where the training
    data are in two files, such as `train` and `val`, join them first to use both.

    Args:
      task: what the columns mean.
      data: folder, or the name of a data set on the Hugging Face Hub; None is
        `nyu-mll/glue`.
      order: names of the labels in the order of a model; labels of the same names are
        numbered like this, others as they are.
      drop_unlabeled: whether to leave out rows without a label.
      more: other files to evaluate on, by the names of their splits.

    Raises:
      InputError: if `data` is neither, has no training split or no evaluation split,
        or if a row is wrong: the message has the file and the line.
    """
    asked, found, dropped = task, _splits(task, data), []
    columns = {"train": read_columns(found.pop("train")(), task)}
    for name, rows in found.items():
        one = read_columns(rows(), task, needs_labels=name != "test")
        if name != "test" or has_labels(one):
            _require_same_texts(columns["train"], one)
            columns[name] = one
    for name, path in more.items():
        require_new_split(name, path, columns)
        one = columns[name] = read_columns(read_rows(path, task), task)
        _require_same_texts(columns["train"], one)
    task = resolved(task, columns["train"])
    if drop_unlabeled:
        for name, one in columns.items():
            columns[name], remark = without_unlabeled(one, task)
            dropped += [] if remark is None else [remark]
    count = flag_count(columns["train"]) if task.is_multilabel else 0
    if count:
        task = replace(task, labels=tuple(map(str, range(count))))
        columns = {name: labels_of_flags(one, count) for name, one in columns.items()}
    task, words = _numbered(task, columns["train"], order)
    examples = {name: number_labels(one, task, words) for name, one in columns.items()}
    if len(examples) == 1:
        raise InputError(
            f"{columns['train'].source.name} must have labeled examples for "
            "evaluation beside it, and there are none. Add a file `dev.tsv` or "
            "`validation.jsonl`."
        )
    is_own = asked.has_optional_text_b
    kind = kind_of(asked, task, examples["train"], are_flags=count > 0)
    notes = (*([kind] if is_own else []), *dropped)
    return Splits(task, examples, notes, tuple(oddities(task, examples)))


class OneSplit(NamedTuple):
    """The examples of one split, as they are predicted."""

    name: str
    task: Task  # with the names of the labels
    examples: Examples  # labels are 0 where they are not asked for
    ids: list[object]  # of the rows: what they have as `id`, or their number from 0
    labels: list[object]  # as they stand in the data, None where there is none


def load_one(
    task: Task,
    data: str | Path | None,
    labels: Sequence[str],
    *,
    split: str | None = None,
    needs_labels: bool = True,
    drop_unlabeled: bool = False,
) -> OneSplit:
    """Returns the examples of a file, or of one split of what `load` takes.

    Args:
      task: what the columns mean.
      data: file, folder, or name on the Hub; None is `nyu-mll/glue`.
      labels: names of the labels in the order of a model.
      split: of a folder or a data set; None is the first to evaluate on.
      needs_labels: whether the examples get the numbers of their labels.
      drop_unlabeled: whether to leave out rows without a label.

    Raises:
      InputError: as of `load`, or if there is no such split.
    """
    name, ids = split or "validation", []
    if data is not None and is_file(data):
        name, rows = Path(data).stem, read_rows(data, task)
    else:
        found = _splits(task, data)
        name = split or next((one for one in found if one != "train"), "train")
        if name not in found:
            raise InputError(f"`split` must be one of {listed(found)}, got {name!r}.")
        rows = found[name]()

    def noted() -> Iterator[tuple[int, Record]]:
        for number, fields in rows.numbered:
            ids.append(id_of(fields, len(ids)))
            yield number, fields

    read = Rows(rows.source, noted())
    columns = read_columns(read, task, needs_labels=needs_labels)
    if drop_unlabeled:
        columns, _ = without_unlabeled(columns, task)
    if task.labels is None:
        task, words = (
            replace(task, labels=(*labels,)),
            {n: i for i, n in enumerate(labels)},
        )
    else:
        task, words = _numbered(task, columns, labels)
    if task.is_multilabel and flag_count(columns) == len(task.labels or ()):
        columns = labels_of_flags(columns, len(labels))
    if needs_labels:
        examples = number_labels(columns, task, words)
    else:
        none = np.zeros(
            (len(ids), len(labels)) if task.is_multilabel else len(ids), int
        )
        examples = Examples(columns.text_a, columns.text_b, none)
    return OneSplit(name, task, examples, ids, columns.labels)


def _numbered(
    task: Task, train: Columns, order: Sequence[str]
) -> tuple[Task, dict[str, int]]:
    """Returns a task with the names of its labels, and the class of every word."""
    if task.is_regression:
        return task, {}
    words = class_numbers(task, train)
    labels = task.labels or tuple(words)
    places = order_of(labels, order) or tuple(range(len(labels)))
    names = tuple(labels[places.index(i)] for i in range(len(labels)))
    task = replace(task, labels=names)
    return task, {word: places[i] for word, i in words.items()}


def _splits(task: Task, data: str | Path | None) -> dict[str, Callable[[], Rows]]:
    """Returns readers of the splits that there are, the training one first."""
    if data is None and task.labels is None:
        raise InputError(
            f"`data` must be given for the task {task.name}, got nothing. Pass a "
            "folder with the files `train.jsonl` and `validation.jsonl`."
        )
    if data is not None and is_folder(Path(data)):
        return _files(task, Path(data))
    if data is None or is_hub_name(str(data)):
        return fetch_rows(task, None if data is None else str(data))
    reason, files = "and there is no such folder", "a folder with"
    if Path(data).is_file():
        reason, files = "which is a file", "its folder, which has to hold"
    raise InputError(
        f"`data` must be a folder or the name of a data set on the Hugging Face Hub, "
        f"got {brief(str(data))}, {reason}. Pass {files} `train.csv` and `dev.csv`, "
        "or files of these names that end with .tsv, .json or .jsonl."
    )


def is_folder(path: Path) -> bool:
    """Says whether there is a folder of this name.

    Raises:
      InputError: if there may be none of this name, or its files cannot be listed.
    """
    try:
        if is_there := path.is_dir():
            next(path.iterdir(), None)
        return is_there
    except OSError as error:
        raise InputError(
            "`data` must be a file or folder that can be read, got "
            f"{brief(str(path))}: {reason_of(error)}."
        ) from error


def is_file(data: str | Path | None) -> bool:
    """Says whether data are a single file; errors are those of `is_folder`."""
    return data is not None and not is_folder(Path(data)) and Path(data).is_file()


def _files(task: Task, folder: Path) -> dict[str, Callable[[], Rows]]:
    """Returns readers of the files of a folder."""
    names = ("train", *task.evaluation)
    paths = {name: path for name in names if (path := find_file(folder, _STEMS[name]))}
    if "train" not in paths:
        found = sorted(path.name for path in folder.iterdir())
        raise InputError(
            f"`{folder}` must hold a training file such as `train.tsv` or "
            f"`train.jsonl`, got {listed(found) or 'an empty folder'}."
        )
    return {name: partial(read_rows, path, task) for name, path in paths.items()}


def find_file(
    folder: Path, stems: tuple[str, ...], suffixes: tuple[str, ...] = SUFFIXES
) -> Path | None:
    """Returns the file of a split, or None.

    Raises:
      InputError: if several files have one name and known extensions.
    """
    for stem in stems:
        paths = sorted(path for path in folder.iterdir() if path.stem.lower() == stem)
        known = [path for path in paths if path.suffix.lower() in suffixes]
        if len(known) > 1:
            raise InputError(
                f"`{folder}` must hold one file `{stem}`, got "
                f"{' and '.join(path.name for path in known)}. Rename one of them."
            )
        # A file of an unknown kind is returned for its reader to refuse.
        if files := known or [path for path in paths if path.is_file()]:
            return files[0]
    return None


def require_new_split(name: str, path: str, splits: Iterable[str]) -> None:
    """Raises `InputError` if there is a split of the name of another file."""
    if name in splits:
        raise InputError(
            f"`eval_data` must have a name that no other split has, got {brief(name)} "
            f"for {brief(path)}. Pass it as NAME=FILE."
        )


def _require_same_texts(train: Columns, other: Columns) -> None:
    """Raises if only one of two splits has pairs of texts."""
    if (train.text_b is None) != (other.text_b is None):
        raise InputError(
            f"{other.source.name} must have a second text exactly if "
            f"{train.source.name} does. Write the same columns in both."
        )

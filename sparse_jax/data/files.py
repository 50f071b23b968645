"""The data of a task: a folder of files, or a data set of the Hub."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from sparse_jax.data.data_checks import kind_of, oddities
from sparse_jax.data.examples import Columns, Examples, Splits, hold_out, read_columns
from sparse_jax.data.glue import Task
from sparse_jax.data.json_lines import id_of
from sparse_jax.data.labels import (
    class_numbers,
    flag_count,
    has_labels,
    labels_of_flags,
    named_labels,
    number_labels,
    resolved,
    without_unlabeled,
)
from sparse_jax.data.read_rows import SUFFIXES, Record, Rows, Source, read_rows
from sparse_jax.data.sources import (
    HUB,
    Part,
    is_hub_name,
    load_from_hub,
    one_part,
    own_splits,
    rename_columns,
)
from sparse_jax.errors import InputError, brief, listed, reason_of
from sparse_jax.models.hf.labels import order_of

__all__ = [
    "GLUE",
    "OneSplit",
    "fetch_rows",
    "find_file",
    "is_folder",
    "load",
    "load_one",
    "require_new_split",
]

GLUE = "nyu-mll/glue"  # on the Hub


def fetch_rows(task: Task, name: str | None) -> dict[str, Callable[[], Rows]]:
    """Returns readers of the splits of a data set, the training one first.

    Args:
      task: says which splits count, and which configuration of GLUE.
      name: `owner/name`; None is `nyu-mll/glue`.

    Raises:
      InputError: if the data set cannot be fetched or has no split "train".
    """
    splits = load_from_hub(name or GLUE, None if name else task.name)
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
    data: object = None,
    *,
    order: Sequence[str] = (),
    drop_unlabeled: bool = False,
    more: Mapping[str, str] = MappingProxyType({}),
    columns: Mapping[str, str] | None = None,
    held_out: float | None = None,
    seed: int = 0,
) -> Splits:
    """Returns the training and evaluation examples of a task.

    A folder has one file for each split: `train` for training, and for evaluation
    `dev` (or `validation`, or else `val`), `dev_mismatched`, and `test`, with the
    extension `.tsv`, `.txt`, `.csv`, `.json`, `.jsonl` or `.parquet`. A split without
    labels is not an evaluation split. Files with other names are not read: where the
    training data are in two files, such as `train` and `val`, join them first.

    Args:
      task: what the columns mean.
      data: folder, file, name of a data set on the Hugging Face Hub, mixture, or rows,
        as `as_source` returns them; None is `nyu-mll/glue`.
      order: names of the labels in the order of a model; labels of the same names are
        numbered like this, others as they are.
      drop_unlabeled: whether to leave out rows without a label.
      more: other files to evaluate on, by the names of their splits.
      columns: our names of columns -> those of the data; None are the usual ones.
      held_out: fraction, or number, of the training rows to evaluate on where there
        are no others, the same fraction of every class; None holds out none.
      seed: of the rows that are held out, or drawn for a mixture.

    Raises:
      InputError: if `data` is none of these, has no training split or no evaluation
        split, or if a row is wrong: the message has the file and the line.
    """
    asked, found, dropped = task, _splits(task, data, seed), []
    renamed = lambda read: rename_columns(read(), columns, _groups(task))
    rows = found.pop("train")()
    rows = rename_columns(rows, columns, _groups(task), is_trained=True)
    splits = {"train": read_columns(rows, task)}
    for name, read in found.items():
        one = read_columns(renamed(read), task, needs_labels=name != "test")
        if name != "test" or has_labels(one):
            _require_same_texts(splits["train"], one)
            splits[name] = one
    for name, path in more.items():
        require_new_split(name, path, splits)
        read = partial(read_rows, path, task)
        one = splits[name] = read_columns(renamed(read), task)
        _require_same_texts(splits["train"], one)
    task = resolved(task, splits["train"])
    if drop_unlabeled:
        for name, one in splits.items():
            splits[name], remark = without_unlabeled(one, task)
            dropped += [] if remark is None else [remark]
    if len(splits) == 1 and held_out is not None:
        are_classes = not (task.is_regression or task.is_multilabel)
        splits["train"], splits["validation"] = hold_out(
            splits["train"], held_out, seed, is_stratified=are_classes
        )
    count = flag_count(splits["train"]) if task.is_multilabel else 0
    if count:
        task = replace(task, labels=tuple(map(str, range(count))))
        splits = {name: labels_of_flags(one, count) for name, one in splits.items()}
    task, words = _numbered(task, splits["train"], order)
    examples = {name: number_labels(one, task, words) for name, one in splits.items()}
    if len(examples) == 1:
        raise InputError(
            f"{splits['train'].source.name} must come with labeled "
            "examples for evaluation, and there are none. Add a file `dev.tsv` or "
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
    labels: list[object]  # as of `named_labels`, None where there is none


def load_one(
    task: Task,
    data: object,
    labels: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    needs_labels: bool = True,
    drop_unlabeled: bool = False,
    held_out: float | None = None,
    seed: int = 0,
) -> OneSplit:
    """Returns the examples of a file, or of one split of what `load` takes.

    Args:
      task: what the columns mean.
      data: what `load` takes.
      labels: names of the labels in the order of a model.
      columns: our names of columns -> those of the data; None are the usual ones.
      split: of a folder or a data set; None is the first to evaluate on.
      needs_labels: whether the examples get the numbers of their labels.
      drop_unlabeled: whether to leave out rows without a label.
      held_out: what `load` holds out, to return that only; None is all.
      seed: of the rows that are held out, or drawn for a mixture.

    Raises:
      InputError: as of `load`, or if there is no such split.
    """
    name, known = split or "validation", {}
    part = one_part(data, seed=seed)
    if part is not None:
        name = "validation" if part.path is None else part.path.stem
        rows = _reader(part, task)()
    else:
        splits = _splits(task, data, seed)
        name = split or next((one for one in splits if one != "train"), "train")
        if name not in splits:
            raise InputError(f"`split` must be one of {listed(splits)}, got {name!r}.")
        rows = splits[name]()
    rows = rename_columns(rows, columns, _groups(task))

    def noted() -> Iterator[tuple[int, Record]]:
        for number, fields in rows.numbered:
            known[number] = id_of(fields, len(known))
            yield number, fields

    numbered = Rows(rows.source, noted())
    found = read_columns(numbered, task, needs_labels=needs_labels)
    if drop_unlabeled:
        found, _ = without_unlabeled(found, task)
    if held_out is not None:
        kind = resolved(task, found)
        are_classes = not (kind.is_regression or kind.is_multilabel)
        _, found = hold_out(found, held_out, seed, is_stratified=are_classes)
    ids = [known[number] for number in found.numbers]
    if task.labels is None:
        words = {name: i for i, name in enumerate(labels)}
        task = replace(task, labels=(*labels,))
    else:
        task, words = _numbered(task, found, labels)
    if task.is_multilabel and flag_count(found) == len(task.labels or ()):
        found = labels_of_flags(found, len(labels))
    if needs_labels:
        examples = number_labels(found, task, words)
    else:
        none = np.zeros(
            (len(ids), len(labels)) if task.is_multilabel else len(ids), int
        )
        examples = Examples(found.text_a, found.text_b, none)
    return OneSplit(name, task, examples, ids, named_labels(found, task, words))


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


def _splits(task: Task, data: object, seed: int) -> dict[str, Callable[[], Rows]]:
    """Returns readers of the splits that there are, the training one first."""
    if data is None and task.labels is None:
        raise InputError(
            f"`data` must be given for the task {task.name}, got nothing. Pass a file, "
            "or a folder with the files `train.jsonl` and `validation.jsonl`."
        )
    if data is None:
        return fetch_rows(task, None)
    part = one_part(data, seed=seed)
    if part is not None:
        return {"train": _reader(part, task)}
    if isinstance(data, Mapping):
        return _by_split(task, own_splits(data))
    place = str(data)
    if not place.startswith(HUB) and is_folder(Path(place)):
        return _files(task, Path(place))
    if place.startswith(HUB) or is_hub_name(place):
        return fetch_rows(task, place)
    raise InputError(
        "`data` must be a file, a folder or the name of a data set on the Hugging Face "
        f"Hub, got {brief(place)}, and there is none of that name. Pass a file such as "
        "`reviews.csv`, or a folder with `train.csv` and `dev.csv`; the files may also "
        "end with .tsv, .json, .jsonl or .parquet."
    )


def _reader(part: Part, task: Task) -> Callable[[], Rows]:
    """Returns a reader of a list of rows; of a file one that knows the task."""
    return part.read if part.path is None else partial(read_rows, part.path, task)


def _groups(task: Task) -> tuple[tuple[str, ...], ...]:
    """Returns our names of columns, those of one column together."""
    return task.text_a, task.text_b, task.label


def _by_split(task: Task, parts: Mapping[str, Part]) -> dict[str, Callable[[], Rows]]:
    """Returns readers of the splits that a program passes."""
    names = ("train", *task.evaluation)
    if "train" not in parts or {*parts} - {*names}:
        raise InputError(
            f"`data` must have splits `train` and perhaps {listed(names[1:])}, got "
            f"{listed(parts)}."
        )
    return {name: parts[name].read for name in names if name in parts}


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

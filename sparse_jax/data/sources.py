"""Places of data: a file, a data set of the Hub, rows of a program, or a mixture."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from sparse_jax.data.read_rows import (
    WEIGHT,
    Record,
    Rows,
    Source,
    as_record,
    read_rows,
)
from sparse_jax.errors import InputError, brief, first_line, listed, reason_of

__all__ = [
    "DataSource",
    "HUB",
    "Part",
    "as_source",
    "file_hash",
    "is_hub_name",
    "is_own_rows",
    "load_from_hub",
    "one_part",
    "own_splits",
    "place_of",
    "rename_columns",
]

DataSource: TypeAlias = (
    "str | Mapping[str, float] | Iterable[Record] | Mapping[str, Iterable[Record]]"
)
HUB = "hub:"
_MIXTURE = re.compile(r"[^=,]+=\s*[\d.eE+-]+(\s*,[^=,]+=\s*[\d.eE+-]+)+\s*")
_MIXING = 3  # a purpose of random numbers


class Part(NamedTuple):
    """One list of rows."""

    name: str  # for messages
    read: Callable[[], Rows]
    digest: str | None = None  # SHA-256 of what can be read again; None is not known
    path: Path | None = None  # of a file


def as_source(value: object) -> object:
    """Returns what `data` is: a place as a text, a mixture with its weights, or rows.

    Raises:
      InputError: if it is none of these, or a weight is not positive.

    Example:
      >>> as_source("chats.jsonl=0.7,code.jsonl=0.3")
      {'chats.jsonl': 0.7, 'code.jsonl': 0.3}
    """
    if isinstance(value, str) and _MIXTURE.fullmatch(value) and not _exists(value):
        pairs = [part.rpartition("=") for part in value.split(",")]
        names = [name.strip() for name, _, _ in pairs]
        if len({*names}) < len(names):
            raise InputError(f"`data` must name a source once, got {brief(value)}.")
        value = {
            name: _weight(said) for name, (*_, said) in zip(names, pairs, strict=True)
        }
    if isinstance(value, Mapping):
        kinds = [*value.values()] or [None]
        if all(isinstance(one, int | float) for one in kinds):
            return {str(name): _weight(one) for name, one in value.items()}
        if all(isinstance(one, Iterable) for one in kinds):
            return value
    elif isinstance(value, str | Iterable):
        return value
    raise InputError(
        "`data` must be a file, a folder, hub:NAME, a mapping of these to weights, or "
        f"rows such as those of a `datasets.Dataset`, got {brief(value)}."
    )


def is_own_rows(data: object) -> bool:
    """Says whether data are rows of a program, which no file can name."""
    if isinstance(data, Mapping):
        return not all(isinstance(one, float) for one in data.values())
    return data is not None and not isinstance(data, str)


def place_of(data: object) -> str:
    """Returns data for a message.

    Example:
      >>> place_of("a.csv"), place_of({"a.csv": 0.5, "b.csv": 1.0})
      ('`a.csv`', '`a.csv, b.csv`')
    """
    if is_own_rows(data):
        return "the rows that were passed"
    return f"`{', '.join(data) if isinstance(data, Mapping) else data}`"


def is_hub_name(name: str) -> bool:
    """Says whether a word has the form of a data set's name, `owner/name`.

    Example:
      >>> is_hub_name("nyu-mll/glue"), is_hub_name("./glue"), is_hub_name("glue")
      (True, False, False)
    """
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def load_from_hub(
    name: str, configuration: str | None = None, split: str | None = None
) -> Mapping[str, Iterable[Record]]:
    """Returns the splits of a data set of the Hub, from its cache without a network.

    Args:
      name: as on the Hub, also as `hub:NAME`, `hub:NAME:CONFIGURATION` or
        `hub:NAME:CONFIGURATION:SPLIT`.
      configuration: of the data set, if the name does not say it.
      split: such as "train[:10%]"; the only one to return then.

    Raises:
      InputError: if it cannot be fetched.
    """
    # datasets takes seconds to import, so it is imported where it is used.
    from datasets import load_dataset

    if name.startswith(HUB):
        name, said, part = f"{name.removeprefix(HUB)}::".split(":", 2)
        configuration, split = said or configuration, part.rstrip(":") or split
    try:
        more: dict[str, Any] = {} if split is None else {"split": split}
        found: Any = load_dataset(name, configuration, **more)
    except (OSError, ValueError) as error:
        raise InputError(
            f"`data` must be a folder or a data set on the Hugging Face Hub, got "
            f"{name!r}, which is no folder and cannot be fetched: {first_line(error)}. "
            "Check the spelling and the connection, or download the files and pass "
            "their folder."
        ) from error
    return found if split is None else {split: found}


def one_part(data: object, *, seed: int = 0) -> Part | None:
    """Returns the rows of data that are one list; None if they are several, or none.

    Args:
      data: what `as_source` returns.
      seed: of the rows that are drawn for a mixture.

    Raises:
      InputError: if there is no such source.
    """
    if isinstance(data, Path):
        data = str(data)
    if isinstance(data, Mapping):
        return None if is_own_rows(data) else _mixture(data, seed)
    if not isinstance(data, str):
        return _own_part("`data`", data) if isinstance(data, Iterable) else None
    if data.startswith(HUB):
        splits = load_from_hub(data)
        if len(splits) > 1:
            return None
        ((split, rows),) = splits.items()
        digest = getattr(rows, "_fingerprint", None)
        return _own_part(f"`{data}` {split}", rows)._replace(digest=digest)
    path = Path(data)
    if _exists(data) and path.is_file():
        return Part(f"`{path}`", partial(read_rows, path), file_hash(path), path)
    return None


def own_splits(data: Mapping[str, Iterable[Record]]) -> dict[str, Part]:
    """Returns the splits that a program passes, by name."""
    return {name: _own_part(f"`data` {name}", rows) for name, rows in data.items()}


def rename_columns(
    rows: Rows,
    columns: Mapping[str, str] | None,
    groups: Iterable[tuple[str, ...]],
    *,
    is_trained: bool = False,
) -> Rows:
    """Returns rows whose columns have our names.

    Args:
      rows: of a file.
      columns: our name -> theirs; None leaves all as they are.
      groups: our names, those of one column together.
      is_trained: whether the rows are trained on; others need no weights.

    Raises:
      InputError: if a name of ours is not known; while iterating, if a row has no
        such column.
    """
    if columns is None:
        return rows
    groups = [*groups, (WEIGHT,)]
    known = [name for group in groups for name in group]
    for ours in columns:
        if ours not in known:
            raise InputError(
                f"`columns` must give names to {listed(known, 20)}, got {brief(ours)}. "
                "Ours come first, as in text=review."
            )
    replaced = {
        name for ours in columns for group in groups if ours in group for name in group
    }
    is_weighted = is_trained and WEIGHT in columns
    if not is_weighted:
        columns = {k: theirs for k, theirs in columns.items() if k != WEIGHT}
    return Rows(rows.source, _renamed(rows, columns, replaced), is_weighted)


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file.

    Raises:
      InputError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"`{path}` must be a file that can be read: {reason_of(error)}."
        ) from error


def _renamed(
    rows: Rows, columns: Mapping[str, str], replaced: set[str]
) -> Iterable[tuple[int, Record]]:
    """Yields rows without the columns of other names for the same."""
    for number, row in rows.numbered:
        for ours, theirs in columns.items():
            if theirs not in row:
                raise InputError(
                    f"`columns` must name columns that are there, got {brief(theirs)} "
                    f"for `{ours}`, and {rows.source.at(number)} has {listed(row, 20)}."
                )
        found = {name: one for name, one in row.items() if name not in replaced}
        yield number, found | {ours: row[name] for ours, name in columns.items()}


def _own_part(name: str, rows: Iterable[object]) -> Part:
    """Returns rows of a program, or of the Hub, numbered from 0."""
    source = Source(name, "row")
    numbered = lambda: ((i, as_record(source.at(i), row)) for i, row in enumerate(rows))
    return Part(name, lambda: Rows(source, numbered()))


def _mixture(weights: Mapping[str, float], seed: int) -> Part:
    """Returns as many rows of all sources as weights allow, none of them twice."""
    parts = []
    for name in weights:
        part = one_part(name, seed=seed)
        if part is None:
            raise InputError(
                "`data` must mix files, or hub:NAME:CONFIGURATION:SPLIT, got "
                f"{brief(name)}. Pass files that are there."
            )
        parts.append(part)
    name = f"`{', '.join(weights)}`"
    digests = [part.digest for part in parts]
    said = repr([digests, [*weights.values()], seed]).encode()
    digest = None if None in digests else hashlib.sha256(said).hexdigest()
    return Part(name, lambda: _mixed(name, parts, [*weights.values()], seed), digest)


def _mixed(name: str, parts: list[Part], weights: list[float], seed: int) -> Rows:
    """Returns the rows of a mixture, drawn by a seed, in the order of the sources."""
    # The help of the command line does without.
    import numpy as np

    read = [part.read() for part in parts]
    rows = [[*one.numbered] for one in read]
    shares = np.array(weights) / sum(weights)
    size = min(len(some) / share for some, share in zip(rows, shares, strict=True))
    found: list[Record] = []
    places: list[tuple[Source, int]] = []
    for number, (one, some, share) in enumerate(zip(read, rows, shares, strict=True)):
        random = np.random.Generator(np.random.PCG64([seed, number, _MIXING]))
        count = min(max(round(share * size), min(1, len(some))), len(some))
        for i in sorted(random.permutation(len(some))[:count].tolist()):
            places.append((one.source, some[i][0]))
            found.append(some[i][1])
    has_types = all(one.source.has_types for one in read)
    source = Source(name, "row", has_types, tuple(places))
    return Rows(source, enumerate(found))


def _weight(value: object) -> float:
    """Returns the weight of a source."""
    try:
        weight = float(cast("float", value))
    except ValueError:
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise InputError(
            f"`data` must have positive weights, such as a.jsonl=0.7,b.jsonl=0.3, got "
            f"{brief(value)}."
        )
    return weight


def _exists(place: str) -> bool:
    """Says whether there is a file or folder of a name."""
    try:
        return Path(place).exists()
    except (OSError, ValueError):
        return False

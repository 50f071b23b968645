"""The quickstart's sentences, and which part of the standard library each is about.

    python -m experiments.quickstart_data.task

writes `train.jsonl` and `validation.jsonl` with the columns `text` and `label`; the
quickstart takes the text alone and makes a task of its own. The
names of modules and everything that looks like code are replaced by `[MASK]`, with one
rule for all labels. Whole groups of documents that share sentences go to one side.
"""

import argparse
import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from experiments.quickstart_data.corpus import Document, documents
from experiments.quickstart_data.groups import groups_of

__all__ = ["MODEL", "TASK", "Row", "held_out", "hide", "rows"]

_ASSETS = Path(__file__).parents[1] / "assets"
TASK = _ASSETS / "quickstart"
MODEL = _ASSETS / "quickstart_bert"

FAMILIES = {
    "concurrency": "asyncio threading multiprocessing concurrent queue subprocess "
    "selectors sched asyncore asynchat _threading_local contextvars signal",
    "data formats": "xml json configparser html _markupbase csv plistlib pickle "
    "pickletools shelve tomllib xdrlib dbm sqlite3 copyreg netrc",
    "files": "_pyio io tarfile zipfile shutil pathlib os tempfile gzip bz2 lzma ntpath "
    "posixpath genericpath glob stat filecmp fileinput fnmatch zipapp _compression",
    "interface": "tkinter turtle curses",
    "language": "topics",
    "network": "email smtplib imaplib poplib mailbox nntplib smtpd http urllib wsgiref "
    "cgi ipaddress socket ssl ftplib telnetlib xmlrpc webbrowser socketserver",
    "numbers": "_pydecimal statistics random datetime calendar fractions numbers "
    "_strptime zoneinfo heapq bisect colorsys secrets decimal",
    "testing": "unittest doctest pdb bdb traceback timeit trace logging pstats profile "
    "cProfile warnings tracemalloc cgitb",
}
_LABEL_OF = {name: label for label, line in FAMILIES.items() for name in line.split()}

MOST_WORDS = 36  # of a row, so that it fits in 64 tokens
FEWEST_WORDS = 8  # of a row, without the hidden ones
MOST_ROWS_PER_DOCUMENT = 3
MOST_ROWS_PER_TOPIC = 14
TRAIN_ROWS_PER_LABEL = 400
VALIDATION_ROWS_PER_LABEL = 125
MOST_ROWS_PER_HELD_OUT_GROUP = 20

_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"'`(*])|\n")
_CODE = re.compile(
    r"[_\\<>=@$%{}\[\]|~^`*/+#&\d\"]|\w\(|\w\.\w|[a-z][A-Z]|::|:\w|^[-.']|'$"
)
_MODULE_NAMES = {
    stem + ending
    for name in _LABEL_OF
    for stem in (name.strip("_").lower(),)
    for ending in ("", "s", "es")
}


class Row(NamedTuple):
    """One example of the task."""

    text: str
    label: str
    document: int  # position in the corpus


def rows(corpus: list[Document]) -> tuple[list[Row], list[Row]]:
    """Returns the training and the validation rows, balanced over the labels."""
    candidates = _candidates(corpus)
    members = groups_of([d.text for d in corpus])
    validation = _hold_out(candidates, members)
    closed = {members[row.document] for row in validation}
    train = [row for row in candidates if members[row.document] not in closed]
    return _balanced(train, TRAIN_ROWS_PER_LABEL), validation


def held_out(corpus: list[Document], validation: list[Row]) -> set[int]:
    """Returns the documents that share text with a validation row."""
    members = groups_of([d.text for d in corpus])
    closed = {members[row.document] for row in validation}
    return {i for i, group in enumerate(members) if group in closed}


def _candidates(corpus: list[Document]) -> list[Row]:
    """Returns every row that the corpus offers, each text once, in hashed order."""
    found: dict[str, Row] = {}
    for i, document in enumerate(corpus):
        label = _LABEL_OF.get(document.module.split(".")[0])
        if label is None:
            continue
        most = MOST_ROWS_PER_TOPIC if label == "language" else MOST_ROWS_PER_DOCUMENT
        texts = [hide(chunk) for chunk in _chunks(document.text)]
        texts = sorted(filter(_is_readable, texts), key=_hash)[:most]
        for text in texts:
            found.setdefault(text.lower(), Row(text, label, i))
    return sorted(found.values(), key=lambda row: _hash(row.text))


def _chunks(text: str) -> list[str]:
    """Returns consecutive sentences packed into texts of at most `MOST_WORDS`."""
    chunks: list[list[str]] = [[]]
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        if ">>>" in words:
            chunks.append([])
        elif len(chunks[-1]) + len(words) <= MOST_WORDS:
            chunks[-1] += words
        else:
            chunks.append(words[:MOST_WORDS])
    return [" ".join(words) for words in chunks if words]


def hide(text: str) -> str:
    """Returns a text with names of modules and pieces of code as `[MASK]`.

    Example:
      >>> hide("Open a URL with urllib.request, or raise OSError in http.")
      'Open a URL with [MASK] or raise OSError in [MASK]'
    """
    words = ["[MASK]" if _is_name(word) else word for word in text.split()]
    kept = [w for i, w in enumerate(words) if w != "[MASK]" or words[i - 1 : i] != [w]]
    return " ".join(kept)


def _is_name(word: str) -> bool:
    """Says whether a word is the name of a module or looks like code."""
    bare = word.strip("().,;:!?'\"-")
    parts = re.split(r"[-']", bare.lower())
    return bool(_CODE.search(word.strip("().,;:!?"))) or any(
        part in _MODULE_NAMES for part in parts
    )


def _is_readable(text: str) -> bool:
    """Says whether enough of a text is ordinary words."""
    words = text.split()
    plain = [w for w in words if w != "[MASK]" and any(c.isalpha() for c in w)]
    return len(plain) >= FEWEST_WORDS and len(plain) >= 0.7 * len(words)


def _hold_out(candidates: list[Row], members: list[int]) -> list[Row]:
    """Returns rows for validation, taking whole groups, by label until it is full."""
    of_group = defaultdict(list)
    for row in candidates:
        of_group[members[row.document]].append(row)
    taken: list[Row] = []
    counts: Counter[str] = Counter()
    for group in of_group.values():
        full = any(counts[row.label] >= VALIDATION_ROWS_PER_LABEL for row in group)
        if not full and len(group) <= MOST_ROWS_PER_HELD_OUT_GROUP:
            taken += group
            counts.update(row.label for row in group)
    return taken


def _balanced(candidates: list[Row], most: int) -> list[Row]:
    """Returns the first `most` rows of each label."""
    counts: Counter[str] = Counter()
    kept = []
    for row in candidates:
        counts[row.label] += 1
        if counts[row.label] <= most:
            kept.append(row)
    return kept


def _hash(text: str) -> str:
    """Returns a number that orders texts the same way everywhere."""
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Writes the two files and prints how many rows each label has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TASK)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, split in zip(("train", "validation"), rows(documents()), strict=True):
        lines = [json.dumps({"text": r.text, "label": r.label}) for r in split]
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(name, len(split), dict(sorted(Counter(r.label for r in split).items())))


if __name__ == "__main__":
    main()

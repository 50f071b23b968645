"""The text that every CPython installation carries: docstrings, comments and topics.

    python -m experiments.quickstart_data.corpus

counts it. The text depends on the version of Python, so whatever is trained on it is
committed; CPython 3.11.7 made the committed files.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Document", "documents"]

# Not on every installation, or about Python's own build.
_LEFT_OUT = {
    *("test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"),
    *("turtledemo", "ensurepip", "__pycache__", "_sysconfigdata"),
}
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
_RULE = re.compile(r"[-=~*#_+.^]{4,}")
_WORD = re.compile(r"[A-Za-z]{2,}")


class Document(NamedTuple):
    """One docstring, block of comments or topic."""

    module: str  # dotted name of the module, or `topics`
    kind: str  # "docstring", "comment" or "topic"
    text: str  # paragraphs separated by a newline


def documents(fewest_words: int = 5) -> list[Document]:
    """Returns the documents of this installation, each once, in a fixed order.

    Args:
      fewest_words: shorter documents are left out.
    """
    seen: set[str] = set()
    kept = []
    for document in (*_from_sources(), *_from_topics()):
        key = " ".join(_WORD.findall(document.text)).lower()
        if key in seen or len(key.split()) < fewest_words:
            continue
        seen.add(key)
        kept.append(document)
    return kept


def _from_sources() -> Iterator[Document]:
    """Yields the docstrings and comments of the standard library, by module."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if any(part in _LEFT_OUT or "-" in part for part in parts):
            continue
        if parts[0].startswith(("_sysconfigdata", "pydoc_data")):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        source = path.read_text(encoding="utf-8")
        for text in _docstrings(source):
            yield Document(module, "docstring", text)
        for text in _comments(source):
            yield Document(module, "comment", text)


def _docstrings(source: str) -> Iterator[str]:
    """Yields the docstrings of the module, its classes and its functions."""
    with warnings.catch_warnings():
        # Old escapes in strings of the standard library are not our subject.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS) and (text := ast.get_docstring(node)):
            yield _paragraphs(text)


def _comments(source: str) -> Iterator[str]:
    """Yields the blocks of whole-line comments that read like prose."""
    for block in _COMMENT_BLOCK.findall(source):
        text = _paragraphs(re.sub(r"^[ \t]*#+[!:]? ?", "", block, flags=re.MULTILINE))
        letters = sum(c.isalpha() or c.isspace() for c in text)
        if len(_WORD.findall(text)) >= 8 and letters > 0.85 * len(text):
            yield text


def _from_topics() -> Iterator[Document]:
    """Yields the help topics: sections of the language reference."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document("topics", "topic", _paragraphs(topics[name]))


def _paragraphs(text: str) -> str:
    """Returns one line per paragraph, white space and drawn rules collapsed."""
    lines = (" ".join(_RULE.sub(" ", p).split()) for p in re.split(r"\n\s*\n", text))
    return "\n".join(line for line in lines if line)


def main() -> None:
    """Prints how much text there is of each kind."""
    found = documents()
    for kind in ("docstring", "comment", "topic"):
        sizes = [len(d.text) for d in found if d.kind == kind]
        print(f"{kind:10} {len(sizes):6} documents {sum(sizes) / 1e6:6.2f} MB")


if __name__ == "__main__":
    main()

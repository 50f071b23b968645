"""Predictions kept as JSON lines, so that an interrupted evaluation goes on."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.generation.writer import Writer

__all__ = ["Predictions", "digest_of", "fingerprint"]


def fingerprint(writer: Writer) -> str:
    """Returns a digest of all weights, those of the adapter among them."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves((writer.params, writer.attachment.trained)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def digest_of(text: str) -> str:
    """Returns what a line has as `asked`: a digest of the question and its answer."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


class Predictions:
    """The lines of a file, each with a key, in a folder that belongs to one model.

    Args:
      folder: of the results; it is made.
      name: of the file, without its extension.
      key: the fields that tell predictions apart.
      identity: what all predictions depend on, such as the model and the prompt.

    Raises:
      InputError: if the folder has predictions of another identity, or a line that is
        no JSON object.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        key: Sequence[str],
        identity: Mapping[str, object],
    ):
        self.key = tuple(key)
        self.path = folder / f"{name}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        stated = folder / f"{name}-of.json"
        if stated.is_file():
            known = json.loads(stated.read_text(encoding="utf-8"))
            for field, value in identity.items():
                if known.get(field) != value:
                    raise InputError(
                        f"`output` must be a folder of the same {field}, got `{folder}`"
                        f" of {known.get(field)!r}, and this is {value!r}. Choose "
                        "another folder."
                    )
        else:
            stated.write_text(json.dumps(identity, indent=2), encoding="utf-8")
        self.found = {self._key_of(line): line for line in self._read()}

    def has(self, key: tuple, asked: str) -> bool:
        """Says whether there is a prediction with a key.

        Args:
          key: its fields.
          asked: the digest that its line has as `asked`.

        Raises:
          InputError: if the prediction is of another question.
        """
        line = self.found.get(key)
        # Earlier lines have no digest.
        if line is not None and line.get("asked", asked) != asked:
            raise InputError(
                f"`output` must be a folder of the same data, got `{self.path}`, whose "
                f"prediction of {' '.join(map(str, key))} is for another question. "
                "Choose another folder."
            )
        return line is not None

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds predictions, and writes them at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)
        self.found |= {self._key_of(line): line for line in lines}

    def _key_of(self, line: Mapping[str, Any]) -> tuple:
        return tuple(line[field] for field in self.key)

    def _read(self) -> Iterator[dict[str, Any]]:
        """Yields the lines; one that was not finished is cut off."""
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self.path.write_bytes(whole)
        for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict) or not {*self.key} <= {*found}:
                raise InputError(
                    f"`{self.path}` line {number} must be an object with "
                    f"{', '.join(self.key)}. Remove the line."
                )
            yield found

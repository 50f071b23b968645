"""The run directory: the one door through which results leave."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sparse_jax.adapter_file import ADAPTER
from sparse_jax.errors import InputError, brief
from sparse_jax.models.pretrained import changed_field
from sparse_jax.sharding.processes import is_first_process
from sparse_jax.training.history import is_evaluation
from sparse_jax.training.settings import Settings

__all__ = ["CONFIG", "CURVE", "LAYERS", "METRICS", "RunDirectory", "require_usable"]

CONFIG, METRICS = "config.json", "metrics.json"
CURVE, LAYERS = "curve.png", "layers.png"
_ROWS, _CHECKPOINTS = "metrics.jsonl", "checkpoints"
_FILES = (CONFIG, METRICS, CURVE, LAYERS, _ROWS, ADAPTER)
# What may differ between a run and its continuation.
_FREE = ("output", "overwrite", "resume", "save_every", "keep", "mesh")
# What earlier versions did, which had no such setting.
_WITHOUT = {"group_by_length": True}
# What the settings only name, and has to be the same: key -> what it is.
_NAMED = {"base_hash": "model", "examples_hash": "data"}


def require_usable(settings: Settings) -> None:
    """Raises unless the output folder is new, empty, or meant to be used again.

    Raises:
      InputError: naming the folder and the remedy.
    """
    path = Path(settings.output)
    # A loss of hours if it were found out after the training.
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"`output` must be a folder, got the file `{there}`.")
    if not os.access(there, os.W_OK):
        raise InputError(
            f"`output` must be a folder that can be written, got `{path}`. Choose "
            "another one."
        )
    if settings.resume:
        _require_same(path, settings)
    elif path.is_dir() and any(path.iterdir()) and not settings.overwrite:
        raise InputError(
            f"`output` must be an empty or a new folder, got `{path}`. Choose another "
            "one, or pass --overwrite, or --resume to continue the run in it."
        )


class RunDirectory:
    """The files of one run, each written under a temporary name and then moved.

    Of several processes the first one writes.

    Attributes:
      path: the folder.
      rows: what `metrics.jsonl` holds, one dictionary a line.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, _read_rows(path / _ROWS)

    @classmethod
    def create(cls, settings: Settings, config: Mapping[str, Any]) -> "RunDirectory":
        """Returns a directory with a `config.json`; a resumed run keeps its files.

        Overwriting removes the files of a run only, never anything else.

        Raises:
          InputError: if a run is resumed that had another model or other examples.
        """
        path = Path(settings.output)
        if settings.resume:
            _require_same_files(path, config)
        if not settings.resume and is_first_process():
            _make_folder(path)
            for name in _FILES:
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / _CHECKPOINTS, ignore_errors=True)
            _write_json(path / CONFIG, {"settings": asdict(settings), **config})
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, which a finished run no longer needs."""
        return self.path / _CHECKPOINTS

    def finished(self) -> dict[str, Any] | None:
        """Returns the metrics of a finished run, and None of any other."""
        path = self.path / METRICS
        return _read_json(path) if path.is_file() else None

    def rewind(self, step: int) -> None:
        """Forgets the rows after a step: the run continues there.

        If that is the end of an epoch, it begins with the evaluation.
        """
        self.rows = [row for row in self.rows if _is_before(row, step)]
        lines = "".join(_line(row) for row in self.rows)
        if is_first_process():
            _write_text(self.path / _ROWS, lines)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`."""
        self.rows.append(dict(row))
        if not is_first_process():
            return
        with (self.path / _ROWS).open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Writes `metrics.json`, the sign of a finished run, and drops checkpoints."""
        if is_first_process():
            _write_json(self.path / METRICS, metrics)
            shutil.rmtree(self.checkpoints, ignore_errors=True)


def _require_same(path: Path, settings: Settings) -> None:
    """Raises unless a folder holds a run of the same settings."""
    if not (path / CONFIG).is_file():
        raise InputError(
            f"`output` must hold the `{CONFIG}` of a run to resume, got `{path}`, "
            "which has none. Leave out --resume to start one."
        )
    before = _read_json(path / CONFIG).get("settings")
    if not isinstance(before, dict) or not {"model", "task"} <= before.keys():
        raise InputError(
            f"`{path / CONFIG}` must have the settings of a run, and has none. Put it "
            "back, or pass --overwrite to start anew."
        )
    now = json.loads(json.dumps(asdict(settings)))
    # A setting that came with a later version was at its default, or at what that
    # version does without it.
    defaults = {field.name: field.default for field in fields(settings)}
    before = defaults | _WITHOUT | before
    changed = [name for name in now if name not in _FREE and now[name] != before[name]]
    if changed:
        name = changed[0]
        raise InputError(
            f"`{name}` must be {before[name]!r} as in the run to resume, got "
            f"{now[name]!r}. Pass the same options, or --overwrite to start anew."
        )


def _require_same_files(path: Path, config: Mapping[str, Any]) -> None:
    """Raises unless the files that the settings name are those of the run."""
    before = _read_json(path / CONFIG)
    for key, name in _NAMED.items():
        # An earlier version did not tell.
        if before.get(key, config[key]) != config[key]:
            raise InputError(
                f"`{name}` must be what it was in the run to resume, got other "
                f"content under the same name. Put the files back, or pass "
                "--overwrite to start anew."
            )
    was, now = (about.get("base_config") or {} for about in (before, config))
    if isinstance(was, dict) and (field := changed_field(was, now)):
        raise InputError(
            f"`model` must be what it was in the run to resume, with `{field}`="
            f"{brief(was[field])} in its configuration, got {brief(now[field])}. Put "
            "the `config.json` of the model back, or pass --overwrite to start anew."
        )


def _make_folder(path: Path) -> None:
    """Makes a folder and those that it is in."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"`output` must be a folder that can be made, got `{path}`: "
            f"{error.strerror}. Choose another one."
        ) from error


def _is_before(row: Mapping[str, Any], step: int) -> bool:
    """Returns whether a row was written before the checkpoint of a step."""
    return row["step"] < step or (row["step"] == step and not is_evaluation(row))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a `metrics.jsonl`."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # What follows the last line break was cut off when the run was killed.
    lines = text.split("\n")[:-1]
    return [_parse(f"`{path}` line {i}", line) for i, line in enumerate(lines, 1)]


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file of a run."""
    return _parse(f"`{path}`", path.read_text(encoding="utf-8"))


def _parse(place: str, text: str) -> dict[str, Any]:
    """Returns a JSON object, or raises with its place."""
    try:
        value = json.loads(text)
        reason = f"got {type(value).__name__}"
    except ValueError as error:
        value, reason = None, f"which it is not: {error}"
    if not isinstance(value, dict):
        raise InputError(
            f"{place} must be a JSON object, {reason}. Put it back, or pass "
            "--overwrite to start anew."
        )
    return value


def _line(row: Mapping[str, Any]) -> str:
    """Returns a row as a line of JSON."""
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Returns a value with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes readable JSON, whole or not at all."""
    _write_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Writes a text, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

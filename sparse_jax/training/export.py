"""Export of a run: as a model, or as an adapter, for other libraries."""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sparse_jax.errors import InputError, brief, first_line, reason_of
from sparse_jax.interchange.card import Results, write_card
from sparse_jax.interchange.open_adapter import open_adapter
from sparse_jax.interchange.source import open_source
from sparse_jax.interchange.targets import TARGETS
from sparse_jax.models.hf.model_files import hub_id
from sparse_jax.params.fields import Json, require_word
from sparse_jax.training.output_folder import CONFIG, METRICS
from sparse_jax.training.run_files import read_json, read_metrics

__all__ = ["export"]

_log = logging.getLogger(__name__)

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as the Hub names licenses


def export(
    run: str | Path,
    *,
    to: str,
    output: str | Path,
    model: str | Path | None = None,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    peft_type: str | None = None,
    license: str | None = None,
    push: str | None = None,
) -> Path:
    """Writes what a run trained for another library, with a model card.

        export("runs/mrpc", to="merged", output="mrpc-merged")

    The folder is written completely or not at all; the base is only read.

    Args:
      run: run directory, adapter file, or folder of PEFT.
      to: `merged`, a folder that transformers loads; `peft`, an adapter of PEFT;
        `patch`, new values of weights, as vLLM takes them; or `delta`, the adapter
        file.
      output: folder to write, a new or an empty one.
      model: the base, folder or id; None is what the adapter names, if it is here.
      dtype: of a merged model or a patch: float32, bfloat16 or float16; None is that
        of the training, and gives equal logits.
      shard_size: most bytes of a file of a merged model; None is "5GB".
      peft_type: of a sparse adapter for PEFT: shira or supertuning; None is shira.
      license: of what was trained, as the Hub names it; None is what the adapter says.
      push: id of a repository on the Hub to upload the folder to; created as private
        if it does not exist. Uses the login of `hf auth login`, or HF_TOKEN.

    Returns:
      The folder.

    Raises:
      InputError: if the adapter or its base cannot be read or do not belong together,
        the folder has files in it, an option does not apply, the method has no such
        form, or, with the folder complete, the upload fails.
    """
    require_word("to", to, TARGETS)
    # As a path it would be the folder where the command runs.
    if not str(output).strip():
        raise InputError(f"`output` must name a folder, got {brief(output)}.")
    target, path = TARGETS[to], Path(output)
    options = {"dtype": dtype, "shard_size": shard_size, "peft_type": peft_type}
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in target.options:
            able = [word for word in TARGETS if name in TARGETS[word].options]
            raise InputError(
                f"`{name}` must be left out for {to}, got {brief(value)}. It is an "
                f"option of {', '.join(able)}."
            )
    if license is not None and not _LICENSE.fullmatch(license):
        raise InputError(
            f"`license` must be the name of a license on the Hub, got "
            f"{brief(license)}. Write it as in apache-2.0, mit or llama3.2."
        )
    if push is not None:
        _require_repository(push)
    _require_empty(path)
    adapter = open_adapter(run, model)
    if license is not None:
        adapter = replace(adapter, license=license)
    facts = _facts(Path(run))
    source = open_source(adapter, model)
    with _whole(path) as folder:
        target.write(source, folder, **given)
        write_card(
            folder,
            target,
            source,
            name=(push or path.resolve().name).rpartition("/")[2],
            repo=push,
            base=hub_id(model),
            dtype=dtype,
            results=facts.results,
            settings=facts.settings,
        )
    if push is not None:
        _upload(path, push)
    return path


class _Facts(NamedTuple):
    """What a run directory says beside the adapter."""

    results: Results
    settings: Mapping[str, Json]


def _facts(run: Path) -> _Facts:
    """Returns the results and settings of a run; an adapter file has none beside it."""
    results, settings = {}, {}
    if (run / METRICS).is_file():
        metrics = read_metrics(run / METRICS)
        # Runs of earlier versions have no splits.
        results = metrics.get("splits") or {"validation": metrics["eval"]}
    if (run / CONFIG).is_file():
        config = read_json(run / CONFIG)
        told = config.get("settings")
        settings = {**told} if isinstance(told, dict) else {}
        # Earlier runs say the usual rate here, and not in the adapter.
        if settings.get("learning_rate") is None:
            settings["learning_rate"] = config.get("learning_rate")
    return _Facts(results, settings)


def _require_empty(path: Path) -> None:
    """Raises unless a folder is new or empty."""
    try:
        is_there = path.exists()
        if not is_there or (path.is_dir() and not any(path.iterdir())):
            return
        reason = "which has files in it" if path.is_dir() else "which is a file"
    # A name that is too long or has a null character, or a closed folder.
    except (OSError, ValueError) as error:
        reason = reason_of(error)
    raise InputError(
        f"`output` must be a new or an empty folder, got {brief(str(path))}, {reason}. "
        "Choose another one."
    )


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yields a folder that takes a place once it is whole, and else goes away."""
    path = path.resolve()
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        yield part
        # Also replaces an empty folder.
        part.replace(path)
    except OSError as error:
        raise InputError(
            f"`output` must be a folder that can be written, got `{path}`: "
            f"{reason_of(error)}. Choose another one."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _require_repository(name: str) -> None:
    """Raises unless a name can be that of a repository on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"`push` must be the id of a repository on the Hub, such as me/my-model, "
            f"got {brief(name)}: {first_line(error)}."
        ) from error


def _upload(folder: Path, repository: str) -> None:
    """Uploads a folder, with the login that huggingface_hub finds by itself."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    # Its HTTP client has errors of its own, for a missing network too.
    except Exception as error:
        raise InputError(
            f"`push` must be a repository that can be written, got {brief(repository)}:"
            f" {first_line(error)}. `{folder}` is complete: upload it later with "
            f"`hf upload {repository} {folder}`."
        ) from error
    _log.info("uploaded to https://huggingface.co/%s", repository)

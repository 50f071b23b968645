"""The model card: what a folder is, how to load it, and how it was trained."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from sparse_jax.data.files import GLUE
from sparse_jax.data.glue import TASKS
from sparse_jax.data.sources import HUB, is_hub_name
from sparse_jax.errors import printable
from sparse_jax.interchange.source import Source
from sparse_jax.interchange.targets import Target
from sparse_jax.methods.method import Method
from sparse_jax.models.hf.model_files import hub_id
from sparse_jax.params.fields import Json

__all__ = ["CARD", "Results", "write_card"]

CARD = "README.md"
Results = Mapping[str, Mapping[str, float | None]]  # split -> metric -> value

# Our names of metrics -> the Hub's, where they differ.
_METRICS = {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "micro_f1": "f1",
}
# Settings of a run that a reader may want, and that name no folder.
_SHOWN = (
    "optimizer", "learning_rate", "schedule", "warmup", "weight_decay", "batch_size",
    "accumulate", "epochs", "max_steps", "max_length", "dtype", "seed", "sampler",
    "active", "loss_on", "packing", "template", "held_out", "max_eval_samples",
)  # fmt: skip
_OWN_TASKS = ("classification", "multilabel", "regression")


def write_card(
    folder: Path,
    target: Target,
    source: Source,
    *,
    name: str,
    repo: str | None,
    base: str | None,
    dtype: str | None,
    results: Results,
    settings: Mapping[str, Json],
) -> None:
    """Writes `README.md` with the metadata that the Hub reads.

    Args:
      folder: of what was exported.
      target: what it is.
      source: adapter and base.
      name: of the model.
      repo: id of the repository on the Hub; None is not known.
      base: id of the base on the Hub; None is a folder, whose place is nobody's
        business.
      dtype: of what was exported; None is that of the training.
      results: of the run; empty if there are none.
      settings: of the run.
    """
    base = base or hub_id(source.adapter.base_model)
    data = _data_set(source.adapter.task, settings)
    most = settings.get("max_eval_samples")
    # Metrics of a part of the examples must not stand beside those of all.
    compared = {} if most else results
    parts = [
        f"---\n{_metadata(target, source, name, base, compared, data)}\n---",
        f"# {name}",
        _summary(source, base),
        f"## Load\n\n{_load(target, source, name, repo, base, dtype)}",
        *([f"## Results\n\n{_results_table(results, most)}"] if results else []),
        f"## Settings\n\n{_settings_table(source, settings)}",
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _metadata(
    target: Target,
    source: Source,
    name: str,
    base: str | None,
    results: Results,
    data: str | None,
) -> str:
    """Returns the metadata as YAML; `data` is the data set on the Hub, if it is one."""
    # huggingface_hub is slow to import, so it is imported where it is used.
    from huggingface_hub import EvalResult, ModelCardData

    adapter = source.adapter
    kind = "text-generation" if source.is_causal else "text-classification"
    found = [
        EvalResult(
            task_type=kind,
            dataset_type=data or "custom",
            dataset_name=f"GLUE {adapter.task}"
            if data == GLUE
            else data or "own files",
            dataset_config=adapter.task if data == GLUE else None,
            dataset_split=split,
            metric_type=_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=value,
        )
        for split, metrics in results.items()
        for metric, value in metrics.items()
        # Null stands for a number that JSON does not have.
        if value is not None
    ]
    made = ModelCardData(
        library_name=target.library,
        license=adapter.license or None,
        base_model=base,
        base_model_relation=None if base is None else target.relation,
        pipeline_tag=kind,
        datasets=None if data is None else [data],
        metrics=list(dict.fromkeys(one.metric_type for one in found)) or None,
        tags=list(filter(None, ["sparse_jax", adapter.word])),
        model_name=name if found else None,
        eval_results=found or None,
    )
    return made.to_yaml()


def _data_set(task: str, settings: Mapping[str, Json]) -> str | None:
    """Returns the data set on the Hub that a run learned from, None for files."""
    data = settings.get("data", "")
    if data is None and task in TASKS and task not in _OWN_TASKS:
        return GLUE
    if isinstance(data, str) and data.startswith(HUB):
        return data.split(":")[1]
    if isinstance(data, str) and is_hub_name(data) and not os.path.exists(data):
        return data
    return None


def _summary(source: Source, base: str | None) -> str:
    """Returns what was trained on what."""
    adapter = source.adapter
    model = f"[{base}](https://huggingface.co/{base})" if base else _local(source)
    task = f" on the task {adapter.task}" if adapter.task else ""
    method = f" with the method {adapter.word}" if adapter.word else ""
    text = f"Fine-tuned from {model}{task}{method}, by sparse_jax "
    text += f"{version('sparse_jax')}."
    if adapter.base_hash:
        text += f" SHA-256 of the base's weights: `{adapter.base_hash}`."
    if adapter.labels:
        labels = ", ".join(f"`{printable(label)}`" for label in adapter.labels)
        text += f" Labels, in the order of the outputs: {labels}."
    return text


def _local(source: Source) -> str:
    """Returns a base that is a folder."""
    return f"a local {source.model.family.name} model"


def _load(
    target: Target,
    source: Source,
    name: str,
    repo: str | None,
    base: str | None,
    dtype: str | None,
) -> str:
    """Returns how to load what was exported."""
    is_causal, settings = source.is_causal, source.adapter.settings
    kind = "CausalLM" if is_causal else "SequenceClassification"
    count = 0 if is_causal else source.model.config.num_labels
    options = "head=sj.CausalLM" if is_causal else f"num_labels={count}"
    options = options if source.labels is None else "labels=adapter.labels"
    trained = settings.get("dtype") or "float32"
    options += f', dtype="{trained}"' if trained != "float32" else ""
    code = target.load.format(
        name=name,
        repo=repo or name,
        base=base or "FOLDER_OF_THE_BASE",
        auto=f"AutoModelFor{kind}",
        labels=f", num_labels={count}" if count else "",
        options=options,
        dtype=dtype or trained,
    )
    fetch = f"```bash\nhf download {repo} --local-dir {name}\n```\n\n"
    return (
        f"{fetch if repo and '{repo}' not in target.load else ''}```python\n{code}```"
    )


def _results_table(results: Results, most: Json) -> str:
    """Returns the metrics of every split, of which `most` examples were evaluated."""
    remark = f"Of at most {most} examples of every split.\n\n" if most else ""
    rows = [
        f"| {split} | {metric} | {'not finite' if value is None else f'{value:.4f}'} |"
        for split, metrics in results.items()
        for metric, value in metrics.items()
    ]
    return remark + "\n".join(["| split | metric | value |", "|---|---|---|", *rows])


def _settings_table(source: Source, settings: Mapping[str, Json]) -> str:
    """Returns the settings of the method and of the run."""
    method = source.adapter.method
    own = {"method": source.adapter.word or "none"}
    own |= method.to_settings() if method != Method() else {}
    # What a run resolved, such as its rate, stands in the adapter alone.
    given = {name: value for name, value in settings.items() if value is not None}
    known = {**source.adapter.settings, **given}
    if not known.get("sampler"):
        known.pop("active", None)
    own |= {name: known.get(name) for name in _SHOWN}
    is_told = lambda value: value is not None and value is not False and value != []
    own = {name: value for name, value in own.items() if is_told(value)}
    rows = [f"| {name} | `{_shown(value)}` |" for name, value in own.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _shown(value: Json) -> str:
    """Returns a value for a cell of a table."""
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    return printable(str(value)).replace("|", "\\|").replace("`", "'")

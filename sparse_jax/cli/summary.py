"""The summary of a finished run."""

import math
from collections.abc import Mapping
from typing import Any

from sparse_jax.errors import printable
from sparse_jax.training.progress import bytes_shown
from sparse_jax.training.settings import Settings

__all__ = ["print_summary"]


def print_summary(settings: Settings, metrics: Mapping[str, Any]) -> None:
    """Prints the results of a run, and where its files are."""
    # Rich takes a while to import, so it is imported where it is used.
    from rich.console import Console
    from rich.table import Table

    sampler = "" if settings.sampler is None else f" + {settings.sampler_word}"
    title = f"{settings.method_word}{sampler} on {settings.task}"
    table = Table(title=title, show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value", justify="right")
    for what, value in _lines(metrics):
        table.add_row(what, value)
    # Brackets in the name of a folder are no markup.
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        f"In {printable(settings.output)}: adapter.safetensors, metrics.json,"
    )
    pictures = "curve.png" if settings.sampler is None else "curve.png, layers.png"
    console.print(f"metrics.jsonl (every update), {pictures}, config.json.")


def _lines(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the lines of the table."""
    trained, total = metrics["trained_parameters"], metrics["total_parameters"]
    without_head = metrics["trained_parameters_without_head"]
    # A run of an earlier version lacks some of these.
    examples = metrics.get("examples", {}).items()
    seconds, warnings = metrics.get("selection_seconds"), metrics.get("warnings")
    strength, best = metrics.get("strength", 1), metrics.get("best_step")
    # Their loss or gradient was not finite.
    skipped = metrics["skipped_batches"]
    head = "" if without_head == trained else _share(without_head, total)
    lines = [
        *((name, _score(value)) for name, value in metrics["eval"].items()),
        *_baseline(metrics),
        ("best model", "" if best is None else f"after {best:,} updates"),
        ("examples", ", ".join(f"{use['used']:,} {split}" for split, use in examples)),
        ("trained parameters", _share(trained, total)),
        ("without the head", head),
        ("training state", bytes_shown(metrics["optimizer_bytes"])),
        ("adapter file", bytes_shown(metrics["adapter_bytes"])),
        ("peak memory", bytes_shown(metrics["peak_memory_bytes"])),
        ("selection", "" if seconds is None else f"{seconds:.3g} s"),
        ("time per update", f"{metrics['seconds_per_step']:.3g} s"),
        ("updates", f"{metrics['steps']:,}"),
        ("strength in the KL budget", "" if strength == 1 else f"{strength:.3g}"),
        ("skipped batches", f"{skipped:,}" if skipped else ""),
        ("warnings", f"{len(warnings)}, in metrics.json" if warnings else ""),
    ]
    return [(what, value) for what, value in lines if value]


def _baseline(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the score of always giving the same answer, on the first split."""
    report = next(iter((metrics.get("reports") or {}).values()), {})
    found = report.get("majority_baseline") or report.get("mean_baseline") or {}
    scores = [(k, v) for k, v in found.items() if isinstance(v, float) and k != "value"]
    return [(f"{name} of a constant prediction", _score(v)) for name, v in scores]


def _share(part: int, total: int) -> str:
    """Returns a number of parameters, and its share of all of them."""
    return f"{part:,} ({part / total:.3%})"


def _score(value: float | None) -> str:
    """Returns a metric; a file has null where it is not finite."""
    finite = value is not None and math.isfinite(value)
    return f"{value:.4f}" if finite else "not finite"

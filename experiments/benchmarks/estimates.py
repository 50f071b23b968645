"""How long does an update take on a TPU, by the cycles that its compiler expects?

    python -m experiments.benchmarks.estimates [--keep FOLDER]

Updates of small models, compiled ahead of time for TPUs that need not be there, and
where the time that `sparse-jax plan` gives comes from: cycles, which the compiler notes
beside fusions, copies and reductions; kernels and single entries, beside which it notes
none. Beside it is the time of the matrix products alone, at half of the peak. A minute
of a CPU for each program; `--keep` keeps them, and reads what is there.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.result import Panel, Result, benchmark_parser, finish
from experiments.command import run_command
from sparse_jax import Settings
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import DecoderConfig, EncoderConfig
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.planning.abstract import AbstractRun, abstract_run
from sparse_jax.planning.cycles import seconds_of
from sparse_jax.planning.plan import UTILIZATION, flops_of, kernels_of_step, often_in
from sparse_jax.planning.target import find_target
from sparse_jax.sharding.mesh import MeshShape


class Program(NamedTuple):
    """An update to compile."""

    model: str
    method: str
    settings: Settings
    length: int
    target: str

    @property
    def name(self) -> str:
        """What it is called in the table."""
        rows, chip = self.settings.batch_size, self.target.partition(":")[0]
        again = ", checkpointing" if self.settings.checkpointing else ""
        method = f"{self.model}, {self.method}"
        return f"{method}, {rows} x {self.length:,}{again}, {chip}"


def decoder(width: int, num_layers: int, inner: int) -> Model:
    """Returns a Llama with heads of 128."""
    heads = width // 128
    config = DecoderConfig(
        vocab_size=32000, hidden_size=width, num_layers=num_layers, num_heads=heads,
        num_kv_heads=heads, head_size=128, intermediate_size=inner,
    )  # fmt: skip
    return Model(CausalLM, LLAMA, config)


BERT_BASE = EncoderConfig(
    vocab_size=30522, hidden_size=768, num_layers=12, num_heads=12,
    intermediate_size=3072,
)  # fmt: skip
ENCODER, SMALL, WIDE = "BERT-base", "Llama 8 x 1,024", "Llama 4 x 2,048"
MODELS = {
    ENCODER: Model(SequenceClassifier, BERT, BERT_BASE),
    SMALL: decoder(1024, 8, 2816),
    WIDE: decoder(2048, 4, 5632),
}
V5E, V5P = "v5e:2x2", "v5p:2x2x1"
_BASE = Settings(model="", task="causal", output="", dtype="bfloat16")
FULL, LORA = (replace(_BASE, method=word) for word in ("full", "lora"))
ENTRIES = replace(_BASE, density=0.05, where=("^layers/.*/kernel$",))
LANES = replace(ENTRIES, granularity="lane")
IST = replace(LANES, sampler="ist")


def _rows(settings: Settings, batch_size: int, checkpointing: bool = False) -> Settings:
    """Returns settings of a batch."""
    return replace(settings, batch_size=batch_size, checkpointing=checkpointing)


PROGRAMS = (
    Program(ENCODER, "full", _rows(FULL, 32), 128, V5E),
    Program(ENCODER, "LoRA", _rows(LORA, 8), 512, V5P),
    Program(SMALL, "full", _rows(FULL, 4), 128, V5P),
    Program(SMALL, "SIFT lanes and IST", _rows(IST, 8), 128, V5P),
    Program(WIDE, "LoRA", _rows(LORA, 1), 1024, V5E),
    Program(WIDE, "SIFT", _rows(ENTRIES, 1, True), 1024, V5E),
    Program(WIDE, "SIFT lanes", _rows(LANES, 1, True), 1024, V5E),
)


def text_of(run: AbstractRun, path: Path | None) -> str:
    """Returns the compiled program, from a file if it is there."""
    if path is not None and path.exists():
        return path.read_text(encoding="utf-8")
    args = (run.state, run.batch, run.key)
    text = run.runner.lower(*args, schedule=run.schedule).compile().as_text() or ""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return text


def row_of(program: Program, folder: Path | None) -> dict[str, Any]:
    """Returns the times of a program, in ms."""
    target = find_target(program.target)
    place = (MeshShape(), target.devices)
    model = MODELS[program.model]
    run = abstract_run(model, program.settings, program.length, *place)
    name = program.name.replace(",", "").replace(" ", "-")
    text = text_of(run, folder / f"{name}.txt" if folder else None)
    chip = target.chip
    assert chip is not None
    found = seconds_of(text, chip, kernels_of_step(run), often_in(run))
    assert found is not None
    total = 1e3 * found.total
    products = 1e3 * flops_of(run) / chip.flops
    return {
        "program": program.name,
        **{f"{part}_ms": 1e3 * time for part, time in found._asdict().items()},
        "total_ms": total,
        "peak_ms": products,
        "ratio": total / (1e3 * found.cycles),
        "products": products / UTILIZATION / total,
    }


def main() -> None:
    """Prints the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of programs")
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: the compiler of TPUs is missing; `pip install libtpu` adds it.")
        return
    result = Result(
        title="one update on a TPU, by its compiler (ms)",
        rows=[row_of(program, args.keep) for program in PROGRAMS],
        columns={
            "program": "{program}",
            "cycles": "{cycles_ms:.2f}",
            "kernels": "{kernels_ms:.2f}",
            "entries": "{entries_ms:.2f}",
            "estimate": "{total_ms:.2f}",
            "estimate / cycles": "{ratio:.2f}",
            "products at the peak": "{peak_ms:.2f}",
            "at half / estimate": "{products:.2f}",
        },
        panels=(
            Panel("ratio", "estimate / cycles", floor=1),
            Panel("products", "products at half of the peak / estimate", floor=1),
        ),
    )
    finish(args.output, result)


if __name__ == "__main__":
    run_command(main)

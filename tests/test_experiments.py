"""Every experiment can be built, and the sweep runs and continues."""

import importlib
import json
import sys
from pathlib import Path

import jax
import pytest
from tiny_run import write_data, write_model

from experiments import glue, quickstart, sweep
from sparse_jax.data.glue import find_task
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.families.bert import ROBERTA
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.supports.roles import SPARSE, map_roles
from sparse_jax.training.build import method_of

ROOT = Path(quickstart.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_an_experiment_executes_nothing_when_imported(module, capsys):
    assert importlib.import_module(module).__doc__
    assert capsys.readouterr().out == ""


def test_the_settings_of_the_paper_train_what_it_counts():
    # RoBERTa-large: 24 layers, 96 matrices of 1024 x 1024, 96 biases of 1024.
    config = EncoderConfig(
        vocab_size=50265, hidden_size=1024, num_layers=24, num_heads=16,
        intermediate_size=4096, max_positions=512, position_offset=2,
        type_vocab_size=1, pad_id=1,
    )  # fmt: skip
    params = Model(SequenceClassifier, ROBERTA, config).abstract()
    method = method_of(glue.CONFIGS["mrpc"], ("^classifier/",))
    sizes = map_roles(
        lambda role, leaf: leaf.shape[0] * method.support_size(role),
        method.roles(params), params, only=(SPARSE,),
    )  # fmt: skip
    # 806,208 in the released code, whose count is the same here: 0.008 of neither
    # 1024 x 1024 nor 1024 is whole.
    assert sum(jax.tree.leaves(sizes)) == 806_208


def test_every_published_number_belongs_to_a_setting():
    assert glue.PUBLISHED.keys() == glue.CONFIGS.keys()
    for task in glue.CONFIGS:
        assert find_task(task).name == task


def test_the_quickstart_compares_equal_budgets():
    layers, width = 4, 192
    settings = quickstart.BASE
    lora = layers * 4 * settings.rank * 2 * width
    entries = layers * 4 * (width * width + width)
    assert abs(lora - settings.density * entries) < 0.02 * lora


def test_a_sweep_continues_where_it_was(tmp_path, monkeypatch, capsys):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    words = (
        f"sweep --model {model} --task sst2 --data {data} --densities 0.2 "
        f"--ranks 1 --seeds 0 --learning-rates 1e-3 --max-steps 1 --max-length 8 "
        f"--output {tmp_path / 'out'}"
    )
    monkeypatch.setattr(sys, "argv", words.split())
    sweep.main()
    first = capsys.readouterr().out
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    stored = tmp_path / "out" / "sift-0.2-lr0.001-seed0" / "metrics.json"
    metrics = json.loads(stored.read_text())
    stored.write_text(json.dumps({**metrics, "eval": {"accuracy": 0.123}}))
    sweep.main()
    assert "12.3" in capsys.readouterr().out and "12.3" not in first

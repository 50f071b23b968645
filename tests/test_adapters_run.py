"""Every method that adds arrays can be run, and its adapter repeats the metrics."""

import json
import logging
import sys

import pytest
from tiny_run import CONFIG, write_data, write_model

from sparse_jax import load_adapter
from sparse_jax.cli.main import main

D, F, L = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_layers
HEAD = D * D + D + 2 * D + 2  # pooler and classifier, both new

# method -> options, numbers that it adds
RUNS = {
    "lora": (("--rank", "2", "--alpha", "2", "--rslora"), L * 4 * 2 * 2 * D),
    "dora": (("--rank", "2", "--where", "mlp/up"), L * (2 * (D + F) + F)),
    "series": (("--size", "3", "--activation", "gelu"), L * 2 * (6 * D + 3 + D)),
    "parallel": (("--size", "3"), L * (3 * (F + D) + 3 + D)),
    "ia3": ((), L * (2 * D + F)),
    "prefix": (("--prefix-length", "3"), L * 2 * 3 * D),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "model")
    write_data(folder / "data")
    return folder


def command(monkeypatch, *words):
    """Runs the command line in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["sparse-jax", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


SECOND = {"parallel", "ia3", "prefix", "dora"}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SECOND else [])
        for name in RUNS
    ],
)
@pytest.mark.quick(1)
def test_a_run_and_the_evaluation_of_its_adapter(
    place, monkeypatch, capsys, caplog, method
):
    options, count = RUNS[method]
    run = place / method
    code = command(
        monkeypatch, "finetune", "--model", place / "model", "--task", "sst2",
        "--data", place / "data", "--output", run, "--method", method,
        "--batch-size", 8, "--max-steps", 2, "--learning-rate", 0.03, *options,
    )  # fmt: skip
    assert code == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["trained_parameters_without_head"] == count
    assert load_adapter(run).entries == count + HEAD
    capsys.readouterr()
    # `finetune` sends its lines to standard error alone.
    monkeypatch.setattr(logging.getLogger("sparse_jax"), "propagate", True)
    code = command(
        monkeypatch, "evaluate", "--adapter", run, "--data", place / "data"
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert (code, found.pop("report")) == (0, metrics["reports"])
    assert found == metrics["eval"]
    line = f"evaluating on 13 examples in validation of `{place}/data`"
    assert line in caplog.messages
    assert f"the adapter names the base model `{place}/model`" in caplog.messages

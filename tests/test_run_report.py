"""A run says what it did: examples, selection, skipped updates, and what went wrong."""

import json
import logging

import pytest
from tiny_run import tiny_settings, write_data, write_model

from sparse_jax import finetune


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "sst2")


def test_examples_that_were_cut_are_told(model, data, tmp_path, caplog):
    # Every sentence has five words, seven tokens with the special ones.
    settings = tiny_settings(
        model, data, tmp_path / "run", method="head", max_length=6, max_steps=1
    )
    metrics = finetune(settings)
    assert metrics["examples"] == {
        "train": {"used": 22, "cut": 22, "dropped": 0},
        "validation": {"used": 13, "cut": 13, "dropped": 0},
    }
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert told[:2] == [
        "train: 22 examples used, 22 cut to 6 tokens",
        "validation: 13 examples used, 13 cut to 6 tokens",
    ]

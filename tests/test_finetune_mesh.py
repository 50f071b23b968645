"""Runs over a mesh of simulated devices, from settings to the run directory."""

import json

import numpy as np
import pytest
from tiny_run import tiny_settings, write_data, write_model
from tiny_text import text_settings, write_chats, write_decoder

from sparse_jax import evaluate_adapter, finetune
from sparse_jax.adapter.file import load_adapter
from sparse_jax.errors import InputError
from sparse_jax.training.run_files import updates_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return write_decoder(folder / "model"), write_chats(folder / "chats.jsonl")


def losses_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in updates_of([json.loads(line) for line in lines])]


CASES = {
    "sift": {"method": "sift", "density": 0.1, "where": ("query", "down")},
    "lora, ist": {"sampler": "ist", "probe_every": 2, "active": 0.5},
}


@pytest.mark.parametrize(
    "name", ["sift", pytest.param("lora, ist", marks=pytest.mark.slow)]
)
def test_a_run_on_a_mesh_is_that_of_one_device(name, texts, tmp_path):
    one = finetune(text_settings(*texts, tmp_path / "one", **CASES[name]))
    mesh = "data=2,fsdp=2,tensor=2"
    changes = {"mesh": mesh, **CASES[name]}
    many = finetune(text_settings(*texts, tmp_path / "many", **changes))
    assert many["trained_parameters"] == one["trained_parameters"]
    np.testing.assert_allclose(
        losses_of(tmp_path / "one"), losses_of(tmp_path / "many"), rtol=1e-4
    )
    np.testing.assert_allclose(one["eval"]["loss"], many["eval"]["loss"], rtol=1e-4)
    first, second = (load_adapter(tmp_path / run) for run in ("one", "many"))
    for leaf in first.support:
        np.testing.assert_array_equal(first.support[leaf], second.support[leaf])
        np.testing.assert_allclose(first.values[leaf], second.values[leaf], atol=1e-3)
    # The adapter of a mesh is at home anywhere.
    for other in (None, mesh, "tensor=2,fsdp=4"):
        again = evaluate_adapter(tmp_path / "many", data=str(texts[1]), mesh=other)
        np.testing.assert_allclose(again["loss"], many["eval"]["loss"], rtol=1e-5)


@pytest.mark.slow
def test_an_encoder_on_a_mesh_is_that_of_one_device(tmp_path):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    where = ("attention/query", "attention/output")
    one = finetune(tiny_settings(model, data, tmp_path / "one", where=where))
    mesh = "data=2,fsdp=4"
    many = tiny_settings(model, data, tmp_path / "many", mesh=mesh, where=where)
    many = finetune(many)
    assert one["eval"] == pytest.approx(many["eval"], rel=1e-4)
    np.testing.assert_allclose(
        losses_of(tmp_path / "one"), losses_of(tmp_path / "many"), rtol=1e-4
    )


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(
    texts, tmp_path
):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="`mesh` must be sizes of data, fsdp, tensor"):
        text_settings(*texts, run, mesh="8")
    with pytest.raises(InputError, match="must have as many devices as there are, 8"):
        finetune(text_settings(*texts, run, mesh="data=4"))
    with pytest.raises(InputError, match="`batch_size` must be a multiple of 8"):
        finetune(text_settings(*texts, run, mesh="data=8", batch_size=12))
    assert not run.exists()

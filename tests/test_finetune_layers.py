"""Runs that train a few layers at a time, from settings to the run directory."""

import json
import logging
from dataclasses import replace

import pytest
from tiny_run import tiny_settings, write_data, write_model

from sparse_jax import Settings, Static, evaluate_adapter, finetune
from sparse_jax.errors import InputError
from sparse_jax.samplers.registry import num_active, sampler_class
from sparse_jax.training.build import make_job, sampler_of

METHODS = {"lora": {}, "sift": {"where": ("query",)}, "full": {}, "bitfit": {}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_model(folder / "model"), write_data(folder / "data")


def rows_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "tokens" in row]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.quick(1)
def test_a_run_with_ist_tells_which_layers_it_trained(
    method, files, tmp_path, pictures
):
    output = tmp_path / "run"
    options = {"method": method, "sampler": "ist", "probe_every": 2, **METHODS[method]}
    metrics = finetune(tiny_settings(*files, output, epochs=2, max_steps=5, **options))
    rows = rows_of(output)
    assert metrics["steps"] == 5 == len(rows)
    # Half of the two layers is one; lists are told when they change.
    assert rows[0]["active"] in ([0], [1])
    assert rows[0]["importance"] == [0.0, 0.0]
    assert "importance" not in rows[1]
    assert (output / "layers.png").read_bytes().startswith(b"\x89PNG")
    found = evaluate_adapter(output, data=str(files[1]))
    assert found == metrics["eval"]


def test_the_layers_of_an_update_are_counted_before_it(
    files, tmp_path, monkeypatch, caplog
):
    # A command that ran before may have sent the lines to standard error alone.
    monkeypatch.setattr(logging.getLogger("sparse_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "sparse_jax")
    options = {"method": "bitfit", "sampler": "cyclic", "max_steps": 1}
    # A quarter of two layers is rounded down, but at least one to one.
    metrics = finetune(tiny_settings(*files, tmp_path / "run", **options))
    assert "training bitfit, 1 of 2 layers at a time by cyclic: " in caplog.text
    caplog.clear()
    again = tiny_settings(*files, tmp_path / "run", **options, resume=True)
    assert finetune(again) == metrics
    assert f"the run in {tmp_path / 'run'} is complete: nothing to" in caplog.text
    assert "training bitfit" not in caplog.text


@pytest.mark.parametrize("sampler", ["cka", "spectral"])
def test_a_run_trains_the_layers_of_the_largest_score(sampler, files, tmp_path):
    settings = tiny_settings(*files, tmp_path, method="bitfit", sampler=sampler)
    job = make_job(settings)
    model, params = job.base.model, job.base.params
    batch = next(iter(job.feed.train(0)))
    tokens = lambda: (model.states(params, batch), batch["attention_mask"])
    rule = sampler_class(sampler)(num_layers=2, num_active=1)
    scores = rule.measure(params["layers"], tokens)
    assert job.sampler == Static.of(int(scores.argmax()), num_layers=2)
    in_parts = make_job(replace(settings, accumulate=4))
    assert in_parts.sampler in (Static.of(0, num_layers=2), Static.of(1, num_layers=2))


@pytest.mark.parametrize("recompute", ["frozen", "all"])
@pytest.mark.slow
def test_what_is_computed_again_changes_no_loss(recompute, files, tmp_path):
    options = {"method": "lora", "sampler": "cyclic", "epochs": 2, "max_steps": 4}
    finetune(tiny_settings(*files, tmp_path / "a", **options))
    finetune(tiny_settings(*files, tmp_path / "b", **options, recompute=recompute))
    a, b = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b])


@pytest.mark.parametrize(
    ("active", "layers", "number"), [(0.25, 12, 3), (0.25, 6, 1), (0.29, 100, 29)]
)
def test_a_fraction_of_the_layers_is_rounded_down(active, layers, number):
    assert num_active(active, layers) == number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "best"}, "`sampler` must be one of ist, uniform, cyclic, fixed"),
        (
            {"active": 0.5},
            "`active` must be left out without a sampler",
        ),
        ({"sampler": "ist", "active": 0.0}, r"`active` must be in \(0, 1\], got 0.0"),
        ({"sampler": "ist", "layers": (1,)}, "`layers` must be left out .* static"),
        ({"sampler": "static"}, "`layers` must be given with sampler 'static'"),
        ({"sampler": "fixed"}, "`layer_weights` must be given with sampler 'fixed'"),
        ({"sampler": "static", "layers": (1,), "hold": 2}, "`hold` must be left out"),
        ({"sampler": "ist", "method": "head"}, "`sampler` must be left out with meth"),
        ({"sampler": "ist", "recompute": "most"}, "`recompute` must be one of none"),
        ({"recompute": "all"}, "`recompute` must be left out without a sampler"),
        ({"sampler": "ist", "probe_every": 0}, "`probe_every` must be positive"),
    ],
)
def test_settings_that_contradict_each_other_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Settings(model="m", task="mrpc", output="o", **options)


def test_weights_that_are_not_one_a_layer_are_refused():
    options = Settings(
        model="m", task="mrpc", output="o", sampler="fixed", layer_weights=(1.0, 2.0)
    )
    with pytest.raises(
        InputError, match="`layer_weights` must have 4 numbers, one for each .* got 2"
    ):
        sampler_of(options, 4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, -2.0), r"`layer_weights` must not be negative, got \(1.0, -2.0\)"),
        ((0.0, 0.0), "`layer_weights` must have 1 positive numbers, .* got 0"),
    ],
)
def test_weights_that_draw_no_layer_are_refused(weights, message):
    options = Settings(
        model="m", task="mrpc", output="o", sampler="fixed", layer_weights=weights
    )
    with pytest.raises(InputError, match=message):
        sampler_of(options, 2)


def test_a_layer_that_the_model_lacks_is_named():
    options = Settings(
        model="m", task="mrpc", output="o", sampler="static", layers=(1, 7)
    )
    with pytest.raises(InputError, match=r"`layers` must be in \[0, 4\), .* got 7"):
        sampler_of(options, 4)

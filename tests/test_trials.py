"""A trial chooses its learning rate on the first seed, and makes no run twice."""

import json
from dataclasses import replace

import pytest

from experiments import trials
from sparse_jax import InputError, Settings

SETTINGS = Settings(model="m", task="mrpc", output="", method="head")
MEASURE = trials.measure_of("mrpc")
# Accuracy in percent of every learning rate and seed.
ACCURACY = {(1e-4, 0): 50, (1e-3, 0): 70, (1e-3, 1): 60, (1e-3, 2): 50}
SIZES = {
    "trained_parameters": 1250, "trained_parameters_without_head": 1234,
    "optimizer_bytes": 10_000,
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    made = []

    def finetune(settings):
        made.append(settings)
        accuracy = ACCURACY[settings.learning_rate, settings.seed] / 100
        return {"eval": {"accuracy": accuracy}, **SIZES}

    monkeypatch.setattr(trials, "finetune", finetune)
    return made


def trial(folder):
    return trials.make_trial(
        "head", SETTINGS, measure=MEASURE, rates=[1e-4, 1e-3], seeds=[0, 1, 2],
        folder=folder,
    )  # fmt: skip


def test_the_learning_rate_is_the_best_of_the_first_seed(calls, tmp_path):
    found = trial(tmp_path)
    assert found == trials.Trial(1e-3, 1234, 8.0, (0.7, 0.6, 0.5))
    assert {(s.learning_rate, s.seed) for s in calls} == ACCURACY.keys()


def test_a_run_that_was_made_is_read(calls, tmp_path):
    made = tmp_path / "head-lr0.001-seed0"
    made.mkdir()
    metrics = {"eval": {"accuracy": 0.9}, **SIZES}
    (made / "metrics.json").write_text(json.dumps(metrics))
    assert trial(tmp_path).values == (0.9, 0.6, 0.5)


def test_a_run_that_was_made_with_other_settings_is_not_taken_for_it(calls, tmp_path):
    made = replace(SETTINGS, output=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    config = {"settings": made.record()}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "metrics.json").write_text("{}")
    assert trials.run_once(made) == {}
    with pytest.raises(InputError, match="`max_steps` must be left out as in the run"):
        trials.run_once(replace(made, max_steps=3))
    assert not calls


def test_a_run_that_was_interrupted_goes_on(calls, tmp_path):
    (tmp_path / "head-lr0.0001-seed0").mkdir()
    (tmp_path / "head-lr0.0001-seed0" / "config.json").write_text("{}")
    trial(tmp_path)
    resumed = [s for s in calls if s.resume]
    assert [(s.learning_rate, s.seed) for s in resumed] == [(1e-4, 0)]


def test_trials_are_shown_with_mean_and_deviation(calls, tmp_path, capsys):
    words = f"--model m --learning-rates 1e-4 1e-3 --seeds 0 1 2 --output {tmp_path}"
    args = trials.trial_parser("Trials.", rates=(), output="").parse_args(words.split())
    trials.show("MRPC", {"head": SETTINGS}, measure=MEASURE, args=args)
    shown = capsys.readouterr().out
    # The deviation of 70, 60, 50 is 10.
    for cell in ("MRPC, seeds 0, 1, 2", "accuracy, %", "1,234", "0.001", "60.0 ± 10.0"):
        assert cell in shown, cell

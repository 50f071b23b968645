"""HumanEval: samples are checked, run only when that is allowed, and kept."""

import gzip
import json
import sys

import pytest

from experiments import humaneval
from experiments.command import run_command
from sparse_jax.errors import InputError

PROBLEMS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def add{number}(a):\n",
        "test": f"def check(f):\n    assert f(1) == {number + 1}\n",
        "entry_point": f"add{number}",
    }
    for number in range(2)
]
SAMPLES = [
    ("HumanEval/0", "    return a\n"),
    ("HumanEval/0", "    return 1 / 0\n"),
    ("HumanEval/1", "    return a + 1\n"),
    ("HumanEval/1", "    return a + 1\n"),
    ("HumanEval/1", ""),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "HumanEval.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in PROBLEMS)
    return path


def run(monkeypatch, data, folder, lines, *arguments):
    """Runs the command on samples, given as lines."""
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--samples", folder / "samples.jsonl", "--data", data, *arguments]
    words += ["--output", folder / "results"]
    monkeypatch.setattr(sys, "argv", ["humaneval", *map(str, words)])
    run_command(humaneval.main)


def samples():
    return [dict(zip(("task_id", "completion"), one, strict=True)) for one in SAMPLES]


def test_samples_are_run_once_and_counted(data, tmp_path, monkeypatch, capsys):
    try:
        humaneval.require_containment()
    except InputError as error:
        pytest.skip(str(error))
    words = ["--allow-code-execution", "--k", "1", "2", "--seconds", "60"]
    run(monkeypatch, data, tmp_path, samples(), *words)
    found = json.loads((tmp_path / "results" / "humaneval.json").read_text())
    # Of 2 samples 1 passes, and of 3 samples 2 do.
    assert found["pass@1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["pass@2"] == 1
    assert found["samples"] == {"passed": 3, "failed": 2}
    assert "pass@2" in capsys.readouterr().out
    monkeypatch.setattr(humaneval, "run_contained", None)
    run(monkeypatch, data, tmp_path, samples(), *words)


def test_other_tests_of_a_problem_run_its_samples_again(data, tmp_path, monkeypatch):
    outcomes = iter(["passed", "failed"])
    monkeypatch.setattr(humaneval, "require_containment", lambda limits: None)
    monkeypatch.setattr(humaneval, "run_contained", lambda *args: next(outcomes))
    other = tmp_path / "more.jsonl.gz"
    with gzip.open(other, "wt") as file:
        problem = {**PROBLEMS[0], "test": "def check(f):\n    assert f(1) == 5\n"}
        file.write(json.dumps(problem))
    for path, rate in ((data, 1), (other, 0)):
        run(monkeypatch, path, tmp_path, samples()[:1], "--allow-code-execution")
        found = json.loads((tmp_path / "results" / "humaneval.json").read_text())
        assert found["pass@1"] == rate


def test_nothing_is_run_without_being_allowed(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(humaneval, "run_contained", None)
    run(monkeypatch, data, tmp_path, samples())
    assert "samples are not run" in capsys.readouterr().out


WRONG = {
    "a problem that is not known": (
        [{"task_id": "HumanEval/7", "completion": ""}],
        "line 1 must be of one of the 2 problems, got 'HumanEval/7'",
    ),
    "no completion": ([{"task_id": "HumanEval/0"}], "must have a text as `completion`"),
    "no samples": ([], "must have samples, got an empty file"),
    "few samples": (samples()[:1], "`k` must be at most 1, the fewest samples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(case, data, tmp_path, monkeypatch, capsys):
    lines, message = WRONG[case]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, data, tmp_path, lines, "--k", "2")
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

"""MMLU: choice by choice what PyTorch chooses, kept, and never mixed."""

import json
import sys

import numpy as np
import pytest
from tiny_text import write_decoder
from tokenizers import Tokenizer, models, pre_tokenizers

from experiments import mmlu
from experiments.command import run_command

WORDS = ["A", "B", "C", "D", "Answer:", "red", "blue", "<unk>", "<s>", "</s>"]
TESTS = {
    "astronomy": ["red red,red,blue,A,B,C", "blue,red,blue blue blue,C,D,D"],
    "virology": ["red,red,red,red,blue,A", '"long, " A B C D A B,red,A,B,D,B'],
}


def write_model(folder, seed):
    """Writes a decoder of 32 positions whose tokenizer knows the letters."""
    from transformers import PreTrainedTokenizerFast

    write_decoder(folder, seed)
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models, and two subjects of MMLU."""
    folder = tmp_path_factory.mktemp("mmlu")
    for seed in (0, 1):
        write_model(folder / f"model{seed}", seed)
    for split in ("dev", "test"):
        (folder / split).mkdir()
    for subject, lines in TESTS.items():
        lines = [line.replace('"long, "', "long " * 12) for line in lines]
        (folder / "test" / f"{subject}_test.csv").write_text("\n".join(lines))
        dev = folder / "dev" / f"{subject}_dev.csv"
        dev.write_text("x,A,A,A,A,D\n")
    return folder


def run(monkeypatch, files, *arguments, model="model0", output="results"):
    """Runs the command on the two subjects."""
    words = ["--model", files / model, "--data", files, "--output", files / output]
    words += ["--subjects", *TESTS, *arguments]
    monkeypatch.setattr(sys, "argv", ["mmlu", *map(str, words)])
    run_command(mmlu.main)


def kept(files, shots):
    path = files / "results" / f"mmlu-{shots}-shot.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("shots", [0, 1])
def test_every_choice_is_that_of_pytorch(shots, files, monkeypatch, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(monkeypatch, files, "--shots", shots)
    model = AutoModelForCausalLM.from_pretrained(files / "model0").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "model0")
    lines = kept(files, shots)
    # The example has 11 tokens. Without it the questions have 21, 22, 20 and 34.
    assert [line["shots"] for line in lines] == [shots, 0, shots, 0]
    assert [line["prediction"] == "" for line in lines] == [False] * 3 + [True]
    for line in lines[:3]:
        name = line["subject"]
        question, *choices, answer = TESTS[name][line["number"]].split(",")
        named = [f"{x}. {y}" for x, y in zip("ABCD", choices, strict=True)]
        text = "\n".join([question, *named, "Answer:"])
        begin = "The following are multiple choice questions (with answers) about  "
        example = "x\nA. A\nB. A\nC. A\nD. A\nAnswer: D\n\n" * line["shots"]
        prompt = f"{begin}{name}.\n\n{example}{text}"
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            wanted = model(ids).logits[0, -1].log_softmax(-1)[:4].numpy()
        np.testing.assert_allclose(line["log_likelihoods"], wanted, rtol=1e-4)
        assert line["prediction"] == "ABCD"[int(wanted.argmax())]
        assert line["answer"] == answer
    shown = capsys.readouterr().out
    assert f"{2 * shots} with fewer, 1 too long" in " ".join(shown.split())
    result = json.loads((files / "results" / f"mmlu-{shots}-shot.json").read_text())
    right = [line["prediction"] == line["answer"] for line in lines]
    assert result["accuracy"]["all"] == np.mean(right)
    assert result["questions"]["STEM"] == result["questions"]["other"] == 2


def test_a_run_that_was_interrupted_goes_on(files, monkeypatch):
    run(monkeypatch, files, output="half")
    path = files / "half" / "mmlu-0-shot.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text(f"{whole[2]}{whole[0]}{whole[1][:20]}")
    run(monkeypatch, files, output="half")
    again = path.read_text().splitlines(keepends=True)
    assert again[:2] == [whole[2], whole[0]]
    assert [json.loads(line)["number"] for line in again] == [0, 0, 1, 1]


WRONG = {
    "a subject of no file": (["--subjects", "anatomy"], "test.csv` must be a file"),
    "an unknown subject": (["--subjects", "magic"], "one of the 57 of MMLU, got 'm"),
    "too many shots": (["--shots", "2"], "`shots` must be at most 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(case, files, monkeypatch, capsys):
    words, message = WRONG[case]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, files, *words)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,1,2,3,4", "line 1 must have 6 fields"),
        ("x,1,2,3,4,E", "line 1 must have an answer among A, B, C, D, got 'E'"),
    ],
)
def test_a_bad_line_is_named(line, message, files, monkeypatch, capsys):
    (files / "test" / "anatomy_test.csv").write_text(line)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, files, "--subjects", "anatomy")
    assert message in capsys.readouterr().err
    (files / "test" / "anatomy_test.csv").unlink()


def test_results_of_another_model_are_refused(files, monkeypatch, capsys):
    run(monkeypatch, files, output="own")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, files, model="model1", output="own")
    assert "`output` must be a folder of the same model" in capsys.readouterr().err


def test_predictions_of_other_questions_are_refused(files, monkeypatch, capsys):
    run(monkeypatch, files, output="other")
    path = files / "test" / "virology_test.csv"
    before = path.read_text()
    path.write_text(before.replace("red,red,red,red,blue,A", "red,red,red,red,blue,B"))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, files, output="other")
    assert "prediction of virology 0 is for another" in capsys.readouterr().err
    path.write_text(before)

"""Candidates ranked by likelihood: that of a forward pass for each of them."""

import json
import sys

import jax
import numpy as np
import pytest
from tiny_text import tiny_decoder, write_decoder

from experiments import arithmetic, commonsense
from sparse_jax.data.conversations import PromptTemplate
from sparse_jax.data.llm_adapters import Question
from sparse_jax.data.tokenizer import load_tokenizer
from sparse_jax.errors import InputError
from sparse_jax.generation.ranking import rank_candidates

PLAIN = PromptTemplate("{instruction} {input}", "{instruction}")
COLORS = ("red", "blue", "green red")
QUESTIONS = [
    Question("say red twice :", "", "red", COLORS, " {}"),
    Question("say", "", "blue", COLORS[:2], " {}"),
    Question("say blue once : say green", "", "green", COLORS, " {}"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_decoder(tmp_path_factory.mktemp("decoder")))


def likelihood(model, params, tokenizer, prompt, response):
    """The log-probability of a response and its end, one token at a time."""
    before = tokenizer(prompt)["input_ids"]
    ids = before + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    batch = {name: np.array([ids]) for name in ("input_ids", "attention_mask")}
    batch["attention_mask"] = np.ones_like(batch["input_ids"])
    logs = jax.nn.log_softmax(model(params, batch)[0])
    places = range(len(before), len(ids))
    return sum(float(logs[t - 1, ids[t]]) for t in places), len(places)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_likeliest_response_wins(per_token, batch_size, tokenizer):
    model, params = tiny_decoder()
    found = rank_candidates(
        model,
        params,
        tokenizer,
        QUESTIONS,
        template=PLAIN,
        per_token=per_token,
        batch_size=batch_size,
    )
    for question, text in zip(QUESTIONS, found, strict=True):
        scores = {}
        for candidate in question.candidates:
            total, count = likelihood(
                model, params, tokenizer, question.instruction, f" {candidate}"
            )
            scores[f" {candidate}"] = total / count if per_token else total
        assert text == max(scores, key=scores.__getitem__)


def test_a_question_has_candidates_and_fits_the_model(tokenizer):
    model, params = tiny_decoder()
    with pytest.raises(InputError, match="must have candidates, got none for question"):
        rank_candidates(model, params, tokenizer, [Question("say", "", "1")])
    long = Question("say " * 40, "", "red", COLORS)
    with pytest.raises(InputError, match="at most 32 tokens, .* got 4[0-9] for quest"):
        rank_candidates(model, params, tokenizer, [QUESTIONS[0], long], template=PLAIN)


def run(monkeypatch, capsys, main, *arguments):
    """Runs a script and returns what it prints."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    main()
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank", "write", "arithmetic"])
def test_genuine_questions_are_asked_and_a_finished_run_is_not_made_again(
    name, shared_data, tmp_path, monkeypatch, capsys
):
    adapters = shared_data / "llm_adapters"
    questions = json.loads((adapters / "training" / "math_data.json").read_text())
    short = sorted(questions, key=lambda q: len(q["instruction"] + q["output"]))[:24]
    (tmp_path / "train.json").write_text(json.dumps(short))
    sets = {"rank": ["winogrande"], "write": ["ARC-Easy"], "arithmetic": ["mawps"]}
    for one in sets[name]:
        folder = tmp_path / "tests" / one
        folder.mkdir(parents=True)
        asked = json.loads((adapters / "test_sets" / one / "test.json").read_text())
        # A small model has few positions, and the prompt takes many.
        asked = [{**q, "instruction": q["instruction"][-60:]} for q in asked[:3]]
        (folder / "test.json").write_text(json.dumps(asked))
    arguments = [
        "--model", shared_data / "models" / "tinystories-656k",
        "--data", tmp_path / "train.json", "--tests", tmp_path / "tests",
        "--sets", *sets[name], "--layers", "ist", "--seeds", 0,
        "--learning-rates", 1e-3, "--max-steps", 1, "--beams", 2,
        "--max-length", 512, "--output", tmp_path / "runs",
    ]  # fmt: skip
    main = arithmetic.main if name == "arithmetic" else commonsense.main
    if name != "arithmetic":
        arguments += ["--answer-by", name]
    first = run(monkeypatch, capsys, main, *arguments)
    assert sets[name][0] in first
    assert "lora-ist" in first
    made = tmp_path / "runs" / "lora-ist-lr0.001-seed0"
    before = (made / "metrics.json").stat().st_mtime_ns
    assert run(monkeypatch, capsys, main, *arguments) == first
    assert (made / "metrics.json").stat().st_mtime_ns == before

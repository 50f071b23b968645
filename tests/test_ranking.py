"""Candidates ranked by likelihood: that of a forward pass for each of them."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_text import CONFIG, random_params, tiny_decoder, write_decoder

from experiments import tables
from experiments.answers import cloze
from sparse_jax.data.batches import TokenSequences
from sparse_jax.data.conversations import PromptTemplate
from sparse_jax.data.llm_adapters import Question
from sparse_jax.data.tokenizer import load_tokenizer
from sparse_jax.errors import InputError
from sparse_jax.generation import prefix_trees
from sparse_jax.generation.prefix_trees import tree_batches
from sparse_jax.generation.ranking import rank_candidates, score_sequences
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import ClassicConfig, LayerKind
from sparse_jax.models.families.bloom import BLOOM
from sparse_jax.models.families.gpt2 import GPT2
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model

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
@pytest.mark.quick(1)
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


def test_a_question_has_candidates(tokenizer):
    model, params = tiny_decoder()
    with pytest.raises(InputError, match="must have candidates, got none for question"):
        rank_candidates(model, params, tokenizer, [Question("say", "", "1")])


def test_a_question_that_does_not_fit_is_counted_and_gets_no_answer(tokenizer, caplog):
    model, params = tiny_decoder()
    long = Question("say " * 40, "", "red", COLORS)
    asked = [QUESTIONS[0], long, QUESTIONS[1]]
    found = rank_candidates(model, params, tokenizer, asked, template=PLAIN)
    assert found[1] == ""
    alone = rank_candidates(model, params, tokenizer, QUESTIONS[:2], template=PLAIN)
    assert [found[0], found[2]] == alone
    assert "1 of 3 questions are longer than the 32 positions" in caplog.text


SMALL = {"vocab_size": 17, "hidden_size": 16, "num_layers": 2}
SMALL |= {"num_heads": 2, "intermediate_size": 24}
DECODERS = {
    "windows in some layers": Model(
        CausalLM,
        LLAMA,
        replace(
            CONFIG,
            kinds=(LayerKind(sliding_window=3, rope_theta=1e4), LayerKind()),
            layer_kinds=(0, 0, 1, 0),
        ),
    ),
    "table of positions": Model(CausalLM, GPT2, ClassicConfig(**SMALL)),
    "linear biases": Model(CausalLM, BLOOM, ClassicConfig(**SMALL)),
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.quick(1)
def test_sequences_that_share_a_row_score_as_each_alone(name):
    """Three beginnings, branches of branches, one sequence twice, one that is short."""
    model = DECODERS[name]
    params = random_params(model)
    texts = ["1234567", "1234568", "123459", "12345", "1234567", "35", "3512", "99"]
    ids = [np.array([*map(int, text)], np.int32) for text in texts]
    marks = [np.arange(len(one)) >= len(one) // 2 for one in ids]
    sequences = TokenSequences(ids, marks, 8, 0)
    batches = [*tree_batches(sequences, 1)]
    assert sum(int(b.inputs["attention_mask"].sum()) for b in batches) == 11
    found = score_sequences(model, params, sequences)
    for one, is_target, total, is_greedy in zip(ids, marks, *found, strict=True):
        whole = {"input_ids": one[None], "attention_mask": np.ones_like(one)[None]}
        logs = jax.nn.log_softmax(model(params, whole)[0])
        places = np.flatnonzero(is_target)
        wanted = float(logs[places - 1, one[places]].sum())
        assert total == pytest.approx(wanted, rel=1e-5)
        assert is_greedy == (logs[places - 1].argmax(-1) == one[places]).all()


def rows_of(sizes, random=None):
    """Sequences of which so many tokens are read, without a common beginning."""
    ids = [np.full(size + 1, i, np.int32) for i, size in enumerate(sizes)]
    if random is not None:
        ids = [np.append(random.integers(0, 10, len(x) - 1), 1) for x in ids]
    marks = [np.arange(len(one)) == len(one) - 1 for one in ids]
    return TokenSequences(ids, marks, 512, 0)


@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [
        # 300 + 200 in the wide row; then 250, nine times 2 x 100, and 2 x 100 + 40.
        (
            [300, 250, 200, 40, *[100] * 20],
            [(1, 512), (4, 256), (4, 256), (1, 256), (1, 256), (1, 256)],
        ),
        ([300, 100, 90], [(1, 512)]),
        ([300] * 13, [(8, 512), (4, 512), (1, 512)]),
        ([], []),
    ],
    ids=["some", "all", "none", "no trees"],
)
def test_short_trees_fill_what_is_left_of_wide_rows(sizes, shapes):
    batches = [*tree_batches(rows_of(sizes), 16)]
    assert [batch.inputs["input_ids"].shape for batch in batches] == shapes
    numbers = [number for batch in batches for number in batch.numbers]
    assert sorted(numbers) == [*range(len(sizes))]


@pytest.mark.parametrize(("length", "columns"), [(700, 1024), (1500, 2048)])
def test_a_long_prompt_is_read_once_for_all_of_its_candidates(length, columns):
    prompt = np.arange(length, dtype=np.int32)
    ids = [np.append(prompt, [-1, candidate, 9]) % 9999 for candidate in range(4)]
    marks = [np.arange(length + 3) > length for _ in ids]
    (batch,) = tree_batches(TokenSequences(ids, marks, length + 3, 0), 16)
    assert batch.inputs["input_ids"].shape == (1, columns)
    # The prompt and the mark after it once, of each candidate what it begins with.
    assert batch.inputs["attention_mask"].sum() == length + 1 + 4


def test_trees_that_fill_a_row_are_scored_alone(monkeypatch):
    monkeypatch.setattr(prefix_trees, "_COLUMNS", 16)
    model, params = tiny_decoder()
    sequences = rows_of([20, 14, 7, 5, 5], np.random.default_rng(0))
    batches = [*tree_batches(sequences, 4)]
    shapes = [batch.inputs["input_ids"].shape for batch in batches]
    assert (shapes, len(batches[0].numbers)) == ([(1, 32), (1, 16), (1, 16)], 3)
    found = score_sequences(model, params, sequences).log_likelihood
    for one, total in zip(sequences.input_ids, found, strict=True):
        whole = {"input_ids": one[None], "attention_mask": np.ones_like(one)[None]}
        logs = jax.nn.log_softmax(model(params, whole)[0])
        assert total == pytest.approx(float(logs[-2, one[-1]]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cloze", "rank", "write", "arithmetic"])
def test_genuine_questions_are_asked_and_a_finished_run_is_not_made_again(
    name, shared_data, tmp_path, capsys
):
    adapters = shared_data / "llm_adapters"
    questions = json.loads((adapters / "training" / "math_data.json").read_text())
    short = sorted(questions, key=lambda q: len(q["instruction"] + q["output"]))[:24]
    (tmp_path / "train.json").write_text(json.dumps(short))
    one = {"cloze": "winogrande", "rank": "ARC-Easy", "write": "ARC-Easy"}
    one = one.get(name, "mawps")
    folder = tmp_path / "tests" / one
    folder.mkdir(parents=True)
    asked = json.loads((adapters / "test_sets" / one / "test.json").read_text())[:3]
    # A small model has few positions, and the prompt takes many.
    short = [{**q, "instruction": q["instruction"][-60:]} for q in asked]
    (folder / "test.json").write_text(json.dumps(asked if name == "cloze" else short))
    table = "arithmetic" if name == "arithmetic" else "commonsense"
    words = [
        table, "--model", shared_data / "models" / "tinystories-656k",
        "--train", tmp_path / "train.json", "--data", tmp_path / "tests",
        "--sets", one, "--rows", "untrained", "lora", "lora+ist",
        "--max-steps", 1, "--beams", 2, "--max-length", 512,
        "--output", tmp_path / "runs",
    ]  # fmt: skip
    if table == "commonsense":
        words += ["--answer-by", name]
    tables.main([*map(str, words)])
    first = capsys.readouterr().out
    assert one in first and "lora+ist" in first
    made = tmp_path / "runs" / "lora+ist-lr0.002-seed0"
    before = (made / "metrics.json").stat().st_mtime_ns
    tables.main([*map(str, words)])
    assert capsys.readouterr().out == first
    assert (made / "metrics.json").stat().st_mtime_ns == before


def test_the_answer_of_a_blank_is_read_and_what_follows_is_scored():
    text = (
        "Please choose the correct answer to fill in the blank to complete the given "
    )
    text += "sentence: Ann saw Eve and _ smiled.\n\nOption1: Ann Option2: Eve "
    text += "Answer format: option1/option2"
    one = Question(text, "", "option2", ("option1", "option2"))
    pieces = [*map(tuple, cloze(one)[1].pieces)]
    assert pieces == [("Ann saw Eve and Eve", False, False), (" smiled.", True, False)]
    with pytest.raises(InputError, match="must have questions that list their answers"):
        cloze(Question("How many?", "", "2", ("1", "2")))

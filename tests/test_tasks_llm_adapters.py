import json
import re

import pytest

from sparse_jax.data.conversations import ALPACA, LLM_ADAPTERS
from sparse_jax.data.llm_adapters import (
    QUESTION_SETS,
    Question,
    grade,
    load_questions,
)
from sparse_jax.errors import InputError

ARC = (
    "Please choose the correct answer to the question: Which is wet?\n\n"
    "Answer1: sand Answer2: water Answer3: air\n\n"
    "Answer format: answer1/answer2/answer3"
)


@pytest.fixture
def folder(tmp_path):
    def write(name, records):
        path = tmp_path / name / "test.json"
        path.parent.mkdir()
        path.write_text(json.dumps(records), encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "It is false, not true.", "false"),
        ("boolq", "True", ""),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("social_i_qa", "answer3 and answer1", "answer3"),
        ("openbookqa", "Answer: answer12", "answer1"),
        ("hellaswag", "ending4", "ending4"),
        ("winogrande", "option3 or option2", "option2"),
        ("ARC-Easy", "answer5", "answer5"),
        ("ARC-Challenge", "", ""),
        ("gsm8k", "The answer is $1,080. Twice 540.50", "540.50"),
        ("gsm8k", "none at all", ""),
        ("mawps", "it falls by -3 to -1.25", "-1.25"),
        ("SVAMP", "76 - 25 = 51 dollars.", "51"),
        ("AQuA", "the answer is (D), not A", "D"),
        ("AQuA", "Because of that, C", "B"),
    ],
)
def test_an_answer_is_found_as_published(name, text, answer):
    assert QUESTION_SETS[name].extract(text) == answer


@pytest.mark.parametrize(
    ("text", "is_right"),
    [("18", 1), ("18.0009", 1), ("18.002", 0), ("", 0), ("18. It is 18.", 1)],
)
def test_a_number_is_right_within_a_thousandth(text, is_right):
    asked = [Question("How many?", "", "18.0")]
    assert grade(QUESTION_SETS["gsm8k"], asked, [text]) == [is_right]


def test_a_text_is_right_where_it_names_the_answer():
    asked = [Question("?", "", answer) for answer in ("true", "true", "false", "false")]
    texts = ["true", "it is false", "false", "unknown"]
    assert grade(QUESTION_SETS["boolq"], asked, texts) == [True, False, True, False]


def test_the_candidates_are_those_of_the_question(folder):
    data = folder("ARC-Easy", [{"instruction": ARC, "answer": "answer2"}])
    (question,) = load_questions(QUESTION_SETS["ARC-Easy"], data)
    assert question.candidates == ("answer1", "answer2", "answer3")
    ranked = question.responses()
    assert [chat.pieces[1].text for chat in ranked] == [
        f"the correct answer is answer{i}" for i in (1, 2, 3)
    ]
    assert {chat.pieces[0].text for chat in ranked} == {ALPACA.fill(ARC)}


def test_the_letters_are_the_candidates_of_aqua(folder):
    data = folder("AQuA", [{"instruction": "?", "input": "", "answer": "C"}])
    (question,) = load_questions(QUESTION_SETS["AQuA"], data)
    assert question.responses()[2].pieces[1].text == "The answer is (C)."


def test_a_number_has_no_candidates(folder):
    data = folder("mawps", [{"instruction": "?", "answer": "1.8333333333333335"}])
    (question,) = load_questions(QUESTION_SETS["mawps"], data)
    assert question.responses() == []


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("boolq", [], "test.json` must have questions, got an empty list."),
        ("boolq", {}, "test.json` must be a list of objects, got dict."),
        ("boolq", [{"answer": "a"}], "item 1 must have a column `instruction`"),
        ("boolq", [{"instruction": "a"}], "item 1 must have a column `answer`"),
        (
            "ARC-Easy",
            [{"instruction": ARC, "answer": "answer4"}],
            "item 1 must have an answer among answer1, answer2, answer3, got 'answer4'",
        ),
        (
            "gsm8k",
            [{"instruction": "?", "answer": "1"}, {"instruction": "?", "answer": "x"}],
            "item 2 must have a number as its answer, got 'x'.",
        ),
    ],
)
def test_a_wrong_file_is_an_error(folder, name, records, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_questions(QUESTION_SETS[name], folder(name, records))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="hellaswag/test.json` must be a file"):
        load_questions(QUESTION_SETS["hellaswag"], tmp_path)


def test_the_prompt_of_alpaca():
    assert ALPACA.fill("Add {x}.", "1") == (
        "Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1\n\n### Response:"
    )
    assert ALPACA.fill("Add.") == (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Response:"
    )


@pytest.mark.parametrize("given", ["", "1"])
def test_the_prompt_of_llm_adapters_is_alpaca_with_spaces(given):
    lines = LLM_ADAPTERS.fill("Add.", given).split("\n")
    stripped = [line.strip() for line in lines]
    assert stripped == [*ALPACA.fill("Add.", given).split("\n"), ""]
    assert lines[0].endswith("request. " if given else "request.  ")
    assert lines[1] == ""
    assert all(line.startswith(" " * 16) for line in lines[2:])


@pytest.mark.parametrize(
    ("name", "count", "share"),
    [
        ("boolq", 60, 1),
        ("piqa", 60, 1),
        ("social_i_qa", 1954, 1),
        ("winogrande", 1267, 1),
        ("ARC-Easy", 2376, 1),
        ("ARC-Challenge", 1172, 1),
        ("openbookqa", 500, 1),
        # Their outputs are GPT-3.5's own, or empty.
        ("gsm8k", 1319, 0.585),
        ("AQuA", 254, 0.429),
        ("mawps", 238, 0),
        ("SVAMP", 1000, 0.803),
    ],
)
def test_genuine_outputs_give_their_answers(shared_data, name, count, share):
    folder = shared_data / "llm_adapters/test_sets"
    path = folder / name / "test.json"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    questions = QUESTION_SETS[name]
    asked = load_questions(questions, folder)
    outputs = [record["output"] for record in json.loads(path.read_text("utf-8"))]
    assert len(asked) == count
    right = grade(questions, asked, outputs)
    assert sum(right) / len(right) == pytest.approx(share, abs=1e-3)
    assert all(question.answer in question.candidates for question in asked) == (
        name not in ("gsm8k", "mawps", "SVAMP")
    )

import csv
import re

import pytest

from sparse_jax.data.glue import TASKS
from sparse_jax.data.read_rows import read_rows
from sparse_jax.errors import InputError


@pytest.fixture
def rows_of(tmp_path):
    def read(name, content, task="rte"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_rows(path, TASKS[task]).numbered)

    return read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "x\ty\n1\t2\n3\t4\n"),
        ("a.txt", "\ufeffx\ty\r\n1\t2\r\n3\t4"),
        ("a.csv", "x,y\n1,2\n3,4\n"),
        ("a.jsonl", '{"x": "1", "y": "2"}\n{"x": "3", "y": "4"}\n'),
    ],
)
def test_every_format_gives_the_same_rows(rows_of, name, content):
    first = 1 if name.endswith("jsonl") else 2
    rows = [(first, {"x": "1", "y": "2"}), (first + 1, {"x": "3", "y": "4"})]
    assert rows_of(name, content) == rows


def test_a_json_list_counts_items(rows_of):
    assert rows_of("a.JSON", '\n[{"x": 1},\n\n{"x": 2}]') == [
        (1, {"x": 1}),
        (2, {"x": 2}),
    ]


def test_quotes_in_tab_separated_files_are_letters(rows_of):
    assert rows_of("a.tsv", 'x\ty\n"a\tb"\n') == [(2, {"x": '"a', "y": 'b"'})]


def test_quotes_in_csv_hold_commas_quotes_and_line_breaks(rows_of):
    content = 'x,y\n"a, ""b""\nc",d\n'
    assert rows_of("a.csv", content) == [(3, {"x": 'a, "b"\nc', "y": "d"})]


@pytest.mark.parametrize("letter", ["\x0b", "\x1c", "\x85", "\u2028", "\r"])
def test_only_line_feeds_end_lines(rows_of, letter):
    (row,) = rows_of("a.tsv", f"x\ty\na{letter}b\tc\n")
    assert row == (2, {"x": f"a{letter}b", "y": "c"})


def test_cola_needs_no_header(rows_of):
    (row,) = rows_of("a.tsv", "gj04\t0\t*\tHe go.\n", "cola")
    assert row == (
        1,
        {"source": "gj04", "label": "0", "star": "*", "sentence": "He go."},
    )


def test_cola_may_have_a_header(rows_of):
    (row,) = rows_of("a.tsv", "sentence\tlabel\nHe goes.\t1\n", "cola")
    assert row == (2, {"sentence": "He goes.", "label": "1"})


def test_halves_of_broken_questions_are_dropped_for_qqp_only(rows_of):
    content = "question1\tquestion2\tis_duplicate\na\tb\nc\td\te\n"
    assert len(rows_of("a.tsv", content, "qqp")) == 1
    with pytest.raises(InputError, match="a.tsv` line 2 must have 3 fields"):
        rows_of("a.tsv", content, "mrpc")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "x\ty\n1\t2\n3\n", "a.tsv` line 3 must have 2 fields (x, y), got 1."),
        ("a.csv", "x,y\n1,2,3\n", "a.csv` line 2 must have 2 fields (x, y), got 3."),
        ("a.csv", 'x;y\r\n"1";2\r\n', "line 1 must name the columns with commas "),
        ("a.csv", "x\ty\n1\t2\n", "line 1 must name the columns with commas "),
        ("a.csv", 'x\n"1"2\n', "a.csv` line 2 must be CSV: "),
        ("a.csv", 'x\n"1\n\n', "a.csv` line 3 must be CSV: unexpected end of data. "),
        ("a.jsonl", "{}\n{x}\n", "a.jsonl` line 2 must be a JSON object: "),
        ("a.jsonl", "{}\n\n[1]\n", "a.jsonl` line 3 must be an object, got list."),
        ("a.json", "[{},\n{]\n", "a.json` line 2 must be JSON: "),
        ("a.json", "{}", "a.json` must be a list of objects, got dict."),
        ("a.json", "[{}, 1]", "a.json` item 2 must be an object, got int."),
        (
            "a.tsv",
            b"x\ty\n\xff\t1\n",
            "a.tsv` line 2 must be UTF-8, got the byte 0xff.",
        ),
        ("a.parquet", "PAR1", "a.parquet` must be a Parquet file: "),
        (
            "a.xlsx",
            "",
            "must end in .tsv, .txt, .csv, .json, .jsonl, .parquet, got '.x",
        ),
        ("train", "x", ".csv, .json, .jsonl, .parquet, got ''."),
    ],
)
def test_an_error_names_file_line_and_rule(rows_of, name, content, message):
    with pytest.raises(InputError, match=re.escape(message)):
        rows_of(name, content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "9" * 6000, "a.json` must be JSON: Exceeds the limit (4300 digits)"),
        (
            "a.json",
            '[{}, {"x": %s}]' % ("9" * 6000),
            "a.json` item 2 must be JSON: Exc",
        ),
        ("a.jsonl", "{}\n" + "9" * 6000, "a.jsonl` line 2 must be a JSON object: Exc"),
        ("a.json", "[{}," + "[" * 10_000, "item 2 must be JSON: it is nested too dee"),
        ("a.jsonl", '{"x":' * 10_000, "line 1 must be a JSON object: it is nested too"),
        (
            "a.json",
            '[{}, {"x": [{"y": 1, "y": 2}]}]',
            "item 2 must be JSON: the key 'y",
        ),
        (
            "a.jsonl",
            '{"x": 1, "x": 2}',
            "line 1 must be a JSON object: the key 'x' is ",
        ),
        (
            "a.csv",
            "x,y,x\n1,2,3\n",
            "line 1 must name every column once, got 'x' 2 tim",
        ),
        ("a.tsv", "\nx\tx\n1\t2\n", "a.tsv` line 2 must name every column once, got"),
        ("a.csv", "x\n1\0\n", "a.csv` line 2 must be UTF-8, got the byte 0x00. Conver"),
        ("a.csv", "x,y\n".encode("utf-16"), "line 1 must be UTF-8, got the byte 0xff"),
        ("a.csv", "x\x1b[31m,y\n1\n", "2 fields ('x\\x1b[31m', y), got 1."),
    ],
)
def test_what_python_would_read_wrongly_or_not_at_all_is_refused(
    rows_of, name, content, message
):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        rows_of(name, content)
    assert len(str(error.value)) < 400


def test_a_field_of_csv_may_be_long(rows_of):
    text = "x" * 200_000
    assert rows_of("a.csv", f"x,y\n{text},1\n") == [(2, {"x": text, "y": "1"})]
    # The limit of the standard library stays what it was for others.
    assert csv.field_size_limit() < len(text)


def test_blank_lines_before_a_header_do_not_count(rows_of):
    assert rows_of("a.csv", "\n\nx,,\n1,,\n") == [(4, {"x": "1", "": ""})]


def test_utf8_errors_after_a_byte_order_mark_have_the_right_line(rows_of):
    with pytest.raises(InputError, match="line 3 must be UTF-8"):
        rows_of("a.tsv", b"\xef\xbb\xbfx\n1\n\xe9\n")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="a.tsv` must be a file, and there is none."):
        read_rows(tmp_path / "a.tsv", TASKS["rte"])


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.json", "a.jsonl"])
@pytest.mark.parametrize("task", ["rte", "cola"])
def test_an_empty_file_has_no_rows(rows_of, name, task):
    assert rows_of(name, "", task) == []

"""Training data that are read while the run goes on."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from tiny_text import text_settings, write_chats, write_decoder

from sparse_jax import InputError, evaluate_adapter, finetune
from sparse_jax.data.batches import TokenSequences, train_batches
from sparse_jax.data.read_rows import read_rows
from sparse_jax.data.stream import Stream, read_head
from sparse_jax.training.feed import Ahead
from sparse_jax.training.loop import Loop

LENGTH = 12


def write(path, count, first=0):
    """Writes records of 2 to 7 tokens, all of them the number of the record."""
    sizes = np.random.default_rng(0).integers(2, 8, first + count)[first:]
    lines = [json.dumps({"ids": [i] * int(n)}) for i, n in enumerate(sizes, first)]
    path.write_text("\n".join(lines) + "\n")
    return path


def sequences_of(rows, is_packed=False):
    """Makes a sequence of every record, with a weight of 1, 2 or 3."""
    ids = [np.array(row["ids"], np.int32) for _, row in rows.numbered]
    marks = [np.arange(len(one)) > 0 for one in ids]
    weights = np.array([1 + one[0] % 3 for one in ids], np.float32)
    return TokenSequences(ids, marks, LENGTH, 0, is_packed=is_packed, weights=weights)


def stream_of(path, window=7, is_packed=False, **changes):
    tokenize = lambda rows: sequences_of(rows, is_packed)
    options = {"batch_size": 4, "accumulate": 1, "seed": 0, **changes}
    return Stream(path, tokenize, window=window, **options)


def some(stream, count, first=0):
    return [*itertools.islice(stream.batches(first), count)]


def same(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def records(batches):
    """Returns the records of batches in their order, a number for every one."""
    rows = np.concatenate([one["input_ids"] for one in batches])
    weights = np.concatenate([one["weights"] for one in batches])
    return [int(row[0]) for row, w in zip(rows, weights, strict=True) if w.any()]


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_window_of_the_whole_file_gives_the_batches_of_one_in_memory(
    tmp_path, is_packed
):
    path = write(tmp_path / "a.jsonl", 40)
    examples = sequences_of(read_rows(path), is_packed)
    rows = len(train_batches(examples, 1, seed=3, epoch=0))
    size = next(n for n in (4, 5, 3, 2, 7) if rows % n == 0)
    epochs = [train_batches(examples, size, seed=3, epoch=epoch) for epoch in (0, 1)]
    expected = [batch for epoch in epochs for batch in epoch]
    stream = stream_of(path, 40, is_packed, batch_size=size, seed=3)
    assert same(some(stream, len(expected)), expected)


def test_every_record_is_in_one_row_of_every_pass(tmp_path):
    stream = stream_of(write(tmp_path / "a.jsonl", 40))
    passes = records(some(stream, 30))
    for epoch in range(3):
        assert sorted(passes[40 * epoch : 40 * (epoch + 1)]) == [*range(40)]
    assert len({tuple(passes[i : i + 7]) for i in (0, 40, 80)}) == 3
    # Those of a window come together.
    assert sorted(passes[:7]) == [*range(7)]
    assert sorted(passes[7:14]) == [*range(7, 14)]
    assert passes[:7] != [*range(7)]


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_batch_depends_on_seed_and_number_only(tmp_path, is_packed):
    path = write(tmp_path / "a.jsonl", 40)
    expected = some(stream_of(path, is_packed=is_packed), 25)
    for first in (1, 3, 9, 13, 24):
        stream = stream_of(path, is_packed=is_packed)
        assert same(some(stream, 1, first), expected[first : first + 1])
    assert not same(some(stream_of(path, is_packed=is_packed, seed=1), 25), expected)


def test_a_batch_is_computed_in_parts(tmp_path):
    path = write(tmp_path / "a.jsonl", 40)
    (whole,), (parts,) = (some(stream_of(path, accumulate=n), 1) for n in (1, 2))
    assert parts["input_ids"].shape == (2, 2, *whole["input_ids"].shape[1:])
    assert np.array_equal(parts["weights"].reshape(whole["weights"].shape),
                          whole["weights"])  # fmt: skip


def test_the_first_records_can_be_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", 20)
    rows, start = read_head(path, 5)
    assert [ids[0] for ids in sequences_of(rows).input_ids] == [*range(5)]
    assert start.line == 5
    stream = stream_of(path, batch_size=5, start=start)
    assert sorted(records(some(stream, 3))) == [*range(5, 20)]
    with pytest.raises(InputError, match="must have more than 20 examples to hold 20"):
        read_head(path, 20)


def test_marks_blank_lines_and_line_ends_do_not_matter(tmp_path):
    plain = write(tmp_path / "a.jsonl", 20)
    text = plain.read_text().replace("\n", "\r\n\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n\n")
    both = [some(stream_of(tmp_path / name), 12) for name in ("a.jsonl", "b.jsonl")]
    assert same(*both)


def test_a_resumed_run_finds_its_place_without_reading_what_is_before(tmp_path):
    path, index = write(tmp_path / "a.jsonl", 40), tmp_path / "run" / "stream.jsonl"
    expected = some(stream_of(path), 25)
    first = stream_of(path)
    first.keep_index(index, is_writer=True)
    some(first, 6)
    read = []
    for torn in (b"", b'[9, [1, 2'):  # fmt: skip
        index.write_bytes(index.read_bytes() + torn)
        again = stream_of(path)
        again.tokenize = lambda rows: read.append(1) or sequences_of(rows)
        again.keep_index(index, is_writer=True)
        assert same(some(again, 1, 6), expected[6:7])
    # The window of the batch, and the one that is read ahead.
    assert len(read) <= 4
    assert again.counts(2) == (14, 0, 0)
    index.write_text("no index")
    again = stream_of(path)
    again.keep_index(index, is_writer=True)
    assert same(some(again, 3, 6), expected[6:9])


def change_first(lines):
    return [lines[0].replace("[0", "[1"), *lines[1:]]


def change_read(lines):
    return [*lines[:10], lines[10].replace("[10", "[11"), *lines[11:]]


def change_unread(lines):
    return [*lines[:35], lines[35].replace("[35", "[36"), *lines[36:]]


@pytest.mark.parametrize(
    ("change", "batches", "is_refused"),
    [
        (change_read, 6, True),
        (change_unread, 3, False),
        (change_unread, 12, True),
        (lambda lines: [*lines, lines[0]], 12, True),
        (lambda lines: lines[:12], 6, True),
    ],
)
def test_what_was_read_must_stay_as_it_is(tmp_path, change, batches, is_refused):
    path, index = write(tmp_path / "a.jsonl", 42), tmp_path / "stream.jsonl"
    stream = stream_of(path)
    stream.keep_index(index, is_writer=True)
    some(stream, batches)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    again = stream_of(path)
    if not is_refused:
        again.keep_index(index, is_writer=True)
        assert records(some(again, 11))[35 - 7 : 42].count(36) == 2
        return
    with pytest.raises(InputError, match=r"a\.jsonl` must be what it was .* in lines"):
        again.keep_index(index, is_writer=True)


def test_a_window_that_two_read_at_once_is_added_once(tmp_path):
    path = write(tmp_path / "a.jsonl", 40)
    expected, stream = some(stream_of(path), 25), stream_of(path)
    stream.tokenize = lambda rows: time.sleep(0.02) or sequences_of(rows)
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda _: some(stream, 25), range(2))]
    assert all(same(one, expected) for one in found)


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    for count in (41, 20):
        stream = stream_of(write(path, 40))
        some(stream, 1)
        write(path, count)
        with pytest.raises(InputError, match="must stay as it is while it is read"):
            some(stream, 12)
    stream = stream_of(write(path, 40))
    some(stream, 12)
    write(path, 40, first=1)
    with pytest.raises(InputError, match="must be what it was when the run read it"):
        some(stream, 12, 3)


BROKEN = {
    "no object": (b"17", "must be an object, got int"),
    "no JSON": (b'{"ids": [1, 2', "must be a JSON object: "),
    "no UTF-8": (b'{"ids": "\xff"}', "must be UTF-8, got the byte 0xff"),
    "a null character": (b'{"ids": "\0"}', "must be UTF-8, got the byte 0x00"),
}


@pytest.mark.parametrize(("line", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", 20)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:16], line, *lines[17:]]))
    with pytest.raises(
        InputError, match=rf"a\.jsonl` line 17 {message}.*`resume=True`"
    ):
        some(stream_of(path), 5)
    path.write_bytes(b"\n".join([*lines[:16], line]))
    with pytest.raises(InputError, match="line 17 .* last line: the file may be tr"):
        some(stream_of(path), 5)
    path.write_bytes(line)
    with pytest.raises(InputError, match=f"line 1 {message}"):
        stream_of(path)


def test_a_file_without_records_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="must have examples, got none"):
        stream_of(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="must be a file that can be read"):
        stream_of(tmp_path / "b.jsonl")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_decoder(folder / "model"), write_chats(folder / "chats.jsonl")


def settings_of(files, output, **changes):
    options = {
        "streaming": True, "buffer_size": 6, "held_out": 8.0, "max_steps": 7,
        "batch_size": 4, "epochs": 3, "save_every": 2, "packing": True, **changes,
    }  # fmt: skip
    return text_settings(files[0], files[1], output, **options)


def stop_at(monkeypatch, number):
    """Ends a run before a batch, as a signal would that nobody awaits."""
    step = Loop._batch

    def stop(loop, state, at, batch):
        if at.batches == number:
            raise KeyboardInterrupt
        return step(loop, state, at, batch)

    monkeypatch.setattr(Loop, "_batch", stop)


@pytest.mark.slow
def test_a_run_resumes_in_a_window_and_after_a_broken_line_to_the_last_bit(
    files, tmp_path, monkeypatch
):
    model, data = files
    copy = tmp_path / "chats.jsonl"
    copy.write_bytes(data.read_bytes())
    settings = settings_of((model, copy), tmp_path / "run")
    whole = finetune(replace(settings, output=str(tmp_path / "whole")))
    assert whole["examples"]["train"]["used"] == 32
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings)
    lines = data.read_text().splitlines()
    copy.write_text("\n".join([*lines[:39], "{"]) + "\n")
    with pytest.raises(InputError, match=r"chats\.jsonl` line 40 must be a JSON obj"):
        finetune(replace(settings, resume=True))
    # The last update before the line was saved.
    steps = {int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")}
    assert max(steps) >= 3
    copy.write_bytes(data.read_bytes())
    metrics = finetune(replace(settings, resume=True))
    assert metrics["eval"] == whole["eval"]
    assert metrics["examples"] == whole["examples"]
    adapters = [tmp_path / run / "adapter.safetensors" for run in ("whole", "run")]
    first, second = (path.read_bytes() for path in adapters)
    assert first == second
    # Evaluated on the records that were held out.
    assert evaluate_adapter(tmp_path / "run") == metrics["eval"]
    copy.write_text("\n".join(change_first([*lines[1:], lines[0]])) + "\n")
    with pytest.raises(InputError, match="`data` must be what it was in the run"):
        finetune(replace(settings, resume=True))


REFUSED = {
    "no number of updates": ({"max_steps": None}, "`max_steps` must be given with `st"),
    "epochs": ({"epochs": 2}, "`epochs` must be left out with `streaming`, got 2"),
    "lengths": (
        {"group_by_length": True, "packing": False},
        "`group_by_length` must be left out with `streaming`",
    ),
    "a fraction": ({"held_out": 0.1}, "`held_out` must be a number of examples with"),
    "classes": (
        {"task": "sst2", "packing": False},
        "`streaming` must be left out with task 'sst2'",
    ),
    "a mixture": (
        {"data": "a.jsonl=1,b.jsonl=2"},
        r"`data` must be a `\.jsonl` file with `streaming`, got `a\.jsonl, b\.jsonl`",
    ),
    "rows": ({"data": [{"text": "say"}]}, "got the rows that were passed"),
    "no stream": ({"streaming": False}, "`buffer_size` must come with `streaming`"),
    "no records": ({"buffer_size": 0}, "`buffer_size` must be positive, got 0"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_stream_cannot_do_is_refused(changes, message):
    settings = settings_of(("m", "d"), "o")
    with pytest.raises(InputError, match=message):
        replace(settings, **changes)


@pytest.mark.parametrize("name", ["chats.json", "absent.jsonl"])
def test_another_file_is_refused(files, tmp_path, name):
    (tmp_path / "chats.json").write_text("[]")
    settings = settings_of((files[0], tmp_path / name), tmp_path / "run")
    with pytest.raises(InputError, match="`data` must be a `.jsonl` file with `stre"):
        finetune(settings)


def test_one_batch_is_read_ahead_and_what_is_wrong_is_raised_in_its_turn():
    read = []

    def batches():
        for number in range(2):
            read.append(number)
            yield number
        raise InputError("broken")

    ahead = Ahead(batches())
    assert read == []
    ahead.read()
    ahead.read()
    assert read == [0]
    assert ahead.take() == 0 and read == [0]
    assert ahead.take() == 1
    ahead.read()
    with pytest.raises(InputError, match="broken"):
        ahead.take()
    assert ahead.take() is None

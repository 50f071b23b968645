"""Predictions as JSON lines, and evaluation on the data of the run or on a file."""

import json

import numpy as np
import pytest
from tiny_run import WORDS, tiny_settings, write_model

from sparse_jax import InputError, evaluate_adapter, finetune, predict
from sparse_jax.data.files import load, load_one
from sparse_jax.data.glue import find_task
from sparse_jax.data.json_lines import JsonLines
from sparse_jax.training import predict as predicting

LABELS = {
    "classification": lambda words: "yes" if words & {"good", "great"} else "no",
    "numbers": lambda words: int("good" in words),
    "multilabel": lambda words: sorted(words & {"good", "bad"}),
    "flags": lambda words: [int("good" in words), int("bad" in words)],
    "regression": lambda words: len(words & {*WORDS[:4]}) / 2,
}


def rows_of(label, count, seed, pair=False):
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, 4)) for _ in range(count)]
    more = {"text_b": "a film"} if pair else {}
    return [
        {"id": f"n{i}", "text": text, **more, "label": label({*text.split()})}
        for i, text in enumerate(texts)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a folder with a run for every kind of label."""
    folder = tmp_path_factory.mktemp("place")
    model = write_model(folder / "model")
    for name, label in LABELS.items():
        data, is_pair = folder / f"{name} data", name == "classification"
        data.mkdir()
        write_rows(data / "train.jsonl", rows_of(label, 16, 0, is_pair))
        write_rows(data / "dev.jsonl", rows_of(label, 11, 1, is_pair))
        more = write_rows(folder / f"{name}.jsonl", rows_of(label, 7, 2, is_pair))
        options = {"task": "classification", "method": "head", "max_steps": 2}
        options |= {"eval_data": (f"more={more}",), "batch_size": 4}
        finetune(tiny_settings(model, data, folder / name, **options))
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", LABELS)
def test_predictions_are_those_that_are_evaluated(name, place, tmp_path):
    metrics = evaluate_adapter(place / name)
    assert metrics == json.loads((place / name / "metrics.json").read_text())["eval"]
    alone = evaluate_adapter(place / name, data=str(place / f"{name}.jsonl"))
    assert alone == {k: metrics[f"{k}_more"] for k in alone}
    assert predict(place / name, output=tmp_path / "out.jsonl") == 11
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == [f"n{i}" for i in range(11)]
    right = np.mean([line["prediction"] == line["label"] for line in lines])
    if name == "regression":
        errors = [line["prediction"] - line["label"] for line in lines]
        assert metrics["rmse"] == pytest.approx(np.std(errors, mean=0.0), rel=1e-5)
        assert "scores" not in lines[0]
    elif name in ("multilabel", "flags"):
        assert metrics["subset_accuracy"] == pytest.approx(right)
        chosen = [label for label, p in lines[0]["scores"].items() if p > 0.5]
        assert lines[0]["prediction"] == chosen
    else:
        assert metrics["accuracy"] == pytest.approx(right)
        assert sum(lines[0]["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert (
            max(lines[0]["scores"], key=lines[0]["scores"].get)
            == (lines[0]["prediction"])
        )


def test_of_a_single_file_the_rows_that_were_held_out_are_predicted(place, tmp_path):
    content = (place / "classification data" / "train.jsonl").read_text()
    data = tmp_path / "train.jsonl"
    data.write_text(content)
    options = {"task": "classification", "method": "head", "max_steps": 1}
    run = tmp_path / "run"
    metrics = finetune(tiny_settings(place / "model", data, run, held_out=5, **options))
    assert predict(run, output=tmp_path / "out.jsonl") == 5
    lines = lines_of(tmp_path / "out.jsonl")
    names = {row["id"]: row["label"] for row in lines_of(data)}
    assert all(names[line["id"]] == line["label"] for line in lines)
    right = np.mean([line["prediction"] == line["label"] for line in lines])
    assert metrics["eval"]["accuracy"] == pytest.approx(right)
    assert predict(run, data=str(data), output=tmp_path / "all.jsonl") == 16
    # Of a file that has changed nothing says which rows were trained on.
    data.write_text(content + content.splitlines()[0] + "\n")
    assert predict(run, output=tmp_path / "changed.jsonl") == 17


def test_what_a_mixture_held_out_depends_on_the_seed_of_the_run(tmp_path):
    for name in "ab":
        texts = [{"text": f"{name}{i}", "label": str(i % 2)} for i in range(20)]
        write_rows(tmp_path / f"{name}.jsonl", texts)
    data = {str(tmp_path / "a.jsonl"): 0.7, str(tmp_path / "b.jsonl"): 0.3}
    task, share = find_task("classification"), {"held_out": 6, "seed": 3}
    found = load_one(task, data, ("0", "1"), **share)
    held_out = load(task, data, **share)["validation"]
    assert found.examples.text_a == held_out.text_a


def test_texts_without_labels_and_ids_are_predicted(place, tmp_path, capsys):
    rows = rows_of(lambda words: None, 5, 3, pair=True)
    bare = [{"text": row["text"], "text_b": row["text_b"]} for row in rows]
    data = write_rows(tmp_path / "new.jsonl", bare)
    assert predict(place / "classification", data=str(data)) == 5
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0].keys() == {"id", "prediction", "scores"}


def test_an_interrupted_prediction_goes_on(place, tmp_path, monkeypatch):
    run, output = place / "multilabel", tmp_path / "out.jsonl"
    predict(run, output=tmp_path / "whole.jsonl")
    add, part = JsonLines.add, tmp_path / "out.jsonl.part"

    def stop(lines, more):
        add(lines, more)
        if "n4" in part.read_text():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            predict(run, output=output)
    assert not output.exists()
    # The header and eight lines; then the last of them is torn.
    content = part.read_bytes()
    assert content.count(b"\n") == 9
    part.write_bytes(content[:-5])
    with pytest.raises(InputError, match="begun with another adapter: `.*part` has l"):
        predict(place / "classification", output=output)
    with pytest.raises(InputError, match="begun with another data"):
        predict(run, output=output, split="train")
    assert predict(run, output=output) == 4
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()
    with pytest.raises(InputError, match="must be a new file, got .* `overwrite=True`"):
        predict(run, output=output)
    assert predict(run, output=output, overwrite=True) == 11


def test_a_part_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "out.jsonl.part").write_text("mine\n")
    with pytest.raises(InputError, match="must not have begun with another adapter"):
        JsonLines(tmp_path / "out.jsonl", {"adapter": "1"}, False)
    assert (tmp_path / "out.jsonl.part").read_text() == "mine\n"


def test_a_command_that_is_refused_before_its_first_line_leaves_nothing(tmp_path):
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with pytest.raises(InputError), JsonLines(output, {"options": "1"}, False):
        assert part.exists()
        raise InputError("`max_new_tokens` must be less than the 32 positions.")
    assert not [*tmp_path.iterdir()]
    # Nor does one that is killed bind the next one to its options.
    JsonLines(output, {"options": "1"}, False)
    with JsonLines(output, {"options": "2"}, False) as lines:
        assert lines.done == 0
        lines.add([{"id": 0}])
    assert output.read_text() == '{"id": 0}\n'


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_lines_are_not_written_to_what_is_no_file(name):
    with pytest.raises(InputError, match=f"must be a new file, got '{name}', which ex"):
        JsonLines(name, {}, True)


def test_an_output_that_is_not_finite_is_no_number():
    outputs = np.array([[np.nan, 1.0], [0.0, 1.0]])
    task = predicting.find_task("sst2")
    found = [*predicting._predictions(task, outputs)]
    assert found[0] == {"prediction": None}
    assert found[1]["prediction"] == "positive"


def test_a_file_with_other_labels_is_refused(place, tmp_path):
    rows = [{"text": "good", "text_b": "film", "label": "maybe"}]
    path = write_rows(tmp_path / "other.jsonl", rows)
    message = "must have one of the labels no, yes, got 'maybe'"
    with pytest.raises(InputError, match=message):
        evaluate_adapter(place / "classification", data=str(path))
    options = {"task": "classification", "eval_data": (str(path),)}
    data = place / "classification data"
    with pytest.raises(InputError, match=f"`{path}` line 1 {message}"):
        finetune(tiny_settings(place / "model", data, tmp_path / "run", **options))


def test_data_of_a_run_that_are_gone_are_asked_for(place, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    adapter = (place / "classification" / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(adapter)
    config = json.loads((place / "classification" / "config.json").read_text())
    config["settings"]["data"] = "owner/name"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="`data` must be given, as that of the run, 'o"
    ):
        evaluate_adapter(folder)

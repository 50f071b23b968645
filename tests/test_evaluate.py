"""What an adapter is evaluated on: the right base, and the examples that it says."""

import json
import logging
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
from tiny_text import text_settings, write_chats, write_decoder

from sparse_jax import (
    InputError,
    evaluate_adapter,
    finetune,
    load_adapter,
    save_adapter,
)
from sparse_jax.generation.writer import load_writer
from sparse_jax.training import setup as material


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a folder with a decoder, 40 chats in all, and two runs on them."""
    folder = tmp_path_factory.mktemp("place")
    model, chats = write_decoder(folder / "model"), write_chats(folder / "chats.jsonl")
    lines = chats.read_text().splitlines(keepends=True)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(lines[:30]))
    (folder / "data" / "validation.jsonl").write_text("".join(lines[30:]))
    (folder / "other.jsonl").write_text("".join(lines[8:28]))
    for name, data in (("file", chats), ("folder", folder / "data")):
        finetune(text_settings(model, data, folder / name, max_steps=1))
    return folder


@pytest.fixture
def told(caplog, monkeypatch):
    """Returns the lines that are logged."""
    # A command that ran before may have sent them to standard error alone.
    monkeypatch.setattr(logging.getLogger("sparse_jax"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def loss_on(place, run, data):
    return evaluate_adapter(place / run, data=str(place / data))["loss"]


@pytest.mark.slow
def test_a_file_that_was_not_trained_on_is_used_whole(place, told):
    found = loss_on(place, "folder", "other.jsonl")
    assert f"evaluating on 20 examples of `{place}/other.jsonl`: all of them" in told()
    # As the file for validation of a folder, where nothing is held out.
    folder = place / "as validation"
    folder.mkdir()
    shutil.copy(place / "chats.jsonl", folder / "train.jsonl")
    shutil.copy(place / "other.jsonl", folder / "validation.jsonl")
    assert loss_on(place, "folder", folder.name) == found
    # A mean over the tokens of twenty chats is none of the last one's.
    lines = (place / "other.jsonl").read_text().splitlines()
    (place / "one.jsonl").write_text(lines[0] + "\n")
    assert loss_on(place, "folder", "one.jsonl") != found


def test_truncated_examples_are_told(place, told):
    evaluate_adapter(place / "file", data=str(place / "other.jsonl"), max_length=6)
    # Twelve chats have six words, and one token more to end them.
    assert "validation: 20 examples used (12 truncated to 6 tokens)" in told()


def test_other_files_are_evaluated_on_and_nothing_is_held_out(place, told):
    run, chats = place / "more", place / "chats.jsonl"
    dev = f"dev={place / 'other.jsonl'}"
    options = {"max_steps": 1, "held_out": None, "eval_data": (dev,)}
    metrics = finetune(text_settings(place / "model", chats, run, **options))
    used = {name: use["used"] for name, use in metrics["examples"].items()}
    assert used == {"train": 40, "dev": 20}
    assert evaluate_adapter(run) == metrics["eval"]
    evaluate_adapter(run, data=str(chats))
    assert any(line.endswith("which the adapter was trained on") for line in told())
    # The folder has the settings, and the run is complete.
    metrics = json.loads((run / "metrics.json").read_text())
    assert finetune(output=run, resume=True) == metrics


# run, data -> examples, and which they are
USES = {
    ("file", "chats.jsonl"): (8, "those held out of the training"),
    ("file", "renamed.jsonl"): (8, "those held out of the training"),
    ("file", "alone"): (8, "those held out of the training"),
    ("file", "data/validation.jsonl"): (10, "all of them"),
    ("folder", "data"): (10, "all of them"),
    ("folder", "data/validation.jsonl"): (10, "all of them"),
    ("folder", "data/train.jsonl"): (
        30, "all of them, which the adapter was trained on",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("run", "data"), USES)
def test_the_part_of_a_file_that_is_used_is_logged(place, told, run, data):
    shutil.copy(place / "chats.jsonl", place / "renamed.jsonl")
    (place / "alone").mkdir(exist_ok=True)
    shutil.copy(place / "chats.jsonl", place / "alone" / "any.jsonl")
    found = loss_on(place, run, data)
    count, which = USES[run, data]
    (line,) = [line for line in told() if line.startswith("evaluating on")]
    assert line.startswith(f"evaluating on {count} examples of `{place}/{data}")
    assert line.endswith(f": {which}")
    if "held" in which or data == "data" or "data/val" in data and run == "folder":
        metrics = json.loads((place / run / "metrics.json").read_text())
        assert found == metrics["eval"]["loss"]


def edited(place, folder, name="config.json", **changes):
    """Returns a copy of the model with some fields of a file changed."""
    shutil.copytree(place / "model", folder)
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
OTHER = {
    "rope_theta": {"rope_parameters": ROPE},
    "rope_scaling": {"rope_parameters": LLAMA3},
    "norm_eps": {"rms_norm_eps": 1e-2},
    "hidden_act": {"hidden_act": "gelu"},
    "head_size": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    "max_positions": {"max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", OTHER)
def test_the_same_weights_under_another_configuration_are_refused(
    place, tmp_path, monkeypatch, name
):
    model = edited(place, tmp_path / "model", **OTHER[name])
    message = rf"`model` must be the base of the adapter, which has `{name}`=.* got "
    monkeypatch.setattr(material, "load_tokenizer", None)  # not before it is refused
    with pytest.raises(InputError, match=message):
        evaluate_adapter(place / "file", model=str(model), data=str(place / "data"))
    with pytest.raises(InputError, match=message):
        load_writer(model, place / "file")


def test_a_run_is_not_resumed_under_another_configuration(place, tmp_path):
    shutil.copytree(place / "file", tmp_path / "run")
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["settings"]["model"] = str(tmp_path / "model")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    settings = text_settings(
        tmp_path / "model", place / "chats.jsonl", tmp_path / "run", max_steps=1,
        resume=True,
    )  # fmt: skip
    finetune(settings)
    path = tmp_path / "model" / "config.json"
    before = json.loads(path.read_text())
    for name, changes in {
        **OTHER,
        "attention_dropout": {"attention_dropout": 0.5},
    }.items():
        path.write_text(json.dumps({**before, **changes}))
        with pytest.raises(InputError, match=f"run to resume, with `{name}`="):
            finetune(settings)


def test_what_a_configuration_only_says_is_no_other_base(place, tmp_path):
    changes = {
        "transformers_version": "4.0.0", "torch_dtype": "bfloat16", "bos_token_id": 3,
        "id2label": {"0": "x", "1": "y"}, "attention_dropout": 0.5,
        "rope_theta": 10000.0, "initializer_range": 0.5, "architectures": None,
    }  # fmt: skip
    model = edited(place, tmp_path / "model", **changes)
    fields = json.loads((model / "config.json").read_text())
    for name in ("dtype", "rope_parameters"):
        fields.pop(name)
    text = json.dumps(dict(reversed(fields.items())))
    (model / "config.json").write_text(text)
    data = str(place / "chats.jsonl")
    found = evaluate_adapter(place / "file", model=str(model), data=data)
    assert found == json.loads((place / "file" / "metrics.json").read_text())["eval"]


def test_another_tokenizer_is_warned_of(place, tmp_path, told):
    model, data = tmp_path / "model", str(place / "chats.jsonl")
    shutil.copytree(place / "model", model)
    evaluate_adapter(place / "file", model=str(model), data=data)
    assert not any("tokenizer" in line for line in told())
    path = model / "tokenizer.json"
    text = path.read_text().replace('"red": 1', '"red": 2', 1)
    path.write_text(text.replace('"blue": 2', '"blue": 1', 1))
    evaluate_adapter(place / "file", model=str(model), data=data)
    assert any("the tokenizer of the model is not the one" in line for line in told())


@pytest.fixture(scope="module")
def chatted(tmp_path_factory):
    """Returns a folder with a decoder that has a chat template, and a run on chats."""
    folder = tmp_path_factory.mktemp("chatted")
    write_decoder(folder / "model")
    _edit_tokenizer(
        folder / "model",
        chat_template="{% for m in messages %}{{ 'say ' if m.role == 'user' else '' }}"
        "{{ m.content }}{{ ' : ' if m.role == 'user' else ' </s> ' }}{% endfor %}",
    )
    turn = lambda role: {"role": role, "content": "red"}
    line = json.dumps({"messages": [turn("user"), turn("assistant")]}) + "\n"
    (folder / "chats.jsonl").write_text(20 * line)
    finetune(
        text_settings(
            folder / "model", folder / "chats.jsonl", folder / "run", max_steps=1
        )
    )
    return folder


def _edit_tokenizer(model, **changes):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_chat_template_is_warned_of(chatted, tmp_path, told):
    model, run = tmp_path / "model", chatted / "run"
    data = str(chatted / "chats.jsonl")
    shutil.copytree(chatted / "model", model)
    found = evaluate_adapter(run, model=str(model), data=data)
    load_writer(model, run)
    assert not any("chat template" in line for line in told())
    _edit_tokenizer(
        model,
        chat_template="{% for m in messages %}{{ m.content }} "
        "{{ ': ' if m.role == 'user' else '</s> ' }}{% endfor %}",
    )
    assert found != evaluate_adapter(run, model=str(model), data=data)
    load_writer(model, run)
    lines = [line for line in told() if "the chat template of the model is not" in line]
    assert len(lines) == 2


def test_another_end_of_texts_is_warned_of(place, tmp_path, told):
    model, data = tmp_path / "model", str(place / "chats.jsonl")
    shutil.copytree(place / "model", model)
    _edit_tokenizer(model, eos_token="<s>")
    evaluate_adapter(place / "file", model=str(model), data=data)
    assert any(
        line.startswith("the texts end in the token 8, and those that the adapter was "
                        "trained on in 9") for line in told()
    )  # fmt: skip


def test_the_base_that_a_file_names_is_told_and_never_fetched(
    place, tmp_path, told, monkeypatch
):
    asked = []

    def snapshot(name, *, local_files_only=False, **options):
        asked.append((name, local_files_only))
        if name != "owner/known":
            raise OSError("not in the cache")
        return str(place / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    adapter, data = load_adapter(place / "file"), str(place / "chats.jsonl")
    path = tmp_path / "adapter.safetensors"
    for name in ("owner/strange", "/no/such/folder", "x" * 5000, "a\0b", ""):
        save_adapter(path, replace(adapter, base_model=name))
        for load in (lambda: evaluate_adapter(path, data=data),
                     lambda: load_writer(None, path)):  # fmt: skip
            with pytest.raises(InputError, match="`model` must be given"):
                load()
    assert "the adapter names the base model `owner/strange`" in told()
    save_adapter(path, replace(adapter, base_model="owner/known"))
    metrics = json.loads((place / "file" / "metrics.json").read_text())
    assert evaluate_adapter(path, data=data) == metrics["eval"]
    assert {name for name, _ in asked} >= {"owner/strange", "owner/known"}
    assert all(is_local for _, is_local in asked)

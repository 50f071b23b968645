"""Runs of the task causal, from settings to the run directory."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tiny_run import write_model
from tiny_text import WORDS, text_settings, write_chats, write_decoder

from sparse_jax import Settings, evaluate_adapter, export, finetune, predict
from sparse_jax.errors import InputError
from sparse_jax.generation.writer import load_writer
from sparse_jax.training.build import make_job
from sparse_jax.training.loop import Loop
from sparse_jax.training.run_files import updates_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_decoder(folder / "model"), write_chats(folder / "chats.jsonl")


def rows_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


CASES = {
    "lora": {},
    "lora, packed": {"packing": True},
    "lora, everything": {"loss_on": "all"},
    "sift": {"method": "sift", "density": 0.1},
    "full": {"method": "full", "learning_rate": 1e-2},
    "lora, ist": {"sampler": "ist", "probe_every": 2, "active": 0.5},
    "sift, ist": {
        "method": "sift", "density": 0.1, "sampler": "ist", "active": 0.5,
        "packing": True, "accumulate": 2, "recompute": "frozen",
    },
}  # fmt: skip


SECOND = {"lora", "full", "lora, ist", "lora, everything"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SECOND else [])
        for name in CASES
    ],
)
@pytest.mark.quick(1)
def test_a_run_learns_and_is_evaluated_again_to_the_last_bit(name, files, tmp_path):
    settings = text_settings(*files, tmp_path / "run", rank=8, epochs=4)
    metrics = finetune(replace(settings, **CASES[name]))
    losses = [row["loss"] for row in updates_of(rows_of(tmp_path / "run"))]
    assert np.mean(losses[-2:]) < 0.8 * losses[0]
    assert set(metrics["eval"]) == {"loss", "perplexity"}
    assert metrics["eval"]["perplexity"] == math.exp(metrics["eval"]["loss"])
    assert metrics["trained_parameters"] == metrics["trained_parameters_without_head"]
    again = evaluate_adapter(tmp_path / "run", data=str(files[1]))
    assert again == metrics["eval"]


@pytest.mark.parametrize("name", ["lora, packed"])
def test_a_resumed_run_is_the_same_to_the_last_bit(name, files, tmp_path, monkeypatch):
    changes = {"save_every": 2, "epochs": 2, **CASES[name]}
    whole = finetune(text_settings(*files, tmp_path / "whole", **changes))
    broken = text_settings(*files, tmp_path / "broken", **changes)
    step = Loop._batch

    def stop(loop, state, at, batch):
        if at.batches == 3:
            raise KeyboardInterrupt
        return step(loop, state, at, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(broken)
    metrics = finetune(replace(broken, resume=True))
    assert metrics["eval"] == whole["eval"]
    a, b = (tmp_path / run / "adapter.safetensors" for run in ("whole", "broken"))
    assert a.read_bytes() == b.read_bytes()


def test_another_file_is_evaluated_as_a_whole(files, tmp_path):
    model, data = files
    finetune(text_settings(model, data, tmp_path / "run", max_steps=1))
    lines = data.read_text().splitlines()[:10]
    parts = []
    for name, kept in (("all", lines), ("a", lines[:5]), ("b", lines[5:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
        found = evaluate_adapter(tmp_path / "run", data=str(tmp_path / f"{name}.jsonl"))
        parts.append(found["loss"])
    whole, first, second = parts
    # Means over tokens: between those of the halves.
    assert min(first, second) <= whole <= max(first, second)
    assert first != second


def test_a_folder_has_a_file_for_training_and_one_for_validation(files, tmp_path):
    model, data = files
    lines = data.read_text().splitlines()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(lines[:30]) + "\n")
    (folder / "validation.jsonl").write_text("\n".join(lines[30:]) + "\n")
    metrics = finetune(text_settings(model, folder, tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["examples"] == {"train": 30, "validation": 10}
    again = evaluate_adapter(tmp_path / "run", data=str(folder))
    assert again == metrics["eval"]


def test_plain_text_is_learnt_from_its_beginning(files, tmp_path):
    model, _ = files
    text = tmp_path / "text.txt"
    text.write_text("say red once : red " * 60)
    settings = text_settings(model, text, tmp_path / "run", loss_on="all", epochs=8)
    assert finetune(settings)["eval"]["perplexity"] < 4


BAD = {
    "a task with labels": (
        {"task": "sst2", "packing": True},
        "`packing` must be left out with task 'sst2'",
    ),
    "loss": ({"loss_on": "prompt"}, "`loss_on` must be one of response, all"),
    "template": (
        {"template": "mine"},
        "`template` must be one of alpaca, llm_adapters",
    ),
    "held out": ({"held_out": 1.5}, r"`held_out` must be a fraction .* got 1.5"),
    "head": ({"method": "head"}, "`method` must not be 'head' with task"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_settings_are_refused(name):
    changes, message = BAD[name]
    with pytest.raises(InputError, match=message):
        text_settings("m", "d", "o", **changes)


def test_a_model_of_the_wrong_kind_is_refused(files, tmp_path):
    _, data = files
    encoder = write_model(tmp_path / "encoder")
    with pytest.raises(InputError, match="must be a decoder for the task causal, one"):
        finetune(text_settings(encoder, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_decoder_learns_labels_and_transformers_predicts_the_same(files, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    words = ["say {} twice :", "once {}", "twice : {} once say"]
    rows = [(text.format(color), color) for color in WORDS[1:3] for text in words] * 5
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = tmp_path / "run"
    settings = text_settings(files[0], data, run, task="classification", epochs=8)
    assert finetune(settings)["eval"]["accuracy"] == 1.0
    with pytest.raises(InputError, match="must be one of a causal language model"):
        load_writer(None, run)
    predict(run, data=data, output=tmp_path / "said.jsonl")
    text = (tmp_path / "said.jsonl").read_text()
    said = [json.loads(line) for line in text.splitlines()]
    export(run, to="merged", output=tmp_path / "merged")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    # The base names no token that pads, so that the end of a text does.
    pad = WORDS.index("</s>")
    assert theirs.config.pad_token_id == pad
    for (text, label), line in zip(rows[:6], said, strict=False):
        ids = [WORDS.index(word) for word in text.split()]
        batch = torch.tensor([ids + [pad] * (6 - len(ids))] * 2)
        with torch.no_grad():
            scores = theirs(batch, attention_mask=(batch != pad).long()).logits[0]
        scores = scores.softmax(-1).tolist()
        assert line["prediction"] == line["label"] == label
        assert [*line["scores"].values()] == pytest.approx(scores, abs=1e-5)


def test_data_have_to_be_given_and_have_to_fit(files, tmp_path):
    model, data = files
    run = tmp_path / "run"
    with pytest.raises(InputError, match="`data` must be given for the task causal"):
        finetune(replace(text_settings(model, "", run), data=None))
    with pytest.raises(InputError, match=r"`max_length` must be in \[2, 32\]"):
        finetune(text_settings(model, data, run, max_length=33))
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "say", "completion": "red"}\n{"prompt": \n')
    with pytest.raises(InputError, match=r"wrong\.jsonl.*line 2"):
        finetune(text_settings(model, wrong, run))
    assert not run.exists()


GENUINE = {
    "lora --ist": {"method": "lora", "learning_rate": 2e-3},
    "sift --ist": {"method": "sift", "density": 0.05, "learning_rate": 1e-3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GENUINE)
def test_a_genuine_llama_learns_from_genuine_instructions(name, shared_data, tmp_path):
    settings = Settings(
        model=str(shared_data / "models" / "babyllama-1m"),
        data=str(shared_data / "instruct" / "alpaca_en_demo.json"),
        task="causal",
        output=str(tmp_path / "run"),
        sampler="ist",
        active=0.5,
        batch_size=4,
        max_length=192,
        max_steps=30,
        held_out=0.02,
        **GENUINE[name],
    )
    metrics = finetune(settings)
    losses = [row["loss"] for row in updates_of(rows_of(tmp_path / "run"))]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert evaluate_adapter(tmp_path / "run", data=settings.data) == metrics["eval"]


@pytest.mark.parametrize("method", ["lora", "sift"])
@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("q_proj", "'q_proj' is `attention/query`"),
        ("self_attn.(k|v)_proj", "is `attention/key` and `attention/value`"),
        ("model.layers.3.mlp.down_proj.weight", "is `mlp/down`"),
        ("gate_proj$", "'gate_proj$' is `mlp/gate`"),
        ("nothing", "The nearest names are `"),
        ("(", "must be a regular expression"),
    ],
)
def test_a_rule_in_names_of_hugging_face_is_answered_with_ours(
    method, where, named, files, tmp_path
):
    settings = text_settings(*files, tmp_path / "run", method=method, where=(where,))
    with pytest.raises(InputError) as caught:
        make_job(settings)
    told = str(caught.value)
    assert named in told
    assert (" here." in told) == ("is `" in named)

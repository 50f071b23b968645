"""A checkpoint's own head under the labels of a task."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_models import (
    hugging_face_config,
    hugging_face_model,
    jax_batch,
    padded_batch,
    tiny_config,
    torch_output,
)
from tiny_run import WORDS, tiny_settings, write_model

from sparse_jax import (
    apply_adapter,
    evaluate_adapter,
    finetune,
    from_pretrained,
    load_adapter,
    save_adapter,
    save_pretrained,
)
from sparse_jax.adapter.adapter import Adapter
from sparse_jax.errors import InputError
from sparse_jax.models.hf.labels import order_of, use_of_head
from sparse_jax.models.hf.pretrained import base_hash, new_leaves
from sparse_jax.sharding.mesh import make_mesh, parse_mesh
from sparse_jax.sharding.placement import Placement
from sparse_jax.training.setup import load_model_and_data

MNLI = ("entailment", "neutral", "contradiction")


@pytest.fixture(params=["bert", "roberta"])
def three_way(request, tmp_path):
    """A classifier of PyTorch in the order of roberta-large-mnli."""
    from transformers import AutoModelForSequenceClassification

    names = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    config = hugging_face_config(request.param, id2label=dict(enumerate(names)))
    model = hugging_face_model(AutoModelForSequenceClassification, config)
    model.save_pretrained(tmp_path)
    batch = padded_batch(request.param)
    if request.param == "roberta":
        batch["token_type_ids"][:] = 0
    return tmp_path, torch_output(model, batch).logits.numpy(), jax_batch(batch)


def test_outputs_follow_the_names_of_the_labels(three_way):
    folder, theirs, batch = three_way
    model, params = from_pretrained(folder, labels=MNLI)
    np.testing.assert_allclose(model(params, batch), theirs[:, [2, 1, 0]], atol=1e-5)
    assert model.config.label_names == MNLI
    assert new_leaves(model, folder, MNLI) == ()
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    place = lambda shapes: Placement.of(shapes, mesh).params
    _, placed = from_pretrained(folder, labels=MNLI, place=place)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    save_pretrained(model, params, folder / "out")
    saved = json.loads((folder / "out" / "config.json").read_text())
    assert saved["id2label"] == {str(i): name for i, name in enumerate(MNLI)}
    again, params = from_pretrained(folder / "out")
    np.testing.assert_allclose(again(params, batch), theirs[:, [2, 1, 0]], atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            ("entailment", "not_entailment"),
            "is for CONTRADICTION, NEUTRAL, ENTAILMENT: ",
        ),
        (("a", "b", "c"), "a new one is trained for a, b, c"),
        ((), "a new one is trained for one number"),
    ],
)
def test_a_head_for_other_labels_is_a_new_one(three_way, caplog, labels, words):
    folder, theirs, batch = three_way
    key = jax.random.key(1)
    model, params = from_pretrained(folder, labels=labels, key=key)
    assert words in caplog.text
    size = len(labels) or 1
    assert model(params, batch).shape == (len(theirs), size)
    assert model.config.label_names == (labels or None)
    new = new_leaves(model, folder, labels)
    assert len(new) == 2
    # Only the last map: what is below it is of use for any labels.
    assert {name.rpartition("/")[0] for name in new} <= {
        "classifier", "classifier/out_proj"
    }  # fmt: skip
    with pytest.raises(InputError, match="`key` must be given"):
        from_pretrained(folder, labels=labels)


@pytest.mark.parametrize(
    ("names", "labels", "order"),
    [
        (None, ("negative", "positive"), (0, 1)),
        (("0", "1"), ("negative", "positive"), (0, 1)),
        (("positive", "negative"), ("0", "1"), (0, 1)),
    ],
)
def test_outputs_without_names_are_taken_in_their_order(names, labels, order):
    config = tiny_config("bert", num_labels=2, label_names=names)
    use = use_of_head(config, labels)
    assert use.order == order
    assert not use.is_certain
    assert "are taken as" in use.remark


def test_outputs_that_are_named_by_numbers_follow_them():
    config = tiny_config("bert", num_labels=2, label_names=("1", "0"))
    assert use_of_head(config, ("0", "1")).order == (1, 0)


@pytest.mark.parametrize(
    ("labels", "names", "order"),
    [
        (("negative", "positive"), ("POSITIVE", "NEGATIVE"), (1, 0)),
        (("negative", "positive"), ("Pos", " neg "), (1, 0)),
        (("entailment", "not_entailment"), ("Non-Entailment", "entailed"), (1, 0)),
        (("unacceptable", "acceptable"), ("acceptable", "not acceptable"), (1, 0)),
        (("not_equivalent", "equivalent"), ("paraphrase", "not_paraphrase"), (1, 0)),
        (("not_duplicate", "duplicate"), ("duplicate", "not_duplicate"), (1, 0)),
        (MNLI, ("contradiction", "entailment", "neutral"), (1, 2, 0)),
        (("a", "A"), ("A", "a"), (1, 0)),
        (("0", "1"), ("1", "0"), (1, 0)),
        (("a", "A"), ("b", "a"), None),
        (("a", "A"), ("A ", "A"), None),
        (("negative", "positive"), ("NEGATIVE", "neutral", "POSITIVE"), None),
        (MNLI, ("LABEL_0", "LABEL_1", "LABEL_2"), None),
    ],
)
def test_names_are_compared_as_people_read_them(labels, names, order):
    assert order_of(labels, names) == order


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model that PyTorch trained to tell good films from bad ones.

    Its first output is for `positive`, that of GLUE for `negative`.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_model(tmp_path_factory.mktemp("trained"))
    names = {0: "positive", 1: "negative"}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, id2label=names)
    rows = sentences(64, seed=0)
    tokens = AutoTokenizer.from_pretrained(folder)(
        [row["sentence"] for row in rows], return_tensors="pt"
    )
    labels = torch.tensor([1 - row["label"] for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(**tokens, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    logits = torch_output(model, {n: x.numpy() for n, x in tokens.items()}).logits
    assert (logits.argmax(-1) == labels).float().mean() == 1
    return folder, {n: x.numpy() for n, x in tokens.items()}, logits.numpy()


def sentences(count, seed):
    """Returns sentences that are positive, 1, exactly if they have a good word."""
    random = np.random.default_rng(seed)
    return [
        {
            "sentence": " ".join(
                [
                    random.choice(WORDS[3 * (1 - label) :][:3]),
                    *random.choice(WORDS[6:], 4),
                ]
            ),
            "label": int(label),
        }
        for label in random.integers(0, 2, count)
    ]


def write_rows(folder, key, name):
    """Writes sentences for evaluation, and a few for training."""
    folder.mkdir()
    for split, count in (("train", 8), ("dev", 40)):
        rows = [
            {key: row["sentence"], "label": name(row["label"])}
            for row in sentences(count, seed=len(split))
        ]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    ("task", "key", "name", "method"),
    [
        ("sst2", "sentence", lambda label: label, "sift"),
        ("classification", "text", lambda label: ("Neg", "Pos")[label], "lora"),
    ],
)
@pytest.mark.quick(1)
def test_a_trained_head_is_right_from_the_first_update(
    trained, tmp_path, task, key, name, method
):
    folder, tokens, theirs = trained
    settings = tiny_settings(
        folder,
        write_rows(tmp_path / "data", key, name),
        tmp_path / "run",
        task=task,
        method=method,
        learning_rate=1e-9,
    )
    metrics = finetune(settings)["eval"]
    assert metrics["accuracy"] == 1.0
    assert evaluate_adapter(settings.output, data=settings.data) == metrics
    adapter = load_adapter(settings.output)
    assert [label[:3].lower() for label in adapter.labels] == ["pos", "neg"]
    # Whoever puts the adapter on the folder gets logits in the order of its labels.
    model, params = from_pretrained(folder)
    params, attachment = apply_adapter(params, adapter, base_hash=base_hash(folder))
    logits = model(params, jax_batch(tokens), attachment=attachment)
    np.testing.assert_allclose(logits, theirs, atol=1e-4)


def test_a_head_for_labels_of_another_kind_is_warned_of(trained, tmp_path, caplog):
    data = write_rows(tmp_path / "data", "text", lambda label: ("Neg", "Pos")[label])
    model = tmp_path / "model"
    shutil.copytree(trained[0], model)
    config = json.loads((model / "config.json").read_text())
    for kind in ("single", "multi"):
        config["problem_type"] = f"{kind}_label_classification"
        (model / "config.json").write_text(json.dumps(config))
        load_model_and_data(tiny_settings(model, data, "", task="classification"))
        is_told = "is for 'multi_label_classification' as its `problem_t" in caplog.text
        assert is_told == (kind == "multi")


def test_a_new_head_that_is_trained_in_part_is_stored_as_a_whole(trained, tmp_path):
    """The folder alone does not define the rest of it."""
    folder, _, _ = trained
    data = write_rows(tmp_path / "data", "text", lambda label: "ab"[label])
    settings = tiny_settings(
        folder, data, tmp_path / "run", task="classification", method="sift",
        where=("^classifier/kernel",), dense=("^pooler/",),
    )  # fmt: skip
    metrics = finetune(settings)["eval"]
    adapter = load_adapter(settings.output)
    assert {"classifier/bias", "classifier/kernel"} <= {*adapter.dense}
    assert not adapter.support
    assert evaluate_adapter(settings.output, data=settings.data) == metrics


def test_the_order_of_an_adapter_wins_over_that_of_the_model(trained, tmp_path):
    """As in files of before, whose heads are in the order of the task."""
    folder, _, _ = trained
    data = write_rows(tmp_path / "data", "sentence", lambda label: label)
    _, params = from_pretrained(folder)
    turned = {
        f"classifier/{name}": np.asarray(leaf)[..., ::-1]
        for name, leaf in params["classifier"].items()
    }
    settings = {"dtype": "float32", "max_length": 16}
    adapter = Adapter(
        {}, {}, turned, {}, method="full", settings=settings, base_model=str(folder),
        base_hash=base_hash(folder), task="sst2", labels=("negative", "positive"),
    )  # fmt: skip
    save_adapter(tmp_path / "old.safetensors", adapter)
    metrics = evaluate_adapter(tmp_path / "old.safetensors", data=str(data))
    assert metrics["accuracy"] == 1.0


@pytest.mark.slow
def test_another_order_of_a_frozen_head_is_refused_and_no_other_spelling(
    trained, tmp_path
):
    """The weights are the same, and the answers would be turned round."""
    folder, _, _ = trained
    data = write_rows(tmp_path / "data", "sentence", lambda label: label)
    config = json.loads((folder / "config.json").read_text())
    for name, dense in (("frozen", ("^pooler/",)), ("trained", None)):
        settings = tiny_settings(
            folder, data, tmp_path / name, method="lora", dense=dense, max_steps=1,
            learning_rate=1e-9,
        )  # fmt: skip
        assert finetune(settings)["eval"]["accuracy"] == 1.0

    def evaluate(adapter, *names):
        model = shutil.copytree(folder, tmp_path / "model", dirs_exist_ok=True)
        renamed = {**config, "id2label": dict(enumerate(names))}
        (model / "config.json").write_text(json.dumps(renamed))
        return evaluate_adapter(tmp_path / adapter, model=str(model), data=str(data))

    for names in (("negative", "positive"), ("positive", "negative", "neutral")):
        with pytest.raises(InputError, match="whose `config.json` has the labels"):
            evaluate("frozen", *names)
    assert evaluate("frozen", "POS", "NEG")["accuracy"] == 1.0
    assert evaluate("frozen", "LABEL_0", "LABEL_1")["accuracy"] == 1.0
    assert evaluate("trained", "negative", "positive")["accuracy"] == 1.0

"""Loading checkpoints of every age, saving them, and saying what is wrong."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import (
    FAMILIES,
    PAD_IDS,
    jax_batch,
    padded_batch,
    tiny_config,
    tiny_params,
)

from sparse_jax.errors import InputError
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import MaskedLM, SequenceClassifier
from sparse_jax.models.hf.model_files import local_folder
from sparse_jax.models.hf.pretrained import base_hash, from_pretrained, save_pretrained
from sparse_jax.models.hf.read_config import read_config

both_families = pytest.mark.parametrize("name", ["bert", "roberta"])


@pytest.fixture
def save(tmp_path):
    """Returns a function that saves a tiny model and gives its folder."""

    def save(name, head=SequenceClassifier, **changes):
        model = Model(head, FAMILIES[name], tiny_config(name, **changes))
        params = tiny_params(name, head)
        save_pretrained(model, params, tmp_path / name)
        return tmp_path / name, model, params

    return save


def rewrite_tensors(folder, change):
    """Replaces the tensors of a folder by `change(tensors)`."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder, **changes):
    """Replaces fields of a `config.json`; None removes one."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))


def assert_trees_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@both_families
@pytest.mark.parametrize("head", [SequenceClassifier, MaskedLM])
def test_a_saved_model_loads_as_it_was(name, head, save):
    folder, model, params = save(name, head)
    loaded, loaded_params = from_pretrained(folder, head=head)
    assert loaded == model
    assert_trees_equal(loaded_params, params)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_names_without_a_prefix_load(name, save):
    folder, _, params = save(name)
    bare = lambda tensors: {k.removeprefix(f"{name}."): v for k, v in tensors.items()}
    rewrite_tensors(folder, bare)
    assert_trees_equal(from_pretrained(folder)[1], params)


@both_families
def test_old_names_of_norms_load(name, save):
    folder, _, params = save(name)
    old = lambda key: key.replace("Norm.weight", "Norm.gamma").replace(
        "Norm.bias", "Norm.beta"
    )
    rewrite_tensors(folder, lambda tensors: {old(k): v for k, v in tensors.items()})
    assert "gamma" in "".join(load_file(folder / "model.safetensors"))
    assert_trees_equal(from_pretrained(folder)[1], params)


@both_families
def test_buffers_and_heads_of_other_tasks_are_ignored(name, save):
    folder, _, params = save(name)
    extra = {
        f"{name}.embeddings.position_ids": np.arange(20)[None],
        "cls.seq_relationship.weight": np.zeros((2, 32), np.float32),
        "lm_head.bias": np.zeros(50, np.float32),
    }
    rewrite_tensors(folder, lambda tensors: tensors | extra)
    assert_trees_equal(from_pretrained(folder)[1], params)


@both_families
def test_a_sharded_checkpoint_loads(name, save):
    folder, _, params = save(name)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-{shard}.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert_trees_equal(from_pretrained(folder)[1], params)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match="misses model-1.safetensors"):
        from_pretrained(folder)


@both_families
def test_a_bare_encoder_gets_a_new_head_from_the_key(name, save):
    folder, model, params = save(name)
    is_head = lambda key: "pooler" in key or "classifier" in key
    bare = lambda tensors: {k: v for k, v in tensors.items() if not is_head(k)}
    rewrite_tensors(folder, bare)
    with pytest.raises(InputError, match="`key` must be given.*`classifier/"):
        from_pretrained(folder)
    loaded, found = from_pretrained(folder, key=jax.random.key(3), num_labels=5)
    assert_trees_equal(found["layers"], params["layers"])
    new = loaded.init(jax.random.key(3))
    assert_trees_equal(found["classifier"], new["classifier"])
    logits = loaded(found, jax_batch(padded_batch(name)))
    assert logits.shape == (3, 5) and bool(jnp.all(jnp.isfinite(logits)))


@both_families
def test_a_masked_lm_becomes_a_classifier(name, save):
    folder, _, params = save(name, MaskedLM)
    loaded, found = from_pretrained(folder, num_labels=1, key=jax.random.key(0))
    assert loaded.config.num_labels == 1
    assert_trees_equal(found["embeddings"], params["embeddings"])


def test_parameters_load_in_the_dtype_asked_for(save):
    folder, _, params = save("bert")
    _, found = from_pretrained(folder, dtype=jnp.bfloat16)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert_trees_equal(found, half)


def test_labels_keep_their_names(save):
    folder, _, _ = save("bert", label_names=("no", "maybe", "yes"))
    fields = json.loads((folder / "config.json").read_text())
    assert fields["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    assert fields["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    _, config = read_config(folder)
    assert config.label_names == ("no", "maybe", "yes")
    assert read_config(folder, num_labels=2)[1].label_names is None


@pytest.mark.parametrize(
    ("dtypes"), [{"dtype": "float16"}, {"dtype": None, "torch_dtype": "float16"}]
)
def test_new_and_old_configurations_load(dtypes, save):
    folder, _, params = save("bert")
    rewrite_config(folder, **dtypes)
    assert_trees_equal(from_pretrained(folder)[1], params)


def test_a_field_that_is_absent_takes_its_usual_value(save):
    folder, _, _ = save("roberta")
    rewrite_config(folder, classifier_dropout=None, hidden_dropout_prob=0.25)
    _, config = read_config(folder)
    assert config.classifier_dropout == 0.25
    assert config.pad_id == PAD_IDS["roberta"]
    assert (config.max_positions, config.position_offset) == (20, 2)


def test_the_hash_depends_on_the_weights_only(save, tmp_path):
    folder, model, params = save("bert")
    shutil.copytree(folder, tmp_path / "copy")
    rewrite_config(tmp_path / "copy", hidden_dropout_prob=0.0)
    assert base_hash(tmp_path / "copy") == base_hash(folder)
    assert len(base_hash(folder)) == 64
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    save_pretrained(model, changed, tmp_path / "copy")
    assert base_hash(tmp_path / "copy") != base_hash(folder)


def test_a_folder_without_a_configuration_is_named(tmp_path):
    with pytest.raises(InputError, match="must be a folder with a `config.json`"):
        from_pretrained(tmp_path)


def test_a_configuration_that_is_not_json_is_named(save):
    folder, _, _ = save("bert")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json` must be a JSON object"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "must be one of bert, .*roberta, got 't5'"),
        ({"model_type": None}, "must be one of bert, .*roberta, got None"),
        ({"hidden_size": "wide"}, "`hidden_size` in .* positive whole .*, got 'wide'"),
        ({"hidden_size": 0}, "`hidden_size` in .* positive whole .*, got 0"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute'"),
        ({"is_decoder": True}, "must be false"),
    ],
)
def test_a_model_that_is_not_supported_says_why(changes, message, save):
    folder, _, _ = save("bert")
    rewrite_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_size_that_is_absent_is_not_taken_from_defaults(name, save):
    folder, _, _ = save("bert")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields[name]
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=f"`{name}` must be in .*config.json`"):
        read_config(folder)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
        ("bloom", {"n_embed": 64, "n_layer": 2, "num_attention_heads": 4}),
    ],
)
def test_sizes_may_have_the_names_of_a_family(family, fields, tmp_path):
    written = {"model_type": family, "vocab_size": 9, **fields}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path)[1].hidden_size == 64


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}'])
def test_an_index_that_is_none_is_named(text, save):
    folder, _, _ = save("bert")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="index.json` must be JSON with a `weight_map"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "/x" * 4000])
def test_what_is_no_id_is_not_asked_of_the_hub(name):
    with pytest.raises(InputError, match="which is neither. Check the spelling"):
        local_folder(name)


def test_a_folder_without_weights_is_named(save):
    folder, _, _ = save("bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="which has no weights"):
        from_pretrained(folder)
    with pytest.raises(InputError, match="which has no weights"):
        base_hash(folder)


def test_a_pickle_is_not_opened_but_its_conversion_explained(save):
    folder, _, _ = save("bert")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickle.*safe_serialization=True"):
        from_pretrained(folder)


def test_a_truncated_file_is_named(save):
    folder, _, _ = save("bert")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="must be a complete safetensors file"):
        from_pretrained(folder)


def test_a_missing_tensor_is_named(save):
    folder, _, _ = save("bert")
    name = "bert.encoder.layer.1.output.dense.weight"
    rewrite_tensors(folder, lambda t: {k: v for k, v in t.items() if k != name})
    with pytest.raises(InputError, match=f"`{name}` for `layers/mlp/down/kernel`"):
        from_pretrained(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(save):
    folder, _, _ = save("bert")
    name = "bert.encoder.layer.1.output.dense.weight"
    wrong = {name: np.zeros((32, 40), np.float32)}
    rewrite_tensors(folder, lambda tensors: tensors | wrong)
    message = rf"`{name}` must have shape \[32, 48\] .*got \[32, 40\]"
    with pytest.raises(InputError, match=message):
        from_pretrained(folder)


@both_families
def test_another_number_of_labels_says_how_many_there_are(name, save):
    folder, _, _ = save(name)
    with pytest.raises(
        InputError, match=r"shape \[2\].*got \[3\]. Pass `num_labels=3`"
    ):
        from_pretrained(folder, num_labels=2)


@pytest.mark.parametrize("model", ["some-model", "someone/some-model"])
def test_what_is_no_folder_and_cannot_be_fetched_is_named(model, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Cannot reach the host.\nMore lines.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError, match=f"got '{model}'.*host. Check") as caught:
        from_pretrained(model)
    assert "\n" not in str(caught.value)


HUB_FILES = {
    "README.md", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
    "special_tokens_map.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model",
    "additional_chat_templates/tool.jinja", "pytorch_model.bin", "training_args.bin",
    "consolidated.safetensors", "model.fp16.safetensors", "original/params.json",
    "original/consolidated.00.pth", "onnx/config.json", "onnx/model.onnx",
    "onnx/model.safetensors", "modeling_own.py", "tf_model.h5", "params.json",
}  # fmt: skip
HUB_WANTED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", "special_tokens_map.json", "vocab.txt",
    "merges.txt", "sentencepiece.bpe.model", "additional_chat_templates/tool.jinja",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["whole", "sharded", "both"])
def test_of_a_hub_id_the_weights_are_fetched_once(kind, save, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    folder, _, params = save("bert")
    shards = {"model-1-of-2.safetensors", "model-2-of-2.safetensors"}
    index = {"model.safetensors.index.json"}
    weights = {"model.safetensors"} if kind != "sharded" else set()
    there = HUB_FILES | weights | (shards | index if kind != "whole" else set())
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = dict(zip(sorted(shards), (names[::2], names[1::2]), strict=True))
    asked = []

    def fetch(model, *, allow_patterns, revision=None):
        snapshot = tmp_path / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        asked.append((model, revision))
        for name in filter_repo_objects(sorted(there), allow_patterns=allow_patterns):
            path = snapshot / name
            path.parent.mkdir(exist_ok=True)
            if name in parts:
                save_file({key: tensors[key] for key in parts[name]}, path)
            elif name in index:
                files = {key: shard for shard in parts for key in parts[shard]}
                path.write_text(json.dumps({"weight_map": files}))
            elif (folder / name).is_file():
                shutil.copy(folder / name, path)
            else:
                path.write_text("")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert_trees_equal(from_pretrained("someone/some-model")[1], params)
    snapshot = tmp_path / "snapshots" / "0123abc"
    found = {str(f.relative_to(snapshot)) for f in snapshot.rglob("*") if f.is_file()}
    once = shards if kind == "sharded" else weights
    assert found == HUB_WANTED | once | (index if kind != "whole" else set())
    again = [("someone/some-model", "0123abc")] if kind == "sharded" else []
    assert asked == [("someone/some-model", None), *again]


def test_the_shards_of_an_index_on_the_hub_are_names_not_patterns(
    tmp_path, monkeypatch
):
    def fetch(model, *, allow_patterns, revision=None):
        assert revision is None
        files = {"weight_map": {"x": "*.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(files))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(InputError, match="must name safetensors files next to it"):
        from_pretrained("someone/some-model")

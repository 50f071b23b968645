"""What is exported is loaded by others with our logits, and bad input is one line."""

import json
import re
import shutil
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_adapters import random_adapter
from tiny_decoders import batch_of, padded, random_model
from tiny_run import WORDS, write_model
from tiny_text import write_decoder

from sparse_jax import (
    CausalLM,
    InputError,
    LoRA,
    Series,
    Sparse,
    apply_patches,
    export,
    from_pretrained,
    load_adapter,
    load_patches,
    merge_adapter,
    save_adapter,
    save_peft,
    save_pretrained,
)
from sparse_jax.cli.main import main
from sparse_jax.interchange.targets import TARGETS
from sparse_jax.models.hf.pretrained import (
    base_config,
    base_hash,
    leaf_digests,
    new_leaves,
)
from sparse_jax.models.hf.tensors import LazyTensor, write_tensors
from sparse_jax.params.names import map_named

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LABELS = ("bad", "fair", "good")


def write_tokenizer_of_words(folder):
    write_decoder(folder / "other")
    for path in (folder / "other").glob("tokenizer*"):
        path.rename(folder / path.name)


def write_llama(folder):
    """Groups of two heads for each key, and the word table as the head."""
    random_model("llama", SIZES, folder)
    write_tokenizer_of_words(folder)


def write_gemma3(folder):
    kinds = {"sliding_window": 5, "sliding_window_pattern": 2}
    random_model("gemma3_text", {**SIZES, **kinds, "head_dim": 8}, folder)
    write_tokenizer_of_words(folder)


def write_gpt2(folder):
    random_model("gpt2", GPT2, folder)
    write_tokenizer_of_words(folder)


SIFT = Sparse(density=0.1, where="attention/(query|value)|mlp/up/kernel")
HEAD = ("^classifier/", "^pooler/")
# model -> how it is written, options of `from_pretrained`, method
MODELS = {
    "encoder, sift": (
        write_model, {"labels": LABELS}, replace(SIFT, dense=HEAD),
    ),
    "encoder, lora": (
        write_model, {"labels": LABELS}, LoRA(rank=2, where="query", dense=HEAD),
    ),
    "llama, sift": (write_llama, {"head": CausalLM}, SIFT),
    "llama, word table": (
        write_llama, {"head": CausalLM},
        Sparse(density=0.1, where="embeddings/word", dense="^norm/"),
    ),
    "gemma 3, sift": (write_gemma3, {"head": CausalLM}, replace(SIFT, dense="norm")),
    "gpt2, sift": (write_gpt2, {"head": CausalLM}, SIFT),
    "llama, labels": (
        write_llama, {"labels": LABELS}, LoRA(rank=2, where="query", dense=HEAD[0]),
    ),
}  # fmt: skip


class Made:
    """A base and an adapter in a folder, as a run leaves them."""

    def __init__(self, folder, write, options, method):
        self.base, self.path = folder / "base", folder / "adapter.safetensors"
        write(self.base)
        self.options = {**options, "key": jax.random.key(0)}
        self.model, self.params = from_pretrained(self.base, **self.options)
        self.new = new_leaves(self.model, self.base, options.get("labels"))
        self.adapter = random_adapter(
            self.params,
            method,
            base_model=str(self.base),
            base_hash=base_hash(self.base),
            base_leaves=leaf_digests(self.base),
            base_config=base_config(self.model),
            labels=options.get("labels", ()),
            task="classification" if "labels" in options else "causal",
            settings={"dtype": "float32", "seed": 0, "eos_token_id": [2, 5]},
        )
        save_adapter(self.path, self.adapter)

    @property
    def merged(self):
        return merge_adapter(self.params, self.adapter, new=self.new)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a function from the name of a model to what was made of it, once."""
    found = {}

    def make(name):
        if name not in found:
            found[name] = Made(tmp_path_factory.mktemp("made"), *MODELS[name])
        return found[name]

    return make


@pytest.fixture
def encoder(made):
    return made("encoder, sift")


@pytest.fixture
def llama(made):
    return made("llama, sift")


def tokens(model):
    ids, mask = padded("right")
    return ids % model.config.vocab_size, mask


def their_logits(theirs, model):
    import torch

    ids, mask = tokens(model)
    with torch.no_grad():
        out = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))
    return out.logits.numpy()


def require_equal_logits(theirs, model, ours):
    logits = their_logits(theirs, model)
    # Of decoders at the tokens; a classifier has one row for each text.
    is_token = tokens(model)[1].astype(bool)
    if logits.ndim == 3:
        logits, ours = logits[is_token], np.asarray(ours)[is_token]
    np.testing.assert_allclose(logits, ours, rtol=0, atol=1e-5)


def load_theirs(folder, model):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    is_causal = model.head is CausalLM
    kind = AutoModelForCausalLM if is_causal else AutoModelForSequenceClassification
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.quick(1)
def test_transformers_gives_our_logits_of_a_merged_model(name, made, tmp_path):
    one, folder = made(name), tmp_path / "out"
    assert export(one.path, to="merged", output=folder) == folder
    ours = jax.jit(one.model)(one.merged, batch_of(*tokens(one.model)))
    require_equal_logits(load_theirs(folder, one.model), one.model, ours)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, None) for name in MODELS), ("llama, sift", "bfloat16")],
)
def test_the_weights_are_those_of_merge_adapter_to_the_bit(name, dtype, made, tmp_path):
    one, folder = made(name), tmp_path / "out"
    export(one.path, to="merged", output=folder, dtype=dtype, shard_size="20KB")
    kept = {k: v for k, v in one.options.items() if k not in ("key", "labels")}
    _, params = from_pretrained(folder, **kept, dtype=dtype or "float32")
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype or "float32"), one.merged)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, expected)
    assert all(jax.tree.leaves(same))
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == (dtype or "float32")


def test_weights_come_in_shards_of_a_size_with_an_index(llama, tmp_path):
    folder = tmp_path / "out"
    export(llama.path, to="merged", output=folder, shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    count = len(shards)
    assert count > 2
    assert {path.name for path in shards} == {*index["weight_map"].values()}
    assert shards[0].name == f"model-00001-of-{count:05}.safetensors"
    assert not (folder / "model.safetensors").exists()
    sizes = [sum(a.nbytes for a in load_file(path).values()) for path in shards]
    assert max(sizes) <= 20_000 and sum(sizes) == index["metadata"]["total_size"]
    # The tied head is in the table of words alone.
    assert "lm_head.weight" not in index["weight_map"]


def test_a_smaller_model_leaves_no_index_of_a_larger_one(llama, tmp_path):
    save_pretrained(llama.model, llama.params, tmp_path, shard_size=20_000)
    save_pretrained(llama.model, llama.merged, tmp_path)
    _, params = from_pretrained(tmp_path, head=CausalLM)
    name = ("layers", "attention", "query", "kernel")
    one, other = (
        tree[name[0]][name[1]][name[2]][name[3]] for tree in (params, llama.merged)
    )
    assert (one == other).all()


def test_labels_tokenizer_and_task_are_those_of_the_adapter(encoder, tmp_path):
    from transformers import pipeline

    folder = tmp_path / "out"
    export(encoder.path, to="merged", output=folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert config["problem_type"] == "single_label_classification"
    assert config["architectures"] == ["BertForSequenceClassification"]
    # What only the base's file says stays, its head does not.
    assert config["intermediate_size"] == 24
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    assert classify(f"{WORDS[0]} film")[0]["label"] in LABELS


@pytest.mark.parametrize(
    ("task", "labels", "kind", "count"),
    [
        ("regression", (), "regression", 1),
        ("multilabel", ("a", "b", "c"), "multi_label_classification", 3),
        ("sst2", ("negative", "positive"), "single_label_classification", 2),
    ],
)
def test_a_config_says_what_kind_of_labels(
    task, labels, kind, count, encoder, tmp_path
):
    from transformers import AutoConfig

    model, params = from_pretrained(encoder.base, labels=labels, key=jax.random.key(0))
    method = Sparse(density=0.1, where="query/kernel", dense=HEAD)
    adapter = random_adapter(params, method)
    facts = {
        name: getattr(encoder.adapter, name) for name in ("base_model", "base_hash")
    }
    adapter = replace(adapter, task=task, labels=labels, **facts)
    save_adapter(tmp_path / "a.safetensors", adapter)
    export(tmp_path / "a.safetensors", to="merged", output=tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.problem_type, config.num_labels) == (kind, count)
    assert model.config.num_labels == count


def test_patches_of_another_dtype_give_the_merged_weights(llama, tmp_path):
    for to in ("patch", "merged"):
        export(llama.path, to=to, output=tmp_path / to, dtype="bfloat16")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    tensors = load_file(llama.base / "model.safetensors")
    tensors = {k: x.astype(jnp.bfloat16) for k, x in tensors.items() if k in merged}
    apply_patches(tensors, load_patches(tmp_path / "patch"))
    for name, tensor in merged.items():
        np.testing.assert_array_equal(tensors[name], tensor)


def test_texts_end_where_those_of_the_training_did(llama, tmp_path):
    export(llama.path, to="merged", output=tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert fields["eos_token_id"] == [2, 5]
    assert fields["bos_token_id"] == 1


def test_a_card_has_the_usual_rate_that_an_earlier_run_recorded(llama, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(llama.path, run / "adapter.safetensors")
    config = {"settings": {"learning_rate": None}, "learning_rate": 0.0625}
    (run / "config.json").write_text(json.dumps(config))
    export(run, to="delta", output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| learning_rate | `0.0625` |" in card


def test_a_delta_is_the_adapter_with_a_license(llama, tmp_path):
    export(llama.path, to="delta", output=tmp_path / "out", license="mit")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "adapter.safetensors"]
    loaded = load_adapter(tmp_path / "out")
    assert loaded.license == "mit"
    # Without results there is no model index.
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "model" not in card.split("---")[1]
    for name, array in llama.adapter.values.items():
        np.testing.assert_array_equal(loaded.values[name], array)


def code_of(card):
    """Returns the Python of a card."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("encoder, sift", "merged"),
        ("encoder, lora", "peft"),
        ("encoder, sift", "peft"),
        ("llama, labels", "peft"),
        ("llama, sift", "peft"),
        ("llama, sift", "patch"),
        ("llama, sift", "delta"),
        ("encoder, sift", "delta"),
        ("encoder, sift", "patch"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.quick(1)
def test_the_code_of_a_card_loads_the_folder(name, to, made, tmp_path, monkeypatch):
    one = made(name)
    export(one.path, to=to, output=tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    code = code_of((tmp_path / "out" / "README.md").read_text())
    lines = [line for line in code.splitlines() if line and "import" not in line]
    assert len(lines) <= 4
    found = {}
    exec(code.replace("FOLDER_OF_THE_BASE", str(one.base)), found)
    batch = batch_of(*tokens(one.model))
    ours = jax.jit(one.model)(one.merged, batch)
    if to == "delta":
        given = found["model"](found["params"], batch, attachment=found["attachment"])
        np.testing.assert_allclose(given, ours, rtol=0, atol=1e-5)
    else:
        require_equal_logits(found["model"].eval(), one.model, ours)
    if to == "patch":
        assert_same_weights(found["model"], one.merged, one.model, tmp_path)


def assert_same_weights(theirs, params, model, folder):
    save_pretrained(model, params, folder / "merged")
    for key, tensor in load_file(folder / "merged" / "model.safetensors").items():
        np.testing.assert_array_equal(theirs.state_dict()[key].float().numpy(), tensor)


# The encoder's base has no head in its checkpoint.
@pytest.mark.parametrize("change", ["no prefix", "shards", "bfloat16"])
def test_the_code_of_a_patch_loads_any_checkpoint_of_the_base(
    change, encoder, tmp_path, monkeypatch
):
    dtype = "bfloat16" if change == "bfloat16" else None
    export(encoder.path, to="patch", output=tmp_path / "out", dtype=dtype)
    base = shutil.copytree(encoder.base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    if change == "no prefix":
        tensors = {name.removeprefix("bert."): x for name, x in tensors.items()}
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    if change == "shards":
        tensors = {name: lazy(tensor) for name, tensor in tensors.items()}
        write_tensors(tensors, base, shard_size=4_000)
        assert (base / "model.safetensors.index.json").exists()
    monkeypatch.chdir(tmp_path)
    code, found = code_of((tmp_path / "out" / "README.md").read_text()), {}
    exec(code.replace("FOLDER_OF_THE_BASE", str(base)), found)
    cast = lambda leaf: leaf.astype(dtype or leaf.dtype).astype("float32")
    params = jax.tree.map(cast, encoder.merged)
    assert_same_weights(found["model"], params, encoder.model, tmp_path)


def lazy(array):
    return LazyTensor(array.shape, array.dtype, lambda: array)


@pytest.mark.parametrize("to", ["merged", "delta"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_head_of_peft_says_how_many_labels_there_are(encoder, to, tmp_path):
    nameless = replace(encoder.adapter, labels=(), task="", base_hash="")
    lora = random_adapter(encoder.params, LoRA(rank=2, where="query", dense=HEAD))
    lora = replace(nameless, added=lora.added, dense=lora.dense, method=lora.method,
                   support={}, values={})  # fmt: skip
    save_peft(tmp_path / "peft", lora, encoder.model)
    out = export(tmp_path / "peft", to=to, output=tmp_path / "out", model=encoder.base)
    merged = merge_adapter(encoder.params, lora, new=encoder.new)
    batch = batch_of(*tokens(encoder.model))
    ours = jax.jit(encoder.model)(merged, batch)
    if to == "merged":
        require_equal_logits(load_theirs(out, encoder.model), encoder.model, ours)
        return
    code, found = code_of((out / "README.md").read_text()), {}
    code = code.replace("FOLDER_OF_THE_BASE", str(encoder.base))
    exec(code.replace('load_adapter("out")', f'load_adapter("{out}")'), found)
    given = found["model"](found["params"], batch, attachment=found["attachment"])
    np.testing.assert_allclose(given, ours, rtol=0, atol=1e-5)


# What is trained of the head of a base whose labels are in another order.
@pytest.mark.parametrize("trained", ["nothing", "bias", "entries", "all"])
@pytest.mark.parametrize("to", ["merged", "patch", "peft"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.quick(3)
def test_outputs_are_those_of_the_labels_of_the_adapter(trained, to, tmp_path):
    base, rules = tmp_path / "base", {"bias": "^classifier/bias", "all": "^classifier"}
    write_model(base)
    key = jax.random.key(3)
    save_pretrained(*from_pretrained(base, labels=LABELS[::-1], key=key), base)
    model, params = from_pretrained(base, labels=LABELS)
    where = ("query/kernel", *(["^classifier/kernel"] * (trained == "entries")))
    method = Sparse(density=0.1, where=where, dense=rules.get(trained, "^pooler"))
    adapter = random_adapter(
        params, method, base_model=str(base), base_hash=base_hash(base),
        base_config=base_config(model), labels=LABELS, task="classification",
    )  # fmt: skip
    save_adapter(tmp_path / "a.safetensors", adapter)
    out = export(tmp_path / "a.safetensors", to=to, output=tmp_path / "out")
    theirs = load_theirs(out if to == "merged" else base, model)
    if to == "peft":
        theirs = pytest.importorskip("peft").PeftModel.from_pretrained(theirs, out)
    elif to == "patch":
        torch, tensors = pytest.importorskip("torch"), theirs.state_dict()
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        apply_patches(arrays, load_patches(out))
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        theirs.load_state_dict(found)
    ours = jax.jit(model)(merge_adapter(params, adapter), batch_of(*tokens(model)))
    require_equal_logits(theirs.eval(), model, ours)


@pytest.fixture(scope="module")
def run(tmp_path_factory, made):
    """The folder of a run on SST-2 of the Hub, with its results and settings."""
    one, folder = made("encoder, sift"), tmp_path_factory.mktemp("run")
    save_adapter(
        folder / "adapter.safetensors",
        replace(one.adapter, base_model="some/bert", task="sst2", word="sift"),
    )
    results = {"validation": {"accuracy": 0.75}, "test": {"accuracy": None}}
    counts = (
        "adapter_bytes", "optimizer_bytes", "peak_memory_bytes", "seconds_per_step",
        "skipped_batches", "steps", "total_parameters", "trained_parameters",
        "trained_parameters_without_head",
    )  # fmt: skip
    metrics = {
        **dict.fromkeys(counts, 1), "eval": {"accuracy": 0.75}, "splits": results,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    settings = {
        "model": "/home/me/bert", "data": None, "output": "/home/me/run", "epochs": 3,
        "active": 0.25, "sampler": None, "packing": False,
    }  # fmt: skip
    config = {"settings": {**settings, "learning_rate": 0.03}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("to", "library", "relation"),
    [("delta", "sparse_jax", "adapter"), ("merged", "transformers", "finetune")],
)
def test_the_hub_reads_the_card(to, library, relation, run, made, tmp_path):
    from huggingface_hub import ModelCard

    base = made("encoder, sift").base
    export(run, to=to, output=tmp_path / "out", model=base, license="apache-2.0")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data
    assert (data.library_name, data.license) == (library, "apache-2.0")
    assert (data.base_model, data.base_model_relation) == ("some/bert", relation)
    assert data.tags == ["sparse_jax", "sift"]
    assert data.pipeline_tag == "text-classification"
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
    assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", "sst2")
    assert "| validation | accuracy | 0.7500 |\n| test | accuracy | not finite |" in (
        card.text
    )
    assert "| density | `0.1` |" in card.text and "| epochs | `3` |" in card.text
    # Without a sampler there are no active layers; folders are nobody's business.
    assert "active" not in card.text and "/home" not in card.content


def test_an_upload_needs_no_token_in_sight(run, made, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, *args, **options):
            calls.append(("api", args, options))

        def __getattr__(self, name):
            return lambda *args, **options: calls.append((name, args, options))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    options = {"output": tmp_path / "out", "model": made("encoder, sift").base}
    export(run, to="delta", push="me/mine", **options)
    assert calls == [
        ("api", (), {}),
        ("create_repo", ("me/mine",), {"private": True, "exist_ok": True}),
        (
            "upload_folder", (),
            {"repo_id": "me/mine", "folder_path": tmp_path / "out"},
        ),
    ]  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hf download me/mine --local-dir mine" in card


@pytest.fixture
def command(monkeypatch, capsys):
    """Returns a function that exports: exit code, output, errors."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sparse-jax", "export", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return call


def test_without_a_network_the_folder_is_complete(
    llama, tmp_path, command, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    words = (llama.path, "--to", "delta", "--output", out, "--push", "me/mine")
    code, _, err = command(*words)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and f"`{out}` is complete: upload it later" in line
    assert load_adapter(out).entries == llama.adapter.entries


def full(folder, one):
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")


def cut(folder, one):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def no_tokenizer(folder, one):
    for path in (folder / "base").glob("tokenizer*"):
        path.unlink()


def other_base(folder, one):
    params = map_named(lambda name, x: x + ("query" in name), one.params)
    save_pretrained(one.model, params, folder / "base")


def smaller_base(folder, one):
    save_pretrained(one.model, one.params, folder / "base", dtype="bfloat16")


def foreign(folder, one):
    (folder / "adapter.safetensors").write_text("hello")


def bottleneck(folder, one):
    put(folder, one, Series(size=2, where="attention/output"))


def lora(folder, one):
    put(folder, one, LoRA(rank=2, where="query"))


def many(folder, one):
    put(folder, one, Sparse(density=0.9, where="query|down"))


def put(folder, one, method):
    kept = ("base_model", "base_hash", "task", "settings")
    about = {name: getattr(one.adapter, name) for name in kept}
    adapter = random_adapter(one.params, method, **about)
    save_adapter(folder / "adapter.safetensors", adapter)


def nothing(folder, one):
    del folder, one


MERGED, DELTA = ("--to", "merged"), ("--to", "delta")
BAD = {
    "target folder with files": (full, MERGED, "--output must be a new or an empty"),
    "truncated file": (cut, MERGED, "must be a complete safetensors file"),
    "foreign file": (foreign, DELTA, "must be a complete safetensors file"),
    "missing tokenizer": (no_tokenizer, MERGED, "must hold a tokenizer"),
    "another base": (
        other_base, DELTA,
        " Leaves that differ: 1 of 11, the first is layers/attention/query/kernel. P",
    ),
    "another dtype of the base": (
        smaller_base, DELTA,
        " and 8 more; the first was float32[61, 32] and is bfloat16[61, 32]. Pass",
    ),
    "unknown target": (nothing, ("--to", "gguf"), "must be one of merged, peft"),
    "option of another": (nothing, (*DELTA, "--dtype", "float32"), "left out for"),
    "unknown dtype": (nothing, (*MERGED, "--dtype", "int8"), "must be one of float32"),
    "no size": (nothing, (*MERGED, "--shard-size", "big"), "--shard-size must be"),
    "one form in PEFT": (
        lora, ("--to", "peft", "--peft-type", "shira"), "left out for",
    ),
    "no form of PEFT": (
        nothing, ("--to", "peft", "--peft-type", "x"), "must be one of shira",
    ),
    "too many entries for SHiRA": (
        many, ("--to", "peft"), "On the command line that is --peft-type supertuning",
    ),
    "no license": (nothing, (*DELTA, "--license", "My own"), "--license must be the"),
    "no repository": (nothing, (*DELTA, "--push", "a/b/c"), "must be the id of"),
    "no such form": (bottleneck, MERGED, "merge"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, llama, tmp_path, command):
    spoil, words, message = BAD[case]
    for path in (llama.base, llama.path):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    spoil(tmp_path, llama)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    place = ("--output", tmp_path / "out", "--model", tmp_path / "base")
    code, out, err = command(tmp_path / "adapter.safetensors", *words, *place)
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_value_that_is_too_large_for_a_dtype_is_refused(llama, tmp_path):
    params = {**llama.params, "norm": {"scale": jnp.full(32, 1e6)}}
    with pytest.raises(InputError, match="got float16, which `norm/scale` has too"):
        save_pretrained(llama.model, params, tmp_path, dtype="float16")


def test_the_help_names_every_target(command):
    code, out, _ = command("--help")
    assert code == 0 and all(f"{word}:" in out for word in TARGETS)

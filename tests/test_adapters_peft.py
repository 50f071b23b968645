"""An adapter in PEFT's layout: the names, shapes and numbers that PEFT reads."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import FAMILIES, tiny_config
from tiny_text import CONFIG

from sparse_jax import IA3, Adapter, DoRA, InputError, LoRA, Series
from sparse_jax.interchange.peft_save import save_peft
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier

L, D, F, R = 2, 32, 48, 4
BERT = Model(SequenceClassifier, FAMILIES["bert"], tiny_config("bert"))
ROBERTA = Model(SequenceClassifier, FAMILIES["roberta"], tiny_config("roberta"))
LAYER = "base_model.model.bert.encoder.layer"
HEAD = {
    "classifier/kernel": np.arange(3 * D, dtype=np.float32).reshape(D, 3),
    "classifier/bias": np.zeros(3, np.float32),
    "pooler/kernel": np.zeros((D, D), np.float32),
    "pooler/bias": np.zeros(D, np.float32),
}


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def lora(kind=LoRA, **options):
    method = kind(rank=R, where=("^attention/query$", "^mlp/down$"), **options)
    added = {
        "attention/query": {"a": draw(L, D, R), "b": draw(L, R, D)},
        "mlp/down": {"a": draw(L, F, R), "b": draw(L, R, D)},
    }
    about = {"base_model": "bert-base", "method": method}
    return Adapter(added=added, dense=dict(HEAD), **about)


def saved(folder, adapter, model=BERT):
    save_peft(folder, adapter, model)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def test_the_tensors_of_lora(tmp_path):
    adapter = lora()
    _, tensors = saved(tmp_path, adapter)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{LAYER}.0.attention.self.query.lora_A.weight": (R, D),
        f"{LAYER}.0.attention.self.query.lora_B.weight": (D, R),
        f"{LAYER}.0.output.dense.lora_A.weight": (R, F),
        f"{LAYER}.0.output.dense.lora_B.weight": (D, R),
        f"{LAYER}.1.attention.self.query.lora_A.weight": (R, D),
        f"{LAYER}.1.attention.self.query.lora_B.weight": (D, R),
        f"{LAYER}.1.output.dense.lora_A.weight": (R, F),
        f"{LAYER}.1.output.dense.lora_B.weight": (D, R),
        "base_model.model.bert.pooler.dense.weight": (D, D),
        "base_model.model.bert.pooler.dense.bias": (D,),
        "base_model.model.classifier.weight": (3, D),
        "base_model.model.classifier.bias": (3,),
    }
    a = adapter.added["mlp/down"]["a"]
    np.testing.assert_array_equal(
        tensors[f"{LAYER}.1.output.dense.lora_A.weight"], a[1].T
    )
    np.testing.assert_array_equal(
        tensors["base_model.model.classifier.weight"], HEAD["classifier/kernel"].T
    )


def test_the_config_of_lora(tmp_path):
    config, _ = saved(tmp_path, lora(alpha=6.0, rslora=True, dropout=0.1))
    target = config.pop("target_modules")
    assert config == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6.0,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "use_dora": False,
        "bias": "none",
        "base_model_name_or_path": "bert-base",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": ["bert.pooler.dense", "classifier"],
        "task_type": "SEQ_CLS",
    }
    layer = "bert.encoder.layer.11."
    assert re.fullmatch(target, layer + "attention.self.query")
    assert re.fullmatch(target, layer + "output.dense")
    assert not re.fullmatch(target, layer + "attention.output.dense")


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_trained_word_table_is_also_the_head_that_is_tied_to_it(tmp_path, is_tied):
    """PEFT trains a copy of a module, and a head left alone would be the old one."""
    model = Model(CausalLM, LLAMA, replace(CONFIG, tied=is_tied))
    words = draw(CONFIG.vocab_size, CONFIG.hidden_size)
    site = {"a": draw(4, 16, R), "b": draw(4, R, 16)}
    adapter = Adapter(
        added={"attention/query": site},
        dense={"embeddings/word/embedding": words},
        method=LoRA(rank=R, where="attention/query", dense="embeddings/word"),
    )
    config, tensors = saved(tmp_path, adapter, model)
    heads = ["lm_head"] if is_tied else []
    assert config["modules_to_save"] == [*heads, "model.embed_tokens"]
    assert config["task_type"] == "CAUSAL_LM"
    for module in config["modules_to_save"]:
        np.testing.assert_array_equal(
            tensors[f"base_model.model.{module}.weight"], words
        )
    assert ("base_model.model.lm_head.weight" in tensors) == is_tied


def test_dora_has_a_magnitude(tmp_path):
    adapter = lora(DoRA)
    for parts in adapter.added.values():
        parts["m"] = draw(L, D)
    config, tensors = saved(tmp_path, adapter)
    assert config["use_dora"]
    m = tensors[f"{LAYER}.1.output.dense.lora_magnitude_vector"]
    np.testing.assert_array_equal(m, adapter.added["mlp/down"]["m"][1])


def test_ia3_has_rows_and_columns(tmp_path):
    added = {
        "attention/key": {"output": draw(L, D)},
        "mlp/down": {"input": draw(L, F)},
    }
    method = IA3(where="^attention/key$")
    config, tensors = saved(tmp_path, Adapter(added=added, method=method))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{LAYER}.0.attention.self.key.ia3_l": (D, 1),
        f"{LAYER}.0.output.dense.ia3_l": (1, F),
        f"{LAYER}.1.attention.self.key.ia3_l": (D, 1),
        f"{LAYER}.1.output.dense.ia3_l": (1, F),
    }
    assert config["peft_type"] == "IA3"
    assert config["feedforward_modules"] == r"bert\.encoder\.layer\.\d+\.output\.dense"


def test_the_classifier_of_roberta_is_one_module(tmp_path):
    dense = {
        "classifier/dense/bias": np.zeros(D, np.float32),
        "classifier/dense/kernel": draw(D, D),
        "classifier/out_proj/bias": np.zeros(3, np.float32),
        "classifier/out_proj/kernel": draw(D, 3),
        "layers/attention/norm/bias": draw(L, D),
        "layers/attention/norm/scale": draw(L, D),
    }
    added = {
        "attention/key": {"output": draw(L, D)},
        "mlp/down": {"input": draw(L, F)},
    }
    method = IA3(where="^attention/key$", dense=("classifier", "attention/norm"))
    config, tensors = saved(
        tmp_path, Adapter(added=added, dense=dense, method=method), ROBERTA
    )
    norms = [f"roberta.encoder.layer.{i}.attention.output.LayerNorm" for i in range(L)]
    assert config["modules_to_save"] == ["classifier", *norms]
    assert {f"base_model.model.{norm}.bias" for norm in norms} <= {*tensors}
    assert "base_model.model.classifier.out_proj.bias" in tensors


def test_without_its_classifier_a_file_has_no_task(tmp_path):
    adapter = lora()
    adapter.dense.clear()
    config, _ = saved(tmp_path, adapter)
    assert (config["task_type"], config["modules_to_save"]) == (None, [])


def test_half_a_module_is_refused(tmp_path):
    adapter = lora()
    del adapter.dense["pooler/bias"]
    message = "all parameters of `bert.pooler.dense` .* without `pooler/bias`"
    with pytest.raises(InputError, match=message):
        save_peft(tmp_path, adapter, BERT)


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(method="full", dense=HEAD),
        Adapter(method=Series(size=3), added={"mlp/down": {"up": draw(L, 3, D)}}),
    ],
    ids=lambda adapter: adapter.word,
)
def test_what_peft_does_not_have_is_refused(tmp_path, adapter):
    message = f"lora, dora, ia3, prefix or sparse .* '{adapter.word}'"
    with pytest.raises(InputError, match=message):
        save_peft(tmp_path / "new", adapter, BERT)
    assert not (tmp_path / "new").exists()

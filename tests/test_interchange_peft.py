"""Adapters that go to the real PEFT and come from it: logits, layouts, refusals."""

import copy
import json
import logging
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import write_data, write_model
from tiny_text import write_decoder

from sparse_jax import (
    IA3,
    Adapter,
    CausalLM,
    DoRA,
    Greedy,
    InputError,
    LoRA,
    Prefix,
    Sparse,
    apply_adapter,
    evaluate_adapter,
    from_pretrained,
    load_peft,
    merge_adapter,
    open_adapter,
    save_adapter,
    save_peft,
    save_pretrained,
)
from sparse_jax.generation.writer import load_writer, text_tokens
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.hf.pretrained import base_hash
from sparse_jax.supports.roles import DENSE, SPARSE, map_roles

pytest.importorskip("peft")
# PEFT uses what transformers deprecates, and warns of what it corrects itself; not of
# tensors or options that a folder should have or should not.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "error:.*(missing adapter keys|Unexpected keyword)",
)

SHAPE = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "num_labels": 3,
}
DISTILBERT = {
    **SHAPE,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": 20,
    "num_labels": 3,
}
# Grouped queries, a tied head, and no kernel but the output's that is square.
LLAMA = {
    **SHAPE,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 20,
    "tie_word_embeddings": True,
}
PHI3 = {
    **SHAPE,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    # Room for the longest text, 9 tokens, behind a prefix of 3.
    "sliding_window": 12,
}
GPT2 = {**SHAPE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
MODELS = {
    "bert": ("bert", ENCODER),
    "distilbert": ("distilbert", DISTILBERT),
    "modernbert": ("modernbert", {**ENCODER, "pad_token_id": 0, "local_attention": 4}),
    "llama": ("llama", LLAMA),
    "gpt2": ("gpt2", GPT2),
    "phi3": ("phi3", PHI3),
    # A head and biases of its own.
    "untied": (
        "llama",
        {**LLAMA, "tie_word_embeddings": False, "attention_bias": True},
    ),
}


class Pair:
    """A model in PyTorch and here."""

    def __init__(self, folder, name, dtype="float32"):
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
        )

        family, fields = MODELS[name]
        torch.manual_seed(0)
        is_encoder = "num_labels" in fields
        kind = (
            AutoModelForSequenceClassification if is_encoder else AutoModelForCausalLM
        )
        theirs = kind.from_config(AutoConfig.for_model(family, **fields)).eval()
        with torch.no_grad():
            for leaf in theirs.parameters():
                leaf.add_(0.1 * torch.randn_like(leaf))
        self.theirs = theirs.to(getattr(torch, dtype))
        self.folder, self.is_encoder = folder, is_encoder
        self.theirs.save_pretrained(folder)
        head = SequenceClassifier if is_encoder else CausalLM
        self.model, self.params = from_pretrained(
            folder, head=head, dtype=jnp.dtype(dtype)
        )
        rng = np.random.default_rng(1)
        mask = (np.arange(9) < np.array([[9], [5], [7]])).astype(np.int32)
        self.mask, self.ids = mask, rng.integers(3, 61, (3, 9)).astype(np.int32) * mask

    def base(self):
        """A copy of the model in PyTorch, as PEFT changes what it is given."""
        return copy.deepcopy(self.theirs)

    def logits_there(self, model):
        import torch

        with torch.no_grad():
            found = model(
                input_ids=torch.tensor(self.ids).long(),
                attention_mask=torch.tensor(self.mask).long(),
            ).logits.float()
        return self._seen(found.numpy())

    def logits_here(self, params, attachment=None):
        batch = {"input_ids": self.ids, "attention_mask": self.mask}
        options = {} if attachment is None else {"attachment": attachment}
        batch = jax.tree.map(jnp.asarray, batch)
        return self._seen(np.asarray(self.model(params, batch, unroll=1, **options)))

    def adapted(self, adapter):
        params, attachment = apply_adapter(self.params, adapter, model=self.model)
        return self.logits_here(params, attachment)

    def _seen(self, logits):
        return logits if self.is_encoder else logits[self.mask.astype(bool)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def pair(name, dtype="float32"):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
            made[name, dtype] = Pair(folder, name, dtype)
        return made[name, dtype]

    return pair


def trained(method, params):
    """Returns what a method might have trained: everything it trains, moved."""
    rng = np.random.default_rng(2)
    moved = lambda x: (np.asarray(x) + 0.2 * rng.normal(size=x.shape)).astype(x.dtype)
    parts = {"support": {}, "values": {}, "dense": {}}

    def take(role, leaf):
        if role.kind == DENSE:
            parts["dense"][role.name] = moved(leaf)
        if role.kind == SPARSE:
            shape = role.packed_shape(leaf.shape, method.support_size(role))
            rows = np.asarray(leaf).reshape(*shape[:-1], -1)
            order = np.argsort(rng.random(rows.shape), axis=-1)[..., : shape[-1]]
            support = np.sort(order, axis=-1).astype(np.int32)
            parts["support"][role.name] = support
            parts["values"][role.name] = moved(np.take_along_axis(rows, support, -1))

    map_roles(take, method.roles(params), params)
    added = jax.tree.map(moved, method.added(params, jax.random.key(0)))
    return Adapter(method=method, added=added, **parts)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder, change=None, **options):
    """Changes the tensors or the options of a folder."""
    path = folder / "adapter_model.safetensors"
    if change:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    config = {**config_of(folder), **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))


MAPS = "^attention/(query|value)$"
# A run's own rules: kernels and biases of the attention.
SIFT = "^layers/attention/(query|key|value|output)/"
GIVEN = {
    "bert lora": ("bert", LoRA(rank=3, where="attention|down", dense="^(class|pool)")),
    "bert dora": ("bert", DoRA(rank=3, where=MAPS, rslora=True, dense="classifier")),
    "bert ia3": ("bert", IA3(dense=("classifier", "attention/norm"))),
    "bert biases": ("bert", LoRA(rank=2, where=MAPS, dense=("bias$", "^classifier"))),
    "bert shira": ("bert", Sparse(density=0.1, where=SIFT, dense="^classifier")),
    "bert supertuning": ("bert", Sparse(density=0.1, where="down|norm|class|up")),
    "distilbert lora": ("distilbert", LoRA(rank=2, where=MAPS, dense="^classifier")),
    "modernbert lora": ("modernbert", LoRA(rank=2, where="query|mlp", dense="^class")),
    "llama lora": ("llama", LoRA(rank=2, alpha=3.0, where="attention|mlp")),
    "llama table": ("llama", LoRA(rank=2, where=MAPS, dense="embeddings/word")),
    "llama prefix": ("llama", Prefix(length=5)),
    "llama shira": ("llama", Sparse(density=0.1, where="attention/.*kernel|mlp/down")),
    "llama supertuning": ("llama", Sparse(density=0.05, where="kernel$")),
    "untied supertuning": ("untied", Sparse(density=0.1, where="lm_head|attention")),
    "gpt2 lora": ("gpt2", LoRA(rank=2, where="attention|mlp/up")),
    "gpt2 part": ("gpt2", LoRA(rank=2, where=MAPS, rslora=True, alpha=5.0)),
    "gpt2 dora": ("gpt2", DoRA(rank=2, where="attention/(query|key|value)")),
    "gpt2 ia3": ("gpt2", IA3()),
    "phi3 lora": ("phi3", LoRA(rank=2, where="attention/(key|output)|mlp")),
    "phi3 ia3": ("phi3", IA3()),
    "phi3 prefix": ("phi3", Prefix(length=3)),
}


def quick(cases, *others):
    """Returns cases, of which those that say little beside the others are slow."""
    slow = lambda case: [pytest.mark.slow] if case in others else []
    return [pytest.param(case, marks=slow(case)) for case in cases]


@pytest.mark.parametrize(
    "case", quick(GIVEN, "gpt2 part", "gpt2 ia3", "llama lora", "phi3 ia3")
)
@pytest.mark.quick(3)
def test_what_was_trained_here_gives_the_same_logits_in_peft(case, pairs, tmp_path):
    from peft import PeftModel

    name, method = GIVEN[case]
    pair = pairs(name)
    adapter = trained(method, pair.params)
    sparse = "supertuning" if "supertuning" in case else "shira"
    save_peft(tmp_path, adapter, pair.model, sparse=sparse, params=pair.params)
    theirs = PeftModel.from_pretrained(pair.base(), tmp_path)
    before, after = pair.logits_here(pair.params), pair.adapted(adapter)
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(pair.logits_there(theirs), after, rtol=0, atol=1e-5)
    back = load_peft(tmp_path, pair.model, pair.params)
    np.testing.assert_allclose(pair.adapted(back), after, rtol=0, atol=1e-5)


def peft_model(pair, config):
    """Returns a model of PEFT that might have been trained."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(pair.base(), config).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if leaf.requires_grad and "original_module" not in name:
                leaf.add_(0.1 * torch.randn_like(leaf))
    return model


def taken(name, kind, task=None, **options):
    return name, kind, {"task_type": task, **options}


QV = ["q_proj", "v_proj"]
CLS = partial(taken, "bert", task="SEQ_CLS")
TAKEN = {
    "bert lora": CLS("LoraConfig", r=3, lora_alpha=5, target_modules=["key", "dense"]),
    "bert rslora": CLS("LoraConfig", r=3, use_rslora=True, target_modules=["key"]),
    "bert bias all": CLS("LoraConfig", r=2, bias="all", target_modules=["query"]),
    "bert bias own": CLS("LoraConfig", r=2, bias="lora_only", target_modules=["query"]),
    "bert dora": CLS("LoraConfig", r=2, use_dora=True, target_modules=["query"]),
    "bert dora in one layer": CLS(
        "LoraConfig", r=2, use_dora=True, target_modules=["query"],
        layers_to_transform=[1],
    ),
    "bert patterns": CLS(
        "LoraConfig", r=2, target_modules=["query", "value", "intermediate.dense"],
        rank_pattern={"layer.1.attention.self.query": 4, "value": 1},
        alpha_pattern={"value": 7}, use_rslora=True,
    ),
    "bert ia3": CLS(
        "IA3Config", target_modules=["key", "output.dense"],
        feedforward_modules=["output.dense"],
    ),
    "bert shira": CLS("ShiraConfig", r=2, target_modules=["query", "output.dense"]),
    "bert supertuning": CLS(
        "SupertuningConfig", sparsity=0.9, target_modules=["value", "dense"]
    ),
    "distilbert lora": taken(
        "distilbert", "LoraConfig", "SEQ_CLS", r=2, target_modules=["q_lin", "lin2"]
    ),
    "modernbert lora": taken(
        "modernbert", "LoraConfig", "SEQ_CLS", r=2, target_modules=["Wqkv", "Wi", "Wo"]
    ),
    "llama lora": taken(
        "llama", "LoraConfig", "CAUSAL_LM", r=2, target_modules=[*QV, "down_proj"],
        layers_to_transform=[0],
    ),
    "llama shira": taken("llama", "ShiraConfig", "CAUSAL_LM", r=2, target_modules=QV),
    "llama supertuning": taken(
        "llama", "SupertuningConfig", "CAUSAL_LM", sparsity=0.93,
        target_modules=["q_proj", "k_proj", "down_proj"],
    ),
    "llama prefix": taken(
        "llama", "PrefixTuningConfig", "CAUSAL_LM", num_virtual_tokens=4
    ),
    "untied shira": taken("untied", "ShiraConfig", r=1, target_modules=["lm_head"]),
    "untied lora": taken(
        "untied", "LoraConfig", "CAUSAL_LM", r=2, target_modules=["lm_head", "q_proj"],
        bias="all", modules_to_save=["embed_tokens"],
    ),
    "gpt2 lora": taken(
        "gpt2", "LoraConfig", "CAUSAL_LM", r=2, target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
    ),
    "phi3 lora": taken(
        "phi3", "LoraConfig", "CAUSAL_LM", r=2,
        target_modules=["qkv_proj", "gate_up_proj", "down_proj"],
    ),
    "gpt2 dora": taken(
        "gpt2", "LoraConfig", "CAUSAL_LM", r=2, target_modules=["c_attn"],
        use_dora=True, fan_in_fan_out=True,
    ),
    "gpt2 ia3": taken("gpt2", "IA3Config", "CAUSAL_LM"),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", quick(TAKEN, "bert rslora", "gpt2 dora", "bert dora", "phi3 lora")
)
@pytest.mark.quick(3)
def test_what_peft_trained_gives_the_same_logits_here(case, pairs, tmp_path):
    import peft

    name, kind, options = TAKEN[case]
    pair = pairs(name)
    theirs = peft_model(pair, getattr(peft, kind)(**options))
    theirs.save_pretrained(tmp_path)
    adapter = load_peft(tmp_path, pair.model, pair.params)
    expected = pair.logits_there(theirs)
    assert np.abs(expected - pair.logits_there(pair.theirs)).max() > 0.01
    np.testing.assert_allclose(pair.adapted(adapter), expected, rtol=0, atol=1e-5)
    if kind != "PrefixTuningConfig":
        merged = pair.logits_here(merge_adapter(pair.params, adapter))
        np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sparse", ["shira", "supertuning"])
def test_merged_weights_in_bfloat16_are_equal_to_the_bit(sparse, pairs, tmp_path):
    import torch
    from peft import PeftModel

    pair = pairs("llama", "bfloat16")
    method = Sparse(density=0.1, where="attention/.*kernel|mlp/(up|down)")
    adapter = trained(method, pair.params)
    # Super-Tuning adds in bfloat16: exact where a value changes by less than half.
    rng = np.random.default_rng(3)
    for leaf, support in adapter.support.items():
        array = pair.params
        for key in leaf.split("/"):
            array = array[key]
        rows = np.asarray(array).reshape(len(support), -1)
        old = np.take_along_axis(rows, support, -1)
        factor = rng.uniform(0.6, 1.6, old.shape).astype(np.float32)
        adapter.values[leaf] = (old * factor).astype(old.dtype)
    save_peft(tmp_path, adapter, pair.model, sparse=sparse, params=pair.params)
    theirs = PeftModel.from_pretrained(pair.base(), tmp_path).merge_and_unload()
    theirs.save_pretrained(tmp_path / "merged")
    _, there = from_pretrained(tmp_path / "merged", head=CausalLM, dtype=jnp.bfloat16)
    here = merge_adapter(pair.params, adapter)
    back = merge_adapter(pair.params, load_peft(tmp_path, pair.model, pair.params))
    for one, two, three in zip(*map(jax.tree.leaves, (here, there, back)), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    assert theirs.dtype == torch.bfloat16


def test_what_peft_merges_in_bfloat16_is_read_to_the_bit(pairs, tmp_path):
    import torch
    from peft import ShiraConfig

    pair = pairs("llama", "bfloat16")
    theirs = peft_model(pair, ShiraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    theirs.save_pretrained(tmp_path)
    merged = merge_adapter(pair.params, load_peft(tmp_path, pair.model, pair.params))
    expected = theirs.merge_and_unload().model.layers[1].mlp.up_proj.weight
    found = np.asarray(merged["layers"]["mlp"]["up"]["kernel"][1], np.float32)
    np.testing.assert_array_equal(found.T, expected.detach().float().numpy())
    assert expected.dtype == torch.bfloat16


def test_entries_that_peft_rounds_are_told(pairs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sparse_jax"), "propagate", True)
    pair = pairs("llama", "bfloat16")
    leaf, support = "layers/mlp/up/kernel", np.array([[3], [4]], np.int32)
    values = {leaf: np.full((2, 1), 1e-3, jnp.bfloat16)}
    adapter = Adapter(support={leaf: support}, values=values)
    options = {"params": pair.params, "sparse": "supertuning"}
    save_peft(tmp_path, adapter, pair.model, **options)
    assert "2 entries differ from the trained ones in their last digits" in caplog.text


@pytest.mark.parametrize("sparse", ["shira", "supertuning"])
def test_an_entry_has_its_row_and_column_in_pytorch(sparse, pairs, tmp_path):
    """The kernel of `mlp/down` is (20, 24) here and (24, 20) there."""
    pair = pairs("llama")
    leaf = "layers/mlp/down/kernel"
    # Input 3 and output 5; input 19 and output 23.
    support = {leaf: np.array([[3 * 24 + 5], [19 * 24 + 23]], np.int32)}
    adapter = Adapter(support=support, values={leaf: np.ones((2, 1), np.float32)})
    save_peft(tmp_path, adapter, pair.model, sparse=sparse, params=pair.params)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for layer, (row, column) in enumerate([(5, 3), (23, 19)]):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        if sparse == "shira":
            # One rank: 24 + 20 entries, of which one is not zero.
            (at,) = np.flatnonzero(tensors[f"{name}.shira_weight"])
            assert tensors[f"{name}.shira_indices"][:, at].tolist() == [row, column]
            assert tensors[f"{name}.shira_weight"].shape == (44,)
        else:
            indices = tensors[f"{name}.supertuning_indices"]
            assert indices.tolist() == [row * 20 + column]
    back = load_peft(tmp_path, pair.model, pair.params)
    for layer, position in enumerate(support[leaf][:, 0]):
        assert position in back.support[leaf][layer]


def test_padded_entries_have_the_values_of_the_base(pairs, tmp_path):
    from peft import ShiraConfig

    pair = pairs("llama")
    # 2 * (24 + 16) of 384 entries, and 2 * (24 + 8) of 192: a third in the second.
    peft_model(
        pair, ShiraConfig(r=2, target_modules=["q_proj", "v_proj"])
    ).save_pretrained(tmp_path)
    adapter = load_peft(tmp_path, pair.model, pair.params)
    assert adapter.method == Sparse(
        density=64 / 192,
        where=("^layers/attention/query/kernel$", "^layers/attention/value/kernel$"),
    )
    assert adapter.support["layers/attention/query/kernel"].shape == (2, 128)
    base = np.asarray(pair.params["layers"]["attention"]["query"]["kernel"])
    old = np.take_along_axis(
        base.reshape(2, -1), adapter.support["layers/attention/query/kernel"], -1
    )
    same = adapter.values["layers/attention/query/kernel"] == old
    assert same.sum(axis=1).tolist() == [48, 48]


def test_ranks_and_scales_that_differ_are_one_method(pairs, tmp_path):
    from peft import LoraConfig

    pair = pairs("bert")
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["query", "value"],
        rank_pattern={"layer.0.attention.self.query": 5},
        alpha_pattern={"layer.0.attention.self.query": 2},
    )  # fmt: skip
    peft_model(pair, config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    adapter = load_peft(tmp_path, pair.model)
    # Scales: 4 / 2 three times, and once 2 / 5.
    assert (adapter.method.rank, adapter.method.scale) == (5, 2.0)
    value, query = adapter.added["attention/value"], adapter.added["attention/query"]
    assert not value["a"][:, :, 2:].any() and not value["b"][:, 2:].any()
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    np.testing.assert_allclose(query["b"][0], tensors[name].T * 0.2, rtol=1e-6)


# What is done to a folder of LoRA on query and value -> the message
def options(**changed):
    return lambda folder: rewrite(folder, **changed)


def tensors(change):
    return lambda folder: rewrite(folder, change)


A0 = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def moved(name):
    return tensors(lambda found: found.update({name: found.pop(A0)}))


def more(name):
    return tensors(lambda found: found.update({name: found[A0].copy()}))


REFUSED = {
    "another type": (options(peft_type="ADALORA"), "`peft_type` .* 'ADALORA'"),
    "no type": (options(peft_type=None), "`peft_type` .* None"),
    "lora_bias": (options(lora_bias=True), "`lora_bias` .* left out"),
    "an option to come": (options(warp_factor=9), "`warp_factor` .* left out"),
    "tokens": (options(trainable_token_indices=[1]), "`trainable_token_indices`"),
    "replicated layers": (options(layer_replication=[[0, 2]]), "`layer_replication`"),
    "pissa": (options(init_lora_weights="pissa"), "`init_lora_weights` .* 'pissa'"),
    "a bias": (options(bias="some"), "`bias` .* none, all or lora_only, got 'some'"),
    "a rank of text": (options(r="4"), "`r` .* a number, got '4'"),
    "another rank": (options(r=4), r"query` must have an array of shape \[4, 16\]"),
    "alpha": (
        options(lora_alpha=-1),
        "`lora_alpha` .* must be positive and below 1e9, got -1",
    ),
    "a pattern": (options(rank_pattern={"(": 2}), "`rank_pattern` .* regular expr"),
    "dora without lengths": (options(use_dora=True), "lora_magnitude_vector"),
    "a target": (options(target_modules=["query", "key"]), r"tensors of .*self\.key"),
    "a module": (moved("base_model.model.h.0.c.lora_A.weight"), "no such module"),
    "a table": (more("base_model.model.x.lora_embedding_A"), "what is understood"),
    "a half": (tensors(lambda found: found.pop(A0)), "must have .*lora_A.weight"),
    "a tensor": (more("base_model.model.more.weight"), "understood here, got more"),
    "a copy alone": (
        more("base_model.model.bert.pooler.modules_to_save.default.dense.weight"),
        "understood here, got bert.pooler.modules_to_save",
    ),
    "numbers": (tensors(lambda found: found[A0].fill(np.nan)), "must be finite"),
    "a pickle": (pickled, "only the pickle adapter_model.bin; loading a pickle runs"),
    "a truncated file": (truncated, "must be a complete safetensors file"),
    "no object": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "must be a JSON object: got list",
    ),
    "no folder": (lambda folder: (folder / "adapter_config.json").unlink(), "`folder`"),
}


@pytest.fixture(scope="module")
def lora_folder(pairs, tmp_path_factory):
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("lora")
    config = LoraConfig(r=2, target_modules=["query", "value"])
    peft_model(pairs("bert"), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case, pairs, lora_folder, tmp_path):
    damage, message = REFUSED[case]
    folder = tmp_path / "folder"
    shutil.copytree(lora_folder, folder)
    load_peft(folder, pairs("bert").model)
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_peft(folder, pairs("bert").model)


def repeated(found):
    found[f"{Q0}.shira_indices"][:, 1] = found[f"{Q0}.shira_indices"][:, 0]


def outside(found):
    found[f"{Q0}.shira_indices"][0, 0] = 16


def fewer(found):
    found[f"{Q0}.shira_indices"] = found[f"{Q0}.shira_indices"][:, 1:].copy()


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
INDICES = {
    "repeated": (repeated, "must name every entry once, got row"),
    "outside": (outside, r"must lie in the weight \[16, 24\], got row 16"),
    "fewer": (fewer, "as many as `shira_weight` has"),
    "absent": (lambda found: found.pop(f"{Q0}.shira_indices"), "shira_indices"),
    "numbers": (lambda found: found[f"{Q0}.shira_weight"].fill(np.inf), "be finite"),
}


@pytest.mark.parametrize("case", INDICES)
def test_indices_that_are_wrong_are_refused(case, pairs, tmp_path):
    from peft import ShiraConfig

    pair, (change, message) = pairs("llama"), INDICES[case]
    theirs = peft_model(pair, ShiraConfig(r=1, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="`params` must be the parameters of the base"):
        load_peft(tmp_path, pair.model)
    rewrite(tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_peft(tmp_path, pair.model, pair.params)


UNWRITTEN = {
    "no base": ("llama", Sparse(density=0.1, where="up"), {"params": None}, "`params`"),
    "a table": ("llama", Sparse(density=0.1, where="word|up"), {}, "`embeddings/word"),
    "Conv1D": ("gpt2", Sparse(density=0.1, where="mlp/up/kernel"), {}, "`layers/mlp"),
    "fused": ("gpt2", Sparse(density=0.1, where="query/kernel"), {}, "attention/query"),
    "a norm alone": ("llama", Sparse(density=0.5, where="norm"), {}, "a linear map"),
    "most of a kernel": (
        "llama", Sparse(density=0.9, where="attention/(query|key)"), {}, "'supertuning'"
    ),
    "a prefix and positions": ("gpt2", Prefix(length=3), {}, "rotary positions"),
    "a prefix of an encoder": ("bert", Prefix(length=3), {}, "rotary positions"),
    "a prefix and windows": ("phi3", Prefix(length=12), {}, "windows longer than a p"),
    "a format": ("llama", Sparse(density=0.1, where="up"), {"sparse": "x"}, "`sparse`"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNWRITTEN)
def test_what_peft_has_no_place_for_is_refused_by_name(case, pairs, tmp_path):
    name, method, options, message = UNWRITTEN[case]
    pair = pairs(name)
    options = {"params": pair.params, **options}
    with pytest.raises(InputError, match=message):
        save_peft(tmp_path / "new", trained(method, pair.params), pair.model, **options)
    assert not (tmp_path / "new").exists()


def test_a_head_that_is_tied_is_not_trained_alone(pairs, tmp_path):
    from peft import LoraConfig

    pair = pairs("llama")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft_model(pair, config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="`modules_to_save` .* as they are one"):
        load_peft(tmp_path, pair.model)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Returns a folder with a base, data, and an adapter here and in PEFT."""
    folder = tmp_path_factory.mktemp("task")
    write_model(folder / "base")
    write_data(folder / "data")
    labels = ("negative", "positive")
    model, params = from_pretrained(
        folder / "base", labels=labels, key=jax.random.key(0)
    )
    method = LoRA(rank=2, where=MAPS, dense=("^classifier", "^pooler"))
    about = {
        "base_model": str(folder / "base"),
        "base_hash": base_hash(folder / "base"),
    }
    adapter = replace(
        trained(method, params), **about, labels=labels, task="sst2",
        settings={"dtype": "float32", "max_length": 16},
    )  # fmt: skip
    save_adapter(folder / "adapter.safetensors", adapter)
    save_peft(folder / "peft", adapter, model)
    save_peft(folder / "foreign", replace(adapter, labels=(), task=""), model)
    return folder


def test_a_folder_of_peft_is_evaluated_as_an_adapter(task):
    options = {"data": str(task / "data"), "max_length": 16}
    expected = evaluate_adapter(task / "adapter.safetensors", **options)
    assert evaluate_adapter(task / "peft", **options) == expected


def test_labels_that_peft_does_not_name_are_those_of_the_task(
    task, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("sparse_jax"), "propagate", True)
    options = {"data": str(task / "data"), "max_length": 16}
    expected = evaluate_adapter(task / "adapter.safetensors", **options)
    base = str(task / "base")
    found = evaluate_adapter(task / "foreign", model=base, task="sst2", **options)
    assert found == expected
    assert "the adapter does not name its labels" in caplog.text
    assert "are taken as negative, positive" in caplog.text
    with pytest.raises(InputError, match="`task` .* got entailment, neutral"):
        evaluate_adapter(task / "foreign", model=base, task="mnli", **options)
    with pytest.raises(
        InputError, match="`task` must be given for an adapter that names"
    ):
        evaluate_adapter(task / "foreign", model=base, **options)


def test_labels_of_ones_own_are_named_in_the_order_of_the_outputs(task, tmp_path):
    (tmp_path / "own").mkdir()
    for path in (task / "data").iterdir():
        text = path.read_text().replace('"sentence"', '"text"')
        text = text.replace(": 0}", ': "bad"}').replace(": 1}", ': "good"}')
        (tmp_path / "own" / path.name).write_text(text)
    options = {"data": str(tmp_path / "own"), "max_length": 16}
    expected = evaluate_adapter(task / "peft", data=str(task / "data"), max_length=16)
    options |= {"model": str(task / "base"), "task": "classification"}
    evaluate = lambda *labels: evaluate_adapter(
        task / "foreign", labels=labels, **options
    )
    assert {**expected, **evaluate("bad", "good")}.items() >= expected.items()
    wrong = evaluate("good", "bad")["accuracy"]
    assert wrong == pytest.approx(1 - expected["accuracy"])
    with pytest.raises(InputError, match="got bad, good. Pass them as `labels`, in"):
        evaluate()
    with pytest.raises(InputError, match="must be 2 different names, one for each"):
        evaluate("bad")
    with pytest.raises(InputError, match="must be left out for an .* negative, pos"):
        evaluate_adapter(task / "peft", labels=("a", "b"), **options)


def test_another_base_than_the_one_that_peft_names_is_told(
    task, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("sparse_jax"), "propagate", True)
    shutil.copytree(task / "foreign", tmp_path / "peft")
    rewrite(tmp_path / "peft", change=lambda tensors: None)
    open_adapter(tmp_path / "peft", task / "base", "sst2")
    assert "make sure" not in caplog.text
    rewrite(tmp_path / "peft", base_model_name_or_path="me/base")
    open_adapter(tmp_path / "peft", task / "base", "sst2")
    assert "was trained on 'me/base' and is applied to " in caplog.text
    assert "PEFT records no hash of the weights: make sure that" in caplog.text


def test_a_base_from_the_hub_keeps_its_id(task, tmp_path, monkeypatch):
    shutil.copytree(task / "peft", tmp_path / "peft")
    rewrite(tmp_path / "peft", base_model_name_or_path="me/base")
    place = "sparse_jax.interchange.open_adapter.cached_folder"
    monkeypatch.setattr(place, {"me/base": task / "base"}.__getitem__)
    assert open_adapter(tmp_path / "peft").base_model == "me/base"


@pytest.mark.parametrize("word", ["sst2", "classification"])
def test_labels_without_a_task_are_those_of_the_head(word, task, tmp_path):
    model, params = from_pretrained(
        task / "base", labels=("positive", "negative"), key=jax.random.key(0)
    )
    save_pretrained(model, params, tmp_path / "base")
    adapter = trained(LoRA(rank=2, where=MAPS, dense="^classifier"), params)
    adapter = replace(adapter, labels=("negative", "positive"))
    save_peft(tmp_path / "peft", adapter, model)
    found = open_adapter(tmp_path / "peft", tmp_path / "base", word)
    assert found.labels == adapter.labels
    for leaf, array in adapter.dense.items():
        np.testing.assert_array_equal(found.dense[leaf], array)


def test_entries_of_a_head_go_to_the_labels_of_the_task(task, tmp_path):
    from peft import ShiraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    key, tokens = jax.random.key(0), jnp.array([[2, 5, 6, 3]])
    batch = {"input_ids": tokens, "attention_mask": jnp.ones_like(tokens)}
    names = ("positive", "negative")
    model, params = from_pretrained(task / "base", labels=names, key=key)
    save_pretrained(model, params, tmp_path / "base")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    theirs = get_peft_model(theirs, ShiraConfig(r=1, target_modules=["classifier"]))
    for name, leaf in theirs.named_parameters():
        if "shira" in name:
            leaf.data += 0.1 + leaf.new_tensor(range(leaf.numel()))
    theirs.save_pretrained(tmp_path / "peft")
    found = load_peft(tmp_path / "peft", model, params)
    expected = model(merge_adapter(params, found), batch)
    adapter = open_adapter(tmp_path / "peft", tmp_path / "base", "sst2")
    model, params = from_pretrained(tmp_path / "base", labels=adapter.labels)
    ours = model(merge_adapter(params, adapter), batch)
    np.testing.assert_allclose(ours, expected[:, ::-1], rtol=0, atol=1e-5)


def test_a_folder_of_peft_writes_texts(tmp_path):
    write_decoder(tmp_path / "base")
    model, params = from_pretrained(tmp_path / "base", head=CausalLM)
    adapter = trained(LoRA(rank=2, where="attention"), params)
    about = {"base_model": str(tmp_path / "base")}
    digest = base_hash(tmp_path / "base")
    save_adapter(tmp_path / "a", replace(adapter, **about, base_hash=digest))
    save_peft(tmp_path / "peft", replace(adapter, **about), model)
    texts = []
    for path in ("a", "peft"):
        writer = load_writer(None, tmp_path / path)
        prompt = [text_tokens("a good", writer.tokenizer)]
        texts += writer.write(prompt, choice=Greedy(), max_new_tokens=6)
    assert texts[0] == texts[1]

"""Adapters that go to the real PEFT and come from it: logits, layouts, refusals."""

import copy
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparse_jax import (
    IA3,
    Adapter,
    CausalLM,
    DoRA,
    LoRA,
    Prefix,
    Sparse,
    apply_adapter,
    from_pretrained,
    load_peft,
    merge_adapter,
    save_peft,
)
from sparse_jax.models.heads import SequenceClassifier
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
GPT2 = {**SHAPE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
MODELS = {
    "bert": ("bert", ENCODER),
    "llama": ("llama", LLAMA),
    "gpt2": ("gpt2", GPT2),
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
        is_encoder = name == "bert"
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
    "llama lora": ("llama", LoRA(rank=2, alpha=3.0, where="attention|mlp")),
    "llama table": ("llama", LoRA(rank=2, where=MAPS, dense="embeddings/word")),
    "llama prefix": ("llama", Prefix(length=5)),
    "llama shira": ("llama", Sparse(density=0.1, where="attention/.*kernel|mlp/down")),
    "llama supertuning": ("llama", Sparse(density=0.05, where="kernel$")),
    "gpt2 lora": ("gpt2", LoRA(rank=2, where="attention|mlp/up")),
    "gpt2 part": ("gpt2", LoRA(rank=2, where=MAPS, rslora=True, alpha=5.0)),
    "gpt2 dora": ("gpt2", DoRA(rank=2, where="attention/(query|key|value)")),
    "gpt2 ia3": ("gpt2", IA3()),
}


@pytest.mark.parametrize("case", GIVEN)
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
    "gpt2 lora": taken(
        "gpt2", "LoraConfig", "CAUSAL_LM", r=2, target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
    ),
    "gpt2 dora": taken(
        "gpt2", "LoraConfig", "CAUSAL_LM", r=2, target_modules=["c_attn"],
        use_dora=True, fan_in_fan_out=True,
    ),
    "gpt2 ia3": taken("gpt2", "IA3Config", "CAUSAL_LM"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
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

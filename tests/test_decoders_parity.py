"""Decoders give the logits of PyTorch, both ways, on tiny random models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import batch_of, padded, random_model, torch_logits

from sparse_jax import from_pretrained, generate, save_pretrained
from sparse_jax.errors import InputError
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.family import GATED
from sparse_jax.models.heads import MaskedLM
from sparse_jax.models.hf.pretrained import base_config
from sparse_jax.models.hf.read_config import read_config

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SLIDING = "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
GEMMA2 = {
    "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 7,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
}  # fmt: skip
GEMMA3 = {
    "num_hidden_layers": 3, "head_dim": 12, "sliding_window": 5,
    "query_pre_attn_scalar": 7, "layer_types": [SLIDING, "full_attention", SLIDING],
    "rope_parameters": {
        "full_attention": LINEAR,
        SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    },
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
ALTERNATING = ["full_attention", SLIDING]
PROMPTS = [
    "The capital of France is", "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n", "The three laws of thermodynamics are:\n1.",
    "Recipe for apple pie. Ingredients:",
]  # fmt: skip
CASES = {
    "llama": ("llama", {}),
    "llama, one head a group": ("llama", {"num_key_value_heads": 4}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2, a window": ("qwen2", WINDOW | {"max_window_layers": 1, "head_dim": 12}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3, windows": ("qwen3", WINDOW | {"layer_types": [SLIDING, "full_attention"]}),
    "gemma": ("gemma", {"head_dim": 12}),
    "gemma 2": ("gemma2", GEMMA2),
    "gemma 3": ("gemma3_text", GEMMA3),
    "phi3": ("phi3", {"rope_parameters": PARTIAL, "sliding_window": 5, "head_dim": 12}),
    "smollm3": ("smollm3", {"no_rope_layers": [0, 1]}),
    "ministral": (
        "ministral",
        {"sliding_window": 5, "layer_types": ALTERNATING, "head_dim": 12},
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def torch_model(case, folder):
    """Writes a tiny PyTorch model and returns it."""
    family, changes = CASES[case]
    return random_model(family, {**SIZES, **changes}, folder)


@every_case
@pytest.mark.quick(3)
def test_logits_equal_those_of_pytorch(case, tmp_path):
    theirs = torch_model(case, tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM)
    logits = jax.jit(model)
    for side in ("left", "right"):
        ids, mask = padded(side)
        ours = np.array(logits(params, batch_of(ids, mask)))
        expected = torch_logits(theirs, ids, mask)
        is_token = mask.astype(bool)
        np.testing.assert_allclose(
            ours[is_token], expected[is_token], rtol=0, atol=1e-4
        )


@every_case
def test_pytorch_reads_what_is_saved(case, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = torch_model(case, tmp_path / "theirs")
    model, params = from_pretrained(tmp_path / "theirs", head=CausalLM)
    save_pretrained(model, params, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    again.config._attn_implementation = "eager"
    ids, mask = padded("left")
    np.testing.assert_array_equal(
        torch_logits(again.eval(), ids, mask), torch_logits(theirs, ids, mask)
    )
    assert from_pretrained(tmp_path / "ours", head=CausalLM)[0] == model
    # As a run compares it with what its adapter has.
    about = base_config(model)
    assert json.loads(json.dumps(about)) == about


CACHED = ("llama 3.1", "mistral", "qwen3", "qwen3, windows", "gemma 3",
          "smollm3")  # fmt: skip


@pytest.mark.parametrize("case", CACHED)
@pytest.mark.quick(1)
def test_reading_on_from_a_cache_equals_reading_at_once(case, tmp_path):
    torch_model(case, tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM)
    ids, mask = padded("left")
    expected = np.array(model(params, batch_of(ids, mask)))
    extend = jax.jit(model.extend)
    cache = model.cache(params, 3, 16)
    hidden, cache = extend(params, batch_of(ids[:, :8], mask[:, :8]), cache)
    found = [hidden]
    for column in range(8, 11):
        part = batch_of(ids[:, [column]], mask[:, [column]])
        hidden, cache = extend(params, part, cache)
        found.append(hidden)
    logits = np.array(model.logits(params, jnp.concatenate(found, axis=1)))
    is_token = mask.astype(bool)
    np.testing.assert_allclose(logits[is_token], expected[is_token], atol=1e-5)
    assert cache.positions.tolist() == [11, 7, 4] and int(cache.length) == 11


@pytest.mark.parametrize("case", ["llama", "gemma 3"])
def test_packed_segments_do_not_see_each_other(case, tmp_path):
    torch_model(case, tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM)
    # The first is longer than the window of Gemma, five tokens.
    ids = np.random.default_rng(1).integers(3, 61, (1, 12))
    alone = [np.array(model(params, batch_of(part, np.ones_like(part))))
             for part in (ids[:, :8], ids[:, 8:])]  # fmt: skip
    batch = batch_of(ids, np.ones_like(ids)) | {
        "segment_ids": jnp.array([[1] * 8 + [2] * 4]),
        "positions": jnp.array([[*range(8), *range(4)]]),
    }
    together = np.array(model(params, batch))
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), atol=1e-5)


@pytest.mark.parametrize("folder", ["babyllama-1m", "tinystories-656k"])
def test_genuine_models_give_the_logits_of_pytorch(folder, shared_data):
    import torch
    from transformers import AutoModelForCausalLM

    path = shared_data / "models" / folder
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model, params = from_pretrained(path, head=CausalLM)
    ids = np.random.default_rng(0).integers(3, 100, (2, 40))
    mask = np.ones_like(ids)
    ours = np.array(model(params, batch_of(ids, mask)))
    np.testing.assert_allclose(ours, torch_logits(theirs, ids, mask), atol=1e-4)


@pytest.mark.slow
def test_gemma_3_270m_writes_the_greedy_text_of_pytorch(shared_data):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_data / "models" / "gemma3-270m"
    if not path.is_dir():
        pytest.skip(f"needs Gemma 3 270M, there is no {path}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, params = from_pretrained(path, head=CausalLM)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    texts = generate(model, params, prompts, max_new_tokens=64)
    rows = [[*one, *text.tolist()] for one, text in zip(prompts, texts, strict=True)]
    # Longer than the window of 512 tokens.
    rows.append([token for row in rows for token in row[1:]] * 2)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    hidden = jax.jit(lambda *args: model.hidden(*args, unroll=1))
    for number, row in enumerate(rows):
        ids = np.array([row])
        expected = torch_logits(theirs, ids, np.ones_like(ids))[0]
        ours = model.logits(params, hidden(params, batch_of(ids, np.ones_like(ids))))
        np.testing.assert_allclose(ours[0], expected, rtol=0, atol=1e-3)
        if number < len(prompts):
            begin = len(prompts[number]) - 1
            assert expected[begin:-1].argmax(-1).tolist() == texts[number].tolist()


def test_a_long_context_needs_no_table(tmp_path):
    torch_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["max_position_embeddings"] = 1_000_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, params = from_pretrained(tmp_path, head=CausalLM)
    ids, mask = padded("right")
    assert model(params, batch_of(ids, mask)).shape == (3, 11, 61)


def test_half_precision_stays_half(tmp_path):
    torch_model("llama", tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM, dtype=jnp.bfloat16)
    ids, mask = padded("right")
    assert model.hidden(params, batch_of(ids, mask)).dtype == jnp.bfloat16
    assert model(params, batch_of(ids, mask)).dtype == jnp.float32


def test_gemma_3_is_read_as_transformers_4_wrote_it(tmp_path):
    torch_model("gemma 3", tmp_path)
    expected = from_pretrained(tmp_path, head=CausalLM)[0]
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        config.pop(name)
    config |= {
        "sliding_window_pattern": 2, "rope_theta": 10000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path, head=CausalLM)[0] == expected
    # Without a file that says so, every sixth layer sees all tokens.
    del config["sliding_window_pattern"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path, head=CausalLM)[0].config.layer_kinds is None


def test_of_heads_with_a_rotary_share_of_no_entry_nothing_turns(tmp_path):
    torch_model("phi3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for share, entries in ((1.0, 12), (0.5, 6), (0.05, 0)):
        config["rope_parameters"]["partial_rotary_factor"] = share
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = read_config(tmp_path)[1]
        assert found.turned_size == entries
        where = jnp.arange(3)[None]
        turn = GATED.position_info(found, found.kinds[0], where, where)
        assert turn.cos.shape == (1, 3, 1, entries // 2)


def test_a_rope_that_we_lack_is_named(tmp_path):
    torch_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="`rope_type` in .* default, linear, llama3, "):
        from_pretrained(tmp_path, head=CausalLM)


def test_a_head_that_a_decoder_lacks_is_named(tmp_path):
    torch_model("llama", tmp_path)
    message = "`head` must be one of CausalLM, SequenceClassifier for the"
    with pytest.raises(InputError, match=message):
        from_pretrained(tmp_path, head=MaskedLM)


CLASSIFIERS = {
    **{name: (name, SIZES) for name in ("llama", "gemma3_text", "phi3")},
    "gpt2": ("gpt2", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bloom": ("bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 2,
                        "n_head": 4}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "side"), [("llama", "left"), *((case, "right") for case in CLASSIFIERS)]
)
@pytest.mark.quick(1)
def test_classifiers_equal_those_of_pytorch_both_ways(case, side, tmp_path):
    from transformers import AutoModelForSequenceClassification

    family, fields = CLASSIFIERS[case]
    labels = {"pad_token_id": 0, "id2label": {0: "a", 1: "b", 2: "c"}}
    kind = "SequenceClassification"
    theirs = random_model(family, {**fields, **labels}, tmp_path / "theirs", kind)
    model, params = from_pretrained(tmp_path / "theirs")
    assert model.config.label_names == ("a", "b", "c")
    ids, mask = padded(side)
    ids[0, -1] = 0  # a text that ends in the token that pads
    ours = np.array(model(params, batch_of(ids, mask), unroll=1))
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    save_pretrained(model, params, tmp_path / "ours")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    again.config._attn_implementation = "eager"
    np.testing.assert_array_equal(torch_logits(again.eval(), ids, mask), expected)
    assert from_pretrained(tmp_path / "ours")[0] == model


@pytest.mark.parametrize("is_truncated", [False, True])
def test_a_shard_that_is_missing_or_cut_is_named(is_truncated, tmp_path):
    torch_model("llama", tmp_path).save_pretrained(tmp_path, max_shard_size="20kB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    from_pretrained(tmp_path, head=CausalLM)
    shard = sorted(tmp_path.glob("model-00002*"))[0]
    if is_truncated:
        shard.write_bytes(shard.read_bytes()[:-10])
    else:
        shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        from_pretrained(tmp_path, head=CausalLM)

"""GPT-2, GPT-J and BLOOM give the logits of PyTorch, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from tiny_decoders import batch_of, padded, random_model, torch_logits

from sparse_jax import (
    Adapter,
    Compact,
    Layerwise,
    LoRA,
    Prefix,
    Uniform,
    from_pretrained,
    save_pretrained,
)
from sparse_jax.errors import InputError
from sparse_jax.interchange.peft_save import save_peft
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.position_embeddings import slopes

SIZES = {
    "vocab_size": 61, "n_layer": 2, "n_head": 4, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {**SIZES, "n_embd": 32, "n_positions": 64}
CASES = {
    "gpt2": ("gpt2", GPT),
    "gpt2, narrow": ("gpt2", {**GPT, "n_inner": 48, "tie_word_embeddings": False}),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "gptj, whole heads": ("gptj", {**GPT, "rotary_dim": 8}),
    "bloom": ("bloom", {**SIZES, "hidden_size": 32}),
    "bloom, 3 heads": ("bloom", {**SIZES, "hidden_size": 24, "n_head": 3}),
    "bloom, 6 heads": ("bloom", {**SIZES, "hidden_size": 24, "n_head": 6}),
}
every_case = pytest.mark.parametrize("case", CASES)
every_family = pytest.mark.parametrize("case", ["gpt2", "gptj", "bloom"])
SITES = {"attention/query", "attention/key", "attention/value", "attention/output",
         "attention/norm", "attention/memory", "mlp/up", "mlp/down"}  # fmt: skip


def torch_model(case, folder):
    family, fields = CASES[case]
    return random_model(family, fields, folder)


@every_case
@pytest.mark.quick(1)
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
    saved, had = (
        load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")
    )
    for name, tensor in had.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)


@pytest.mark.parametrize("case", ["gpt2", "gptj", "bloom, 3 heads"])
@pytest.mark.quick(1)
def test_reading_on_from_a_cache_equals_reading_at_once(case, tmp_path):
    torch_model(case, tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM)
    ids, mask = padded("left")
    expected = np.array(model(params, batch_of(ids, mask)))
    extend = jax.jit(model.extend)
    cache, found = model.cache(params, 3, 16), []
    for columns in (slice(0, 8), [8], [9], [10]):
        part = batch_of(ids[:, columns], mask[:, columns])
        hidden, cache = extend(params, part, cache)
        found.append(hidden)
    logits = np.array(model.logits(params, jnp.concatenate(found, axis=1)))
    is_token = mask.astype(bool)
    np.testing.assert_allclose(logits[is_token], expected[is_token], atol=1e-5)
    assert cache.positions.tolist() == [11, 7, 4] and int(cache.length) == 11


@pytest.mark.parametrize("case", ["gpt2", "bloom"])
def test_packed_segments_do_not_see_each_other(case, tmp_path):
    torch_model(case, tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM)
    ids = np.random.default_rng(1).integers(3, 61, (1, 10))
    alone = [np.array(model(params, batch_of(part, np.ones_like(part))))
             for part in (ids[:, :6], ids[:, 6:])]  # fmt: skip
    batch = batch_of(ids, np.ones_like(ids)) | {
        "segment_ids": jnp.array([[1] * 6 + [2] * 4]),
        "positions": jnp.array([[*range(6), *range(4)]]),
    }
    together = np.array(model(params, batch))
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), atol=1e-5)


@every_family
def test_every_module_with_weights_is_a_site(case, tmp_path):
    torch_model(case, tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM)
    asked = set()

    def response(site, module, x, trained, key):
        asked.add(site)
        return module(x)

    ids, mask = padded("right")
    attachment = Attachment(response=response)
    jax.eval_shape(lambda b: model(params, b, attachment=attachment, unroll=1),
                   batch_of(ids, mask))  # fmt: skip
    assert asked == SITES | ({"mlp/norm"} if case != "gptj" else set())
    owners = {f"{part}/{name}" for part, names in params["layers"].items()
              for name in names}  # fmt: skip
    assert owners == asked - {"attention/memory"}


def test_gpt2_of_the_hub_has_no_prefix(tmp_path):
    theirs = torch_model("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    save_file(bare, path)
    model, params = from_pretrained(tmp_path, head=CausalLM)
    ids, mask = padded("right")
    is_token = mask.astype(bool)
    ours = np.array(model(params, batch_of(ids, mask)))
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(ours[is_token], expected[is_token], atol=1e-4)


@pytest.mark.parametrize(
    ("case", "name", "value"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gptj", "tie_word_embeddings", True),
        ("bloom", "apply_residual_connection_post_layernorm", True),
    ],
)
def test_a_setting_that_we_lack_is_named(case, name, value, tmp_path):
    torch_model(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(InputError, match=f"`{name}` in .* must be False .*, got True"):
        from_pretrained(tmp_path, head=CausalLM)


def test_a_fused_tensor_of_another_shape_is_named(tmp_path):
    torch_model("bloom", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "transformer.h.0.self_attention.query_key_value.weight"
    save_file({**tensors, name: tensors[name][:-1]}, path)
    with pytest.raises(InputError, match=r"must have shape \[96, 32\] .* \[95, 32\]"):
        from_pretrained(tmp_path, head=CausalLM)


def test_slopes_of_six_heads_are_those_of_four_and_two_between():
    assert slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


@every_family
def test_half_precision_stays_half(case, tmp_path):
    torch_model(case, tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM, dtype=jnp.bfloat16)
    shape = lambda f, *args: jax.eval_shape(f, params, *args)
    batch = batch_of(*padded("right"))
    hidden = shape(model.hidden, batch)
    assert hidden.dtype == jnp.bfloat16
    assert shape(model.logits, hidden).dtype == jnp.float32
    cache = jax.eval_shape(lambda: model.cache(params, 3, 16))
    after = shape(model.extend, batch, cache)[1]
    assert after.kept[0].k.dtype == jnp.bfloat16


def test_dropout_needs_a_key_and_changes_the_logits(tmp_path):
    torch_model("gpt2", tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM)
    batch = batch_of(*padded("right"))
    hidden = jax.jit(lambda key: model.hidden(params, batch, key=key, unroll=1))
    without, once, again = (
        hidden(key) for key in (None, jax.random.key(1), jax.random.key(1))
    )
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once, without)


def losses_of(tuner, params, batch):
    """Returns the losses of three steps on one batch."""
    state = jax.jit(tuner.init)(params, jax.random.key(0))
    step = jax.jit(tuner.step)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("gpt2", LoRA(rank=2, where="attention/query")),
        ("bloom", Prefix(length=3)),
    ],
)
@pytest.mark.parametrize("few_layers", [False, True])
@pytest.mark.quick(1)
def test_methods_train_through_the_sites(case, method, few_layers, tmp_path):
    torch_model(case, tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM)

    def loss(params, batch, key, attachment):
        logits = model(params, batch, attachment=attachment, unroll=1)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["input_ids"][:, 1:]
        )
        is_target = batch["attention_mask"][:, 1:]
        return (losses * is_target).sum(), is_target.sum()

    parts = (loss, method, optax.adam(1e-2))
    sampler = Uniform(num_layers=2, num_active=1)
    tuner = Layerwise(*parts, sampler=sampler) if few_layers else Compact(*parts)
    losses = losses_of(tuner, params, batch_of(*padded("right")))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("case", ["gpt2", "bloom"])
def test_entries_of_a_fused_tensor_are_not_written_for_peft(case, tmp_path):
    torch_model(case, tmp_path)
    model, params = from_pretrained(tmp_path, head=CausalLM)
    leaf, support = "layers/attention/query/kernel", np.zeros((2, 1), np.int32)
    values = {leaf: np.ones((2, 1), np.float32)}
    adapter = Adapter(support={leaf: support}, values=values)
    with pytest.raises(InputError, match="of their own .* `layers/attention/query"):
        save_peft(tmp_path / "peft", adapter, model, params=params)
    assert not (tmp_path / "peft").exists()

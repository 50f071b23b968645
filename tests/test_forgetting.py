"""What a fine-tuned model has changed on text that it was not trained on."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_settings, write_files
from tiny_text import WORDS, text_settings, tiny_decoder, write_chats, write_decoder

from sparse_jax import (
    Adapter,
    InputError,
    LoRA,
    apply_adapter,
    evaluate_adapter,
    finetune,
    save_adapter,
)
from sparse_jax.data.conversations import PROMPTS
from sparse_jax.models.hf.pretrained import base_hash
from sparse_jax.training import forgetting


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a folder with a decoder, chats, and a text of 40 words."""
    folder = tmp_path_factory.mktemp("place")
    write_decoder(folder / "model")
    write_chats(folder / "chats.jsonl")
    words = np.random.default_rng(1).choice(WORDS[:7], 40)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def random_adapter(place, params, kind):
    """Returns an adapter of random values."""
    random = np.random.default_rng(2)
    about = {
        "task": "causal",
        "base_hash": base_hash(place / "model"),
        "settings": {"max_length": 16},
    }
    if kind == "lora":
        method = LoRA(rank=2)
        shapes = jax.eval_shape(method.added, params, jax.random.key(0))
        added = jax.tree.map(
            lambda one: random.normal(size=one.shape).astype(np.float32), shapes
        )
        return Adapter(added=added, method=method, **about)
    head = np.asarray(params["lm_head"]["kernel"])
    if kind == "head":
        name = "lm_head/kernel"
        return Adapter(dense={name: 2 * head}, method="combined", **about)
    name, support = "layers/mlp/up/kernel", np.arange(0, 80, 2, dtype=np.int32)
    support = np.stack([support] * 4)
    values = random.normal(size=support.shape).astype(np.float32)
    return Adapter({name: support}, {name: values}, method="combined", **about)


@pytest.mark.parametrize("kind", ["sparse", "lora", "head"])
@pytest.mark.quick(1)
def test_kl_and_losses_are_those_of_all_logits_at_once(place, tmp_path, kind):
    model, params = tiny_decoder()
    adapter = random_adapter(place, params, kind)
    save_adapter(tmp_path / "one.safetensors", adapter)
    found = evaluate_adapter(
        tmp_path / "one.safetensors",
        model=str(place / "model"),
        text=place / "text.txt",
    )
    # 40 words and the end, in windows of 16 that overlap by one token.
    numbers = [WORDS.index(word) for word in (place / "text.txt").read_text().split()]
    ids = np.array([*numbers, 9], np.int32)
    tuned, attachment = apply_adapter(params, adapter)
    sums = np.zeros(3)
    for start in range(0, 40, 15):
        part = jnp.asarray(ids[None, start : start + 16])
        batch = {"input_ids": part, "attention_mask": jnp.ones_like(part)}
        old = jax.nn.log_softmax(model(params, batch)[0, :-1])
        new = jax.nn.log_softmax(model(tuned, batch, attachment=attachment)[0, :-1])
        rows = np.arange(part.size - 1)
        sums[0] += jnp.sum(jnp.exp(old) * (old - new))
        sums[1] -= jnp.sum(new[rows, part[0, 1:]])
        sums[2] -= jnp.sum(old[rows, part[0, 1:]])
    kl, loss, base_loss = sums / 40
    assert kl > 1e-3
    expected = {
        "kl_text": kl,
        "loss_text": loss,
        "perplexity_text": np.exp(loss),
        "base_loss_text": base_loss,
        "base_perplexity_text": np.exp(base_loss),
        "tokens_text": 40,
    }
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_an_encoder_is_compared_by_its_hidden_states(tmp_path):
    files = write_files(tmp_path)
    settings = tiny_settings(**files, output=tmp_path / "run", method="bitfit")
    finetune(settings, max_steps=1)
    text = tmp_path / "text.txt"
    text.write_text("good film\n\na poor book\n", encoding="utf-8")
    options = {"data": str(files["data"]), "text": text}
    found = evaluate_adapter(tmp_path / "run", **options)
    # [CLS] good film [SEP] [CLS] a poor book [SEP]
    assert found["tokens_text"] == 9
    assert 1e-4 < found["drift_text"] < 1
    assert "accuracy" in found


def test_instructions_to_compare_on_are_written_by_the_template_of_the_run(
    place, monkeypatch
):
    base: Any = SimpleNamespace(folder=place / "model", model=tiny_decoder()[0])
    found, load = [], forgetting.load_whole

    def keep(*args, **options):
        found.append(options)
        return load(*args, **options)

    monkeypatch.setattr(forgetting, "load_whole", keep)
    for word in PROMPTS:
        settings = text_settings(place / "model", "d", "o", template=word)
        forgetting.text_batches(place / "text.txt", base, settings)
    assert found == [{"template": template} for template in PROMPTS.values()]


def test_a_file_without_text_is_refused(place, tmp_path):
    _, params = tiny_decoder()
    save_adapter(tmp_path / "a.safetensors", random_adapter(place, params, "sparse"))
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    options = {"model": str(place / "model"), "text": tmp_path / "empty.txt"}
    with pytest.raises(InputError, match="empty.txt` must have examples, got none"):
        evaluate_adapter(tmp_path / "a.safetensors", **options)

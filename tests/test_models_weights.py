"""What a folder's tensors say that its `config.json` does not: all is reported."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_decoders import batch_of, padded, random_model, torch_logits
from tiny_models import FAMILIES, tiny_config, tiny_params
from tiny_text import text_settings, tiny_decoder, write_chats, write_decoder

from sparse_jax import evaluate_adapter, finetune, from_pretrained, save_pretrained
from sparse_jax.adapter.file import load_adapter
from sparse_jax.errors import InputError
from sparse_jax.generation.choice import Greedy
from sparse_jax.generation.writer import load_writer
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import MaskedLM
from sparse_jax.sharding.mesh import MeshShape, make_mesh, mesh_of
from sparse_jax.sharding.placement import load_placed

HEAD, WORDS = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
TINY = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32,
    "initializer_range": 0.2, "tie_word_embeddings": True,
}  # fmt: skip
SMALL_GPT2 = {
    "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
    "initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def rewrite(folder, change):
    """Replaces the tensors of a folder by `change(tensors)`."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with a tiny Llama whose head is its own."""
    save_pretrained(*tiny_decoder(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def encoder(tmp_path):
    """Returns a function that writes a tiny encoder."""

    def write(name, head):
        model = Model(head, FAMILIES[name], tiny_config(name))
        save_pretrained(model, tiny_params(name, head), tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_that_differs_from_the_words_is_not_tied(family, tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    theirs = random_model(family, TINY if family == "llama" else SMALL_GPT2, tmp_path)
    words = theirs.get_input_embeddings().weight.detach().numpy()
    rewrite(tmp_path, lambda tensors: tensors | {HEAD: words[::-1].copy()})
    model, params = from_pretrained(tmp_path, head=CausalLM)
    assert f"`{HEAD}` in `{tmp_path}` differs" in caplog.text
    assert not model.config.tied

    ids, mask = padded("right")
    ours = np.array(model(params, batch_of(ids, mask)))
    untied = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = torch_logits(untied, ids, mask)
    # By hand: the words in reverse order have the logits in reverse order.
    backwards = torch_logits(theirs, ids, mask)[..., ::-1]
    np.testing.assert_allclose(expected, backwards, rtol=0, atol=1e-5)
    is_token = mask.astype(bool)
    np.testing.assert_allclose(ours[is_token], expected[is_token], atol=1e-4)

    save_pretrained(model, params, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(torch_logits(again, ids, mask), expected)
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields["tie_word_embeddings"] is False


def test_an_equal_copy_of_the_words_stays_tied(tmp_path, caplog):
    random_model("llama", TINY, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {HEAD: tensors[WORDS].copy()})
    model, params = from_pretrained(tmp_path, head=CausalLM)
    assert model.config.tied and "lm_head" not in params
    assert not caplog.text


def test_words_that_are_stored_as_the_head_only_are_read(tmp_path):
    random_model("llama", TINY, tmp_path)
    _, expected = from_pretrained(tmp_path, head=CausalLM)
    rewrite(tmp_path, lambda tensors: tensors | {HEAD: tensors.pop(WORDS)})
    _, params = from_pretrained(tmp_path, head=CausalLM)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_head_of_its_own_is_not_taken_for_the_words(folder):
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != WORDS})
    with pytest.raises(InputError, match=f"`{WORDS}` for `embeddings/word/embedding`"):
        from_pretrained(folder, head=CausalLM)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [("bert", "cls.predictions.decoder"), ("roberta", "lm_head.decoder")],
)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_masked_head_that_is_not_tied_is_refused(name, decoder, kind, encoder):
    path = encoder(name, MaskedLM)
    word = f"{name}.embeddings.word_embeddings.weight"
    bias = decoder.replace(".decoder", ".bias")
    copy = {"weight": word, "bias": bias}[kind]
    _, expected = from_pretrained(path, head=MaskedLM)
    rewrite(path, lambda tensors: tensors | {f"{decoder}.{kind}": tensors[copy].copy()})
    _, params = from_pretrained(path, head=MaskedLM)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    rewrite(path, lambda tensors: tensors | {f"{decoder}.{kind}": tensors[copy] + 1})
    with pytest.raises(InputError, match=f"`{decoder}.{kind}` .* must equal `{copy}`"):
        from_pretrained(path, head=MaskedLM)
    # Nothing of it is in a classifier.
    from_pretrained(path, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("family", "prefix"), [("llama", "model."), ("gpt2", "transformer.")]
)
def test_names_of_a_bare_decoder_load(family, prefix, tmp_path):
    random_model(family, TINY if family == "llama" else SMALL_GPT2, tmp_path)
    _, expected = from_pretrained(tmp_path, head=CausalLM)
    rewrite(tmp_path, lambda tensors: {
        name.removeprefix(prefix): array for name, array in tensors.items()
    })  # fmt: skip
    _, params = from_pretrained(tmp_path, head=CausalLM)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapped_model_load(prefix, folder):
    _, expected = from_pretrained(folder, head=CausalLM)
    rewrite(folder, lambda tensors: {prefix + k: v for k, v in tensors.items()})
    _, params = from_pretrained(folder, head=CausalLM)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_tensor_that_is_there_twice_is_refused(folder):
    twice = lambda tensors: tensors | {f"module.{WORDS}": tensors[WORDS] + 1}
    rewrite(folder, twice)
    with pytest.raises(InputError, match=f"once, got both .*{WORDS}"):
        from_pretrained(folder, head=CausalLM)


def test_tensors_that_no_leaf_takes_are_told(folder, caplog):
    matrix = np.zeros((2, 2), np.float32)
    extra = {
        "model.layers.4.mlp.up_proj.weight": matrix,
        "model.layers.0.self_attn.q_proj.bias": matrix[0],
        "score.weight": matrix,
        "model.layers.0.self_attn.rotary_emb.inv_freq": matrix[0],
    }
    from_pretrained(folder, head=CausalLM)
    assert not caplog.text
    rewrite(folder, lambda tensors: tensors | extra)
    from_pretrained(folder, head=CausalLM)
    (record,) = caplog.records
    told = record.getMessage()
    assert all(name in told for name in list(extra)[:3]) and "inv_freq" not in told


@pytest.mark.parametrize(
    ("value", "dtype", "mesh"),
    [
        (np.nan, np.float32, None),
        (np.inf, np.float16, None),
        (np.nan, ml_dtypes.bfloat16, None),
        (-np.inf, np.float32, MeshShape(fsdp=4, tensor=2)),
        (np.nan, ml_dtypes.bfloat16, MeshShape(fsdp=4, tensor=2)),
    ],
)
def test_a_weight_that_is_not_finite_is_named(value, dtype, mesh, folder):
    def spoil(tensors):
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
        tensors[UP][3, 5] = value
        return tensors

    mesh = mesh_of(None) if mesh is None else make_mesh(mesh)
    message = f"`layers/mlp/up/kernel` must be finite in .*tensor `{UP}`"
    rewrite(folder, lambda tensors: {k: v.astype(dtype) for k, v in tensors.items()})
    load_placed(mesh, folder, head=CausalLM, dtype=dtype)
    rewrite(folder, spoil)
    with pytest.raises(InputError, match=message):
        load_placed(mesh, folder, head=CausalLM, dtype=jnp.float32)
    with pytest.raises(InputError, match=message):
        load_placed(mesh, folder, head=CausalLM, dtype=dtype)


def test_a_weight_that_the_dtype_cannot_hold_is_named(folder):
    large = lambda tensors: tensors | {UP: np.full((24, 16), 1e39)}
    rewrite(folder, large)
    with pytest.raises(InputError, match="must be finite in bfloat16"):
        from_pretrained(folder, head=CausalLM, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_floating_point_weights_of_any_width_load(dtype, folder):
    _, expected = from_pretrained(folder, head=CausalLM)
    rewrite(folder, lambda tensors: {k: v.astype(dtype) for k, v in tensors.items()})
    _, params = from_pretrained(folder, head=CausalLM)
    for found, before in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_array_equal(
            found, np.array(before).astype(dtype).astype(np.float32)
        )


def without_head(tensors):
    return {name: array for name, array in tensors.items() if name != HEAD}


@pytest.mark.slow
def test_a_head_that_the_folder_lacks_is_told_and_comes_with_the_adapter(
    tmp_path, caplog
):
    model, data = write_decoder(tmp_path / "model"), write_chats(tmp_path / "a.jsonl")
    rewrite(model, without_head)
    settings = text_settings(model, data, tmp_path / "run", max_steps=4)
    metrics = finetune(settings)
    told = f"newly initialized, as `{model}` has none for this task: lm_head/kernel"
    assert told in caplog.text

    caplog.clear()
    assert evaluate_adapter(tmp_path / "run", data=str(data)) == metrics["eval"]
    assert "newly" not in caplog.text
    head = load_adapter(tmp_path / "run").dense["lm_head/kernel"]
    writer = load_writer(None, tmp_path / "run")
    np.testing.assert_array_equal(writer.params["lm_head"]["kernel"], head)
    assert writer.write([[0, 1]], choice=Greedy(), max_new_tokens=2)


def test_no_text_is_written_with_a_head_that_was_never_trained(tmp_path):
    model = write_decoder(tmp_path / "model")
    load_writer(model)
    rewrite(model, without_head)
    with pytest.raises(InputError, match="must have lm_head/kernel to write text"):
        load_writer(model)

"""A model's folder that is damaged or hostile is refused in one line, or read right."""

import json
import os
import random
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_text import tiny_decoder

from sparse_jax import from_pretrained, save_pretrained
from sparse_jax.errors import InputError
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config_checks import check_fields
from sparse_jax.models.hf.read_config import read_config
from sparse_jax.models.hf.tensors import base_hash, open_tensors

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
    "id2label": {"0": "no", "1": "yes"}, "pad_token_id": 1, "head_dim": 8,
    "num_key_value_heads": 2, "dtype": "float32", "type_vocab_size": 2,
}  # fmt: skip
FAMILIES = {
    "bert": {}, "roberta": {}, "xlm-roberta": {}, "camembert": {},
    "distilbert": {"hidden_dim": 48}, "modernbert": {"local_attention": 4},
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e5},
    "qwen2": {"use_sliding_window": False}, "qwen3": {}, "gemma": {},
    "ministral": {"sliding_window": 4}, "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt2": {}, "gptj": {"rotary_dim": 4}, "bloom": {},
}  # fmt: skip
# As JSON: of every type, and of sizes that nothing has.
VALUES = (
    "null", "true", "0", "-1", "1", "3", "0.5", "1e308", "-0.5", "NaN", "Infinity",
    "2147483648", "9223372036854775808", "1" + "0" * 400, '""', '"auto"', '"4"',
    '"../../etc/passwd"', "[]", "[null]", "[[1]]", "[1, 2, 3]", "{}", '{"0": null}',
    '{"x": 1}', "[" * 2000 + "]" * 2000, '"' + "x" * 9000 + '"',
)  # fmt: skip


def rounds(usual):
    """Returns how many mutations to try: more with SPARSE_JAX_FUZZ=2000."""
    return int(os.environ.get("SPARSE_JAX_FUZZ", usual))


def write_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def mutated(text, draw):
    """Returns a JSON text of which one part is wrong."""
    lines = [line for line in json.dumps(json.loads(text), indent=0).split("\n")]
    place = draw.randrange(len(lines))
    kind = draw.choice(("value", "value", "value", "value", "drop", "copy", "cut"))
    if kind == "value":
        named = [
            i for i, line in enumerate(lines) if line.rstrip(",")[-1] not in "[{}]"
        ]
        place = draw.choice(named)
        key, colon, old = lines[place].rpartition(": ")
        comma = "," if old.endswith(",") else ""
        lines[place] = f"{key}{colon}{draw.choice(VALUES)}{comma}"
    elif kind == "drop":
        del lines[place]
    elif kind == "copy":
        lines.insert(place, draw.choice(lines))
    text = "\n".join(lines)
    return text[: draw.randrange(len(text))] if kind == "cut" else text


@pytest.mark.parametrize("family", FAMILIES)
def test_mutated_configurations_are_refused_or_sound(family, tmp_path):
    draw = random.Random(f"config {family}")
    text = json.dumps({"model_type": family, **SIZES, **FAMILIES[family]})
    refused = 0
    for _ in range(rounds(30)):
        bad = mutated(text, draw)
        (tmp_path / "config.json").write_text(bad, encoding="utf-8")
        try:
            _, config = read_config(tmp_path)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            refused += 1
        else:
            check_fields(config)
    assert refused


@pytest.fixture
def model(tmp_path):
    """Returns a folder with a tiny Llama."""
    save_pretrained(*tiny_decoder(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(model):
    """Returns the same folder, its tensors in two files and an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-{shard}.safetensors"
        save_file({key: tensors[key] for key in part}, model / file)
        weight_map |= dict.fromkeys(part, file)
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return model


def test_mutated_indexes_are_refused_or_sound(sharded):
    draw = random.Random("index")
    index = sharded / "model.safetensors.index.json"
    text, refused = index.read_text(), 0
    whole = set(open_tensors(sharded))
    for _ in range(rounds(100)):
        index.write_text(mutated(text, draw), encoding="utf-8")
        try:
            assert set(open_tensors(sharded)) <= whole
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            refused += 1
    assert refused


def test_mutated_headers_are_refused_or_sound(model):
    draw = random.Random("header")
    path = model / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size].decode(), data[8 + size :]
    _, expected = from_pretrained(model, head=CausalLM)
    shape = lambda params: params["layers"]["mlp"]["up"]["kernel"].shape
    refused = 0
    for _ in range(rounds(30)):
        if draw.random() < 0.7:
            bad = mutated(header, draw).encode()
            parts = struct.pack("<Q", len(bad)), bad, body
        else:
            spoilt = bytearray(data)
            for _ in range(draw.randrange(1, 4)):
                spoilt[draw.randrange(8 + size)] = draw.randrange(256)
            parts = (bytes(spoilt),)
        path.write_bytes(b"".join(parts))
        try:
            _, params = from_pretrained(model, head=CausalLM)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            refused += 1
        else:
            assert shape(params) == shape(expected)
    assert refused


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "/proc/self/mem", "a/b.safetensors", "..", "",
     "x" * 5000, "model.bin", "a\x00.safetensors", "a\\b.safetensors", None, 3, ["a"]],
)  # fmt: skip
def test_a_shard_outside_the_folder_is_never_opened(name, sharded, tmp_path):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    index = sharded / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(fields))
    for read in (open_tensors, base_hash):
        with pytest.raises(InputError, match="index.json` must "):
            read(sharded)


def test_an_index_that_names_the_wrong_file_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    files = fields["weight_map"]
    files["lm_head.weight"] = "model-1.safetensors"
    assert "lm_head.weight" not in load_file(sharded / "model-1.safetensors")
    index.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="must hold the tensor 'lm_head.weight'"):
        open_tensors(sharded)


def test_of_two_files_with_a_tensor_the_index_decides(sharded):
    _, expected = from_pretrained(sharded, head=CausalLM)
    name = "lm_head.weight"
    other = load_file(sharded / "model-1.safetensors")
    assert name not in other
    other[name] = np.zeros((10, 16), np.float32)
    save_file(other, sharded / "model-1.safetensors")
    _, params = from_pretrained(sharded, head=CausalLM)
    found, before = (tree["lm_head"]["kernel"] for tree in (params, expected))
    np.testing.assert_array_equal(found, before)


def test_a_file_that_is_a_link_is_read_as_the_hub_stores_it(sharded, tmp_path):
    (tmp_path / "blob").write_bytes((sharded / "model-0.safetensors").read_bytes())
    (sharded / "model-0.safetensors").unlink()
    (sharded / "model-0.safetensors").symlink_to(tmp_path / "blob")
    from_pretrained(sharded, head=CausalLM)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (
            {f"{UP}.weight": np.ones((24, 16), np.int8)},
            f"I8 in the tensor `{UP}.weight",
        ),
        ({f"{UP}.weight": np.ones((24, 16), np.uint8)}, f"U8 in the tensor `{UP}"),
        ({f"{UP}.weight": np.ones((24, 16), np.complex64)}, "C64 in the tensor"),
        ({f"{UP}.SCB": np.ones(24, np.float32)}, f"`{UP}.SCB`"),
        ({f"{UP}.weight_scale_inv": np.ones((1, 1), np.float32)}, "_scale_inv`"),
        ({f"{UP}.weight_scale": np.ones((1, 1), np.float32)}, "weight_scale`"),
        ({f"{UP}.qweight": np.ones((2, 24), np.int32)}, f"`{UP}.qweight`"),
        ({f"{UP}.g_idx": np.ones(16, np.int32)}, f"`{UP}.g_idx`"),
        ({f"{UP}.weight.absmax": np.ones(6, np.uint8)}, f"`{UP}.weight.absmax`"),
    ],
)
def test_quantized_weights_are_refused_by_name(extra, named, model):
    path = model / "model.safetensors"
    save_file(load_file(path) | extra, path)
    with pytest.raises(InputError, match="in F16, BF16, F32, F64, got") as caught:
        from_pretrained(model, head=CausalLM)
    assert named in str(caught.value) and "dequantize()" in str(caught.value)


def test_weights_of_eight_bits_are_refused_by_name(model):
    path = model / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    del header["__metadata__"]
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    begin, end = header[last]["data_offsets"]
    header[last] |= {
        "dtype": "F8_E4M3",
        "data_offsets": [begin, (3 * begin + end) // 4],
    }
    text = json.dumps(header).encode()
    body = data[8 + size :][: header[last]["data_offsets"][1]]
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    with pytest.raises(InputError, match=f"got F8_E4M3 in the tensor `{last}`"):
        from_pretrained(model, head=CausalLM)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_a_quantization_in_the_configuration_is_refused(method, tmp_path):
    fields = {"model_type": "llama", **SIZES}
    read_config(write_config(tmp_path, **fields, quantization_config=None))
    write_config(tmp_path, **fields, quantization_config={"quant_method": method})
    with pytest.raises(
        InputError, match="`quantization_config` must not be in .*quant"
    ):
        read_config(tmp_path)


BAD_FIELDS = [
    ("bert", {"id2label": [1, 2]}, "`id2label` in .* must be an object"),
    ("bert", {"id2label": {"0": None}}, "`id2label` in .* must be an object"),
    ("bert", {"num_labels": 10**9}, "`num_labels` in .* at most 1048576, got"),
    ("bert", {"num_hidden_layers": 2**63}, "`num_hidden_layers` in .* at most 65536"),
    ("qwen2", {"num_hidden_layers": 10**8}, "`num_hidden_layers` in .* at most 65536"),
    ("llama", {"vocab_size": 10**30}, "`vocab_size` in .* at most 2147483647"),
    ("llama", {"hidden_size": True}, "`hidden_size` in .* whole number .* got True"),
    ("llama", {"hidden_size": 32.0}, "`hidden_size` in .* whole number .* got 32.0"),
    ("llama", {"rms_norm_eps": float("nan")}, "`norm_eps` must be .*, got nan"),
    ("llama", {"rms_norm_eps": -1e-6}, "`norm_eps` must be .*, got -1e-06"),
    ("llama", {"attention_dropout": 1.5}, "`attention_dropout` must be .*, got 1.5"),
    ("llama", {"head_dim": 7}, "must be a valid llama conf.*even"),
    ("llama", {"num_key_value_heads": -2}, "`num_kv_heads` must be .*, got -2"),
    ("llama", {"hidden_act": ["silu"]}, "must be a valid llama configuration"),
    ("llama", {"rope_parameters": LLAMA3 | {"factor": None}}, "factor"),
    ("llama", {"rope_parameters": {"rope_theta": None}}, "must have rope_theta for"),
    ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "`low` must"),
    ("llama", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "be 1"),
    ("llama", {"rope_parameters": {"full_attention": LLAMA3}}, "rope_parameters"),
    ("llama", {"rms_norm_eps": 1e308}, r"`norm_eps` must be .*, got 1e\+308"),
    ("llama", {"eos_token_id": 2**63}, "`eos_ids` must be whole numbers"),
    ("llama", {"head_dim": 0}, "`head_size` must be .*, got 0"),
    ("qwen2", {"num_key_value_heads": 0}, "`num_kv_heads` must be .*, got 0"),
    ("gpt2", {"n_inner": 0}, "`intermediate_size` must be .*, got 0"),
    ("gpt2", {"n_positions": 32}, "`n_positions` and `max_position_embeddings` in"),
    ("gptj", {"rotary_dim": 0}, "`rotary_dim` must be positive"),
    ("mistral", {"sliding_window": 0}, "`sliding_window` must be .*, got 0"),
    ("gemma", {"use_bidirectional_attention": True}, "must be false, got true"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("gpt2", {"n_embd": 64}, "`n_embd` and `hidden_size` in .* same, got 64 and 32"),
    ("roberta", {"pad_token_id": None}, "`pad_token_id` must be a number, got null"),
    ("roberta", {"pad_token_id": 50}, r"`pad_id` must be in \[0, 50\)"),
    ("roberta", {"max_position_embeddings": 2}, "`max_positions` must be .*, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "message"), BAD_FIELDS)
def test_a_field_that_says_nothing_sensible_is_named(
    family, changes, message, tmp_path
):
    fields = {"model_type": family, **SIZES, **FAMILIES[family]}
    read_config(write_config(tmp_path, **fields))
    with pytest.raises(InputError, match=message) as caught:
        read_config(write_config(tmp_path, **{**fields, **changes}))
    assert str(tmp_path) in str(caught.value)


def test_llama3_without_its_factors_is_refused(tmp_path):
    fields = {"model_type": "llama", **SIZES}
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        rope = {key: LLAMA3[key] for key in LLAMA3 if key != name}
        write_config(tmp_path, **fields, rope_parameters=rope)
        with pytest.raises(InputError, match=name):
            read_config(tmp_path)


@pytest.mark.parametrize("dtype", ["auto", "../../etc/passwd", [None], 3, None])
def test_the_dtype_of_a_file_is_not_asked_for(dtype, tmp_path):
    fields = {"model_type": "llama", **SIZES}
    _, expected = read_config(write_config(tmp_path, **fields))
    for name in ("dtype", "torch_dtype"):
        assert (
            read_config(write_config(tmp_path, **fields | {name: dtype}))[1] == expected
        )


@pytest.mark.parametrize(
    "near", ["deberta", "electra", "phi", "gpt_neox", "gemma3", "llava", "mixtral"]
)
def test_a_near_family_is_refused_with_those_that_are_read(near, tmp_path):
    write_config(tmp_path, model_type=near, **SIZES)
    message = f"must be one of bert, .*llama.*, xlm-roberta, got '{near}'"
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)

"""Adapters are combined and compared on the command line."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_text import write_decoder

from sparse_jax import (
    Adapter,
    CausalLM,
    LoRA,
    apply_adapter,
    from_pretrained,
    load_adapter,
    save_adapter,
)
from sparse_jax.cli.main import main
from sparse_jax.models.hf.pretrained import base_hash

UP, NORM = "layers/mlp/up/kernel", "norm/scale"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base, and two adapters of it with one entry in common."""
    folder = write_decoder(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for number, positions in enumerate(([0, 5], [5, 6])):
        support = {UP: np.tile(np.array(positions, np.int32), (4, 1))}
        support[NORM] = np.array([number], np.int32)
        fill = lambda x, value=2.0 + number: np.full(x.shape, value, np.float32)
        new = {leaf: fill(x) for leaf, x in support.items()}
        base, digest = str(folder), base_hash(folder)
        adapter = Adapter(
            support, new, word="sift", task="causal", base_model=base, base_hash=digest
        )
        save_adapter(tmp_path / f"{number}.safetensors", adapter)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Returns a function that runs a command: exit code, output, errors."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["sparse-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_two_adapters_become_one(place, command):
    code, out, _ = command(
        "combine", "0.safetensors", "1.safetensors", "--output", "new/sum.safetensors",
        "--weights", "1", "--weights", "-1",
    )  # fmt: skip
    assert (code, out) == (0, "new/sum.safetensors: 14 entries\n")
    model, params = from_pretrained("base", head=CausalLM)
    total = load_adapter("new/sum.safetensors")
    changed, _ = apply_adapter(params, total, model=model, base_hash=total.base_hash)
    base = np.asarray(params["layers"]["mlp"]["up"]["kernel"]).reshape(4, -1)
    found = np.asarray(changed["layers"]["mlp"]["up"]["kernel"]).reshape(4, -1)
    np.testing.assert_array_equal(found[:, 0], 2.0)
    np.testing.assert_allclose(found[:, 5], base[:, 5] - 1.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[:, 6], 2 * base[:, 6] - 3.0, rtol=0, atol=1e-6)
    assert total.task == "causal"


UNREADABLE = {
    "FIRST": ("nowhere", "0.safetensors"),
    "SECOND": ("0.safetensors", "nowhere"),
}


@pytest.mark.parametrize("argument", UNREADABLE)
def test_the_adapter_that_cannot_be_read_is_named(argument, place, command):
    code, _, errors = command("compare", *UNREADABLE[argument])
    assert code == 2
    assert errors.startswith(f"error: {argument} must be an adapter file, or the ")
    assert "got `nowhere`, which does not exist" in errors


@pytest.mark.parametrize("argument", UNREADABLE)
@pytest.mark.parametrize("name", ["nowhere", "a"])  # a letter of every message
def test_an_adapter_without_its_base_is_named(argument, name, place, command):
    (place / name).mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/gone"}
    (place / name / "adapter_config.json").write_text(json.dumps(config))
    weights = {"base_model.model.x.lora_A.weight": np.ones((2, 2), np.float32)}
    save_file(weights, place / name / "adapter_model.safetensors")
    words = (name if word == "nowhere" else word for word in UNREADABLE[argument])
    code, _, errors = command("compare", *words)
    assert code == 2
    assert "names 'owner/gone'. Pass it, or the folder where it is, as --model." in (
        errors
    )
    assert errors.endswith(f"This is about `{name}` of {argument}.\n")


def test_the_overlap_is_a_table(place, command):
    code, out, _ = command("compare", "0.safetensors", "1.safetensors")
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    assert code == 0
    assert [UP, "8", "8", "4", "33.3"] in rows
    assert [NORM, "1", "1", "0", "0"] in rows
    assert ["all", "9", "9", "4", "28.6"] in rows


def test_arrays_that_a_method_adds_are_said_not_to_be_counted(place, command):
    pair = {"a": np.ones((4, 16, 2), np.float32), "b": np.ones((4, 2, 16), np.float32)}
    added = {"attention/query": pair}
    changed(place, support={}, values={}, added=added, method=LoRA(rank=2), word="lora")
    code, out, _ = command("compare", "0.safetensors", "1.safetensors")
    assert code == 0
    assert out.endswith("The arrays that lora adds in SECOND are not counted.\n")
    assert "in FIRST" not in out


def changed(place, **changes):
    adapter = load_adapter(place / "1.safetensors")
    save_adapter(place / "1.safetensors", replace(adapter, **changes))


def another_base(place):
    changed(place, base_hash="cd" * 32)


def out_of_range(place):
    support = load_adapter(place / "1.safetensors").support
    changed(place, support={**support, NORM: np.array([16], np.int32)})


def truncated(place):
    path = place / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


REFUSED = {
    "another base": (another_base, (), "--model must be the base of the adapter"),
    "out of range": (
        out_of_range,
        (),
        "`norm/scale.support` must hold positions below 16",
    ),
    "truncated": (truncated, (), "must be a complete safetensors file"),
    "a weight too few": (None, ("--weights", "1"), "--weights must be as many as"),
    "a weight": (None, ("--weights=1", "--weights=nan"), "--weights must be finite"),
    "no adapter": (
        None,
        (".",),
        "ADAPTERS must be .* `.`, which has neither `adapter.safetensors` nor",
    ),
    "no such head": (None, ("--head", "3"), r"--head must be in \[1, 2\], got 3"),
    "no file": (None, ("--output", ""), "that ends with .safetensors, got '', which"),
    "another file": (None, ("--output", "a.bin"), "must be a new file that ends with"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_sum_is_one_line(name, place, command):
    spoil, options, message = REFUSED[name]
    if spoil is not None:
        spoil(place)
    if "--output" not in options:
        options = (*options, "--output", "s.safetensors")
    code, out, errors = command("combine", "0.safetensors", "1.safetensors", *options)
    *_, line = errors.splitlines()
    assert (code, out) == (2, "")
    assert line.startswith("error: ") and not list(place.glob("s.*"))
    assert re.search(message, line), line

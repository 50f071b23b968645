"""The command that writes: prompts in, texts out, and one line for wrong input."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import write_model
from tiny_text import WORDS, tiny_decoder, write_decoder
from tiny_tokenizers import CHATML, characters

from sparse_jax import Adapter, Greedy, InputError, LoRA, generate, save_adapter
from sparse_jax.cli.main import main
from sparse_jax.generation.wording import chat_tokens, stop_token, text_tokens
from sparse_jax.generation.writer import load_writer
from sparse_jax.models.pretrained import base_hash
from sparse_jax.tasks.prompts import ALPACA


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a folder with a decoder, an encoder and two adapters."""
    folder = tmp_path_factory.mktemp("place")
    write_decoder(folder / "model")
    write_model(folder / "encoder")
    model, params = tiny_decoder()
    noise = lambda leaf: np.random.default_rng(0).normal(size=leaf.shape)
    added = jax.tree.map(
        lambda leaf: noise(leaf).astype(np.float32),
        LoRA(rank=2).added(params, jax.random.key(0)),
    )
    about = {
        "base_model": str(folder / "model"),
        "base_hash": base_hash(folder / "model"),
        "method": "lora",
        "settings": {"alpha": 4.0},
    }
    adapter = Adapter(added=added, task="causal", **about)
    save_adapter(folder / "adapter.safetensors", adapter)
    save_adapter(folder / "labels", Adapter(task="sst2", labels=("a", "b"), **about))
    other = {**about, "base_hash": "0" * 64}
    save_adapter(folder / "other", Adapter(added=added, task="causal", **other))
    return folder


@pytest.fixture
def command(place, monkeypatch, capsys):
    """Returns a function that runs a command: exit code, output, errors."""

    def run(*arguments):
        words = [str(word).replace("PLACE", str(place)) for word in arguments]
        monkeypatch.setattr(sys, "argv", ["sparse-jax", "generate", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


SAY = ("--model", "PLACE/model", "--prompt", "say red", "--max-new-tokens", "6")


def expected(text, stop=(9,), **options):
    """Returns what the tiny decoder writes, in words."""
    ids = [WORDS.index(word) for word in text.split()]
    options = {"max_new_tokens": 6, "stop": stop} | options
    found = generate(*tiny_decoder(), [ids], **options)[0]
    return " ".join(WORDS[token] for token in found if WORDS[token][0] != "<")


def test_help_answers_in_a_second():
    # The fastest of three: other programs run on the same machine.
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        code = "from sparse_jax.cli.main import main; main()"
        words = [sys.executable, "-c", code, "generate", "--help"]
        run = subprocess.run(words, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert "--max-new-tokens" in run.stdout
    assert min(seconds) < 1


def test_texts_alone_are_printed(command, tmp_path):
    (tmp_path / "prompts").write_text("say blue\n\nonce green :\n")
    code, out, _ = command(*SAY, "--prompts", str(tmp_path / "prompts"))
    wanted = [expected(text) for text in ("say red", "say blue", "once green :")]
    assert (code, out) == (0, "\n".join(wanted) + "\n")


def test_the_choice_is_that_of_the_options(command):
    plain = command(*SAY)[1]
    assert command(*SAY, "--temperature", "2", "--top-k", "1")[1] == plain
    drawn = {command(*SAY, "--temperature", "3", "--seed", seed)[1] for seed in "0123"}
    assert len(drawn) > 1
    assert command(*SAY, "--beams", "2", "--length-penalty", "0.5")[0] == 0


def test_an_adapter_knows_its_base(command, place):
    alone = command(*SAY)[1]
    words = ("--adapter", "PLACE/adapter.safetensors", *SAY[2:])
    code, adapted, _ = command(*words)
    assert code == 0 and adapted != alone
    assert command("--model", "PLACE/model", *words)[1] == adapted
    writer = load_writer(None, place / "adapter.safetensors")
    prompts = [[0, 1]]
    assert writer.write(prompts, choice=Greedy(), max_new_tokens=6) == [adapted[:-1]]


def test_texts_end_where_the_model_says(command, place):
    whole = expected("say red").split()
    word = next(word for word in whole if word != whole[0])
    until = " ".join(whole[: whole.index(word)])
    for stop in (word, str(WORDS.index(word))):
        assert command(*SAY, "--stop", stop)[1] == until + "\n"
    config = place / "model" / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [9, WORDS.index(word)]}))
    assert command(*SAY)[1] == until + "\n"
    config.write_text("[")
    code, _, err = command(*SAY)
    config.unlink()
    assert code == 2 and "generation_config.json` must be a JSON object" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SAY[:2], "`prompt` must be given, got none."),
        (SAY[2:], "`model` must be given without an adapter"),
        ((*SAY, "--prompts", "PLACE/none"), "must be a file, and there is none"),
        ((*SAY, "--beams", "2", "--top-k", "3"), "`beams` must be left out with"),
        ((*SAY, "--length-penalty", "2"), "`length_penalty` must be left out"),
        ((*SAY, "--beams", "1"), "`beams` must be at least 2, got 1"),
        ((*SAY, "--seed", "-1"), "`seed` must be in [0, 2**32), got -1"),
        ((*SAY, "--stop", "xyz"), "got 'xyz', which the tokenizer does not know"),
        ((*SAY, "--top-p", "0"), "`top_p` must be in (0, 1], got 0.0"),
        ((*SAY, "--temperature", "0"), "`temperature` must be positive, got 0.0"),
        ((*SAY, "--prompt", ""), "`prompt` must have at least one token"),
        ((*SAY[:4], "--max-new-tokens", "31"), "must have at most 1 tokens beside 31"),
        ((*SAY, "--stop", "say red"), "`stop` must be one token or its id, got 'say r"),
        ((*SAY, "--template", "x"), "`template` must be one of alpaca, llm_adapters"),
        ((*SAY, "--chat"), "`model` must have a tokenizer with a chat template"),
        ((*SAY, "--chat", "--template", "alpaca"), "`template` must be left out with"),
        ((*SAY, "--adapter", "PLACE/labels"), "must be one of a causal language model"),
        ((*SAY, "--adapter", "PLACE/other"), "`model` must be the base of the adapter"),
        (("--model", "PLACE/encoder", *SAY[2:]), "`model` must be a decoder, got"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(options, message, command):
    code, out, err = command(*options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_prompt_has_the_tokens_of_training():
    tokenizer = characters()
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text_tokens("ab", tokenizer) == [0, *ids("ab")]
    wanted = [0, *ids(ALPACA.fill("Add 1, 2"))]
    assert text_tokens("Add 1, 2", tokenizer, ALPACA) == wanted


def test_a_chat_asks_for_an_answer():
    tokenizer = characters(chat_template=CHATML)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    found = chat_tokens("Hi", tokenizer)
    assert found == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.count(0) == 0


def test_a_stop_is_one_token():
    tokenizer = characters()
    assert [stop_token(word, tokenizer) for word in ("<|im_end|>", "3", "ab")] == [
        3, 3, tokenizer.get_vocab()["ab"],
    ]  # fmt: skip
    with pytest.raises(InputError, match="`stop` must be one token"):
        stop_token("abc", tokenizer)


def test_a_genuine_model_tells_the_story_that_pytorch_tells(
    command, shared_data, tmp_path
):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_data / "models" / "tinystories-656k"
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "Once upon a time"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for options, ours in (({}, ()), ({"num_beams": 3}, ("--beams", "3"))):
        found = theirs.generate(ids, do_sample=False, max_new_tokens=30, **options)
        story = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        words = ("--model", path, "--prompt", text, "--max-new-tokens", "30", *ours)
        assert command(*words)[1] == story + "\n"

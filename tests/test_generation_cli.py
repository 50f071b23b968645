"""The command that writes: prompts in, texts out, and one line for wrong input."""

import io
import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_run import write_model
from tiny_text import CONFIG, WORDS, text_settings, tiny_decoder, write_decoder
from tiny_tokenizers import CHATML, characters
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sparse_jax import (
    Adapter,
    Greedy,
    InputError,
    LoRA,
    from_pretrained,
    generate,
    save_adapter,
    save_pretrained,
)
from sparse_jax.cli.generate import _show
from sparse_jax.cli.main import main
from sparse_jax.data.conversations import ALPACA
from sparse_jax.data.json_lines import JsonLines
from sparse_jax.generation.ends import before_end, end_table, ends_of_model
from sparse_jax.generation.prompts import Prompts
from sparse_jax.generation.requests import read_requests
from sparse_jax.generation.writer import (
    Stop,
    chat_tokens,
    load_writer,
    read_stop,
    text_tokens,
)
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model
from sparse_jax.models.hf.pretrained import base_hash
from sparse_jax.models.hf.read_config import read_config
from sparse_jax.training.setup import load_model_and_data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a folder with a decoder, an encoder and two adapters."""
    folder = tmp_path_factory.mktemp("place")
    write_decoder(folder / "model")
    write_model(folder / "encoder")
    (folder / "blank.txt").write_text("\n \n")
    model, params = tiny_decoder()
    noise = lambda leaf: np.random.default_rng(0).normal(size=leaf.shape)
    added = jax.tree.map(
        lambda leaf: noise(leaf).astype(np.float32),
        LoRA(rank=2).added(params, jax.random.key(0)),
    )
    about = {
        "base_model": str(folder / "model"),
        "base_hash": base_hash(folder / "model"),
        "method": LoRA(rank=2),
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


def test_texts_alone_are_printed(command, tmp_path):
    (tmp_path / "prompts").write_text("say blue\n\nonce green :\n")
    code, out, _ = command(*SAY, "--prompts", str(tmp_path / "prompts"))
    wanted = [expected(text) for text in ("say red", "say blue", "once green :")]
    assert (code, out) == (0, "\n".join(wanted) + "\n")


def test_json_lines_are_read_and_written(command, place, tmp_path, monkeypatch, caplog):
    records = [
        {"id": "a", "prompt": "say red"}, {"text": "say blue"},
        {"prompt": "say :"}, {"prompt": "once green :"},
    ]  # fmt: skip
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = (*SAY[:2], *SAY[4:], "--input", path, "--batch-size", "2")
    code, out, _ = command(*words)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["id"] for line in lines] == ["a", 1, 2, 3]
    assert lines[0] == {"id": "a", "prompt": "say red", "text": expected("say red")}
    # The first batch is there already.
    add = JsonLines.add

    def stop(lines, more):
        add(lines, more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "add", stop)
        assert command(*words, "--output", output)[0] == 130
    part = tmp_path / "out.jsonl.part"
    assert f"the same command continues from {part}" in caplog.text
    assert part.read_text().count("\n") == 3
    code, _, error = command(*words, "--output", output, "--max-new-tokens", "5")
    assert code == 2
    assert error.startswith("error: --output must not have begun with another option")
    assert command(*words, "--output", output)[0] == 0
    assert output.read_text() == out


def test_an_instruction_of_a_file_is_put_in_its_template(place, tmp_path):
    record = {"idx": 7, "instruction": "say", "input": "red"}
    (tmp_path / "in.json").write_text(json.dumps([record]))
    writer = load_writer(place / "model")
    (found,) = read_requests(tmp_path / "in.json", writer, None, False)
    assert (found.id, found.prompt) == (7, ALPACA.fill("say", "red"))


def test_what_is_drawn_in_batches_is_what_is_drawn_at_once(command):
    words = (*SAY, "--prompt", "say", "--prompt", "say", "--temperature", "3", "--json")
    texts = {command(*words, "--batch-size", size)[1] for size in "13"}
    (lines,) = texts
    assert len({json.loads(line)["text"] for line in lines.splitlines()}) == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "line 1 must have a column prompt, messages, conversations, instru"),
        ({"messages": "hi"}, "must have a list in `messages`, got 'hi'"),
        ({"prompt": [1]}, "must have messages as objects, got [1]"),
        ({"prompt": 5}, "must have a text in `prompt`, got 5"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "chat template"),
        ({"prompt": "say " * 40}, "`prompt` must have at most 26 tokens besides 6"),
    ],
)
def test_a_record_that_is_no_prompt_is_refused(command, tmp_path, record, message):
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    words = (*SAY[:2], *SAY[4:], "--input", tmp_path / "in.jsonl")
    code, out, error = command(*words)
    assert (code, out) == (2, "")
    assert message in error


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


def test_a_text_may_keep_the_space_that_it_begins_with(place):
    """Tokenizers of SentencePiece take it from all that they decode."""
    vocabulary = {f"▁{word}": i for i, word in enumerate(WORDS)}
    spaced = Tokenizer(models.WordLevel(vocabulary, unk_token="▁<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    spaced.decoder = decoders.Sequence(steps)
    spaced = PreTrainedTokenizerFast(tokenizer_object=spaced)
    writer = replace(load_writer(place / "model"), tokenizer=spaced)
    options = {"choice": Greedy(), "max_new_tokens": 6}
    (alone,) = writer.write([[0, 1]], **options)
    assert writer.write([[0, 1]], **options, keep_space=True) == [f" {alone}"]


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
        (SAY[:2], "--prompt must be given, got none."),
        (SAY[2:], "--model must be given without an adapter"),
        ((*SAY, "--prompts", "PLACE/none"), "must be a file, got"),
        (
            (*SAY, "--prompts", "PLACE/blank.txt"),
            "--prompts must be a file with one text per line, got '",
        ),
        ((*SAY, "--beams", "2", "--top-k", "3"), "--beams must be left out with"),
        ((*SAY, "--length-penalty", "2"), "--length-penalty must be left out"),
        ((*SAY, "--beams", "1"), "--beams must be at least 2, got 1"),
        ((*SAY, "--seed", "-1"), "--seed must be in [0, 2**32), got -1"),
        ((*SAY, "--stop", "xyz"), "got 'xyz', which the tokenizer does not know"),
        ((*SAY, "--top-p", "0"), "--top-p must be in (0, 1], got 0.0"),
        ((*SAY, "--temperature", "0"), "--temperature must be positive, got 0.0. G"),
        ((*SAY, "--prompt", ""), "--prompt must have at least one token"),
        ((*SAY[:4], "--max-new-tokens", "31"), "must have at most 1 tokens besides 31"),
        ((*SAY, "--stop", "red x"), "--stop must be a text or a token of the model"),
        ((*SAY, "--stop", ""), "got '', which the tokenizer does not know"),
        ((*SAY, "--stop", "\udcff"), "--stop must have whole characters, got '"),
        ((*SAY, "--prompt", "a\udcff"), "--prompt must have whole characters, "),
        ((*SAY, "--template", "x"), "--template must be one of alpaca, llm_adapters"),
        ((*SAY, "--chat"), "--model must have a tokenizer with a chat template"),
        ((*SAY, "--chat", "--template", "alpaca"), "--template must be left out"),
        ((*SAY, "--adapter", "PLACE/labels"), "must be one of a causal language model"),
        ((*SAY, "--adapter", "PLACE/other"), "--model must be the base of the"),
        (("--model", "PLACE/encoder", *SAY[2:]), "--model must be a decoder, got"),
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
    assert text_tokens("<s>ab", tokenizer) == [0, *ids("ab")]


def test_a_chat_asks_for_an_answer():
    tokenizer = characters(chat_template=CHATML)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    found = chat_tokens("Hi", tokenizer)
    assert found == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.count(0) == 0


@pytest.mark.parametrize("beams", [(), ("--beams", "2")])
def test_texts_end_before_words_of_several_tokens(command, beams):
    whole = command(*SAY, *beams)[1].removesuffix("\n")
    words = whole.split()
    pair = next(
        f"{a} {b}"
        for a, b in zip(words[1:], words[2:], strict=False)
        if not whole.startswith(f"{a} {b}")
    )
    found = command(*SAY, *beams, "--stop", pair)[1]
    if beams:  # another text may be better than the beginning of this one
        assert pair not in found
    else:
        assert found.rstrip() == whole[: whole.index(pair)].rstrip() != ""


def test_a_stop_is_a_text_a_token_or_its_id():
    tokenizer, spaced = characters(), characters(adds_space=True)
    ids = tokenizer.get_vocab()
    assert read_stop("<|im_end|>", tokenizer) == read_stop("3", tokenizer) == Stop((3,))
    assert read_stop("ab", tokenizer) == Stop((ids["ab"],), "ab")
    assert read_stop("cab", tokenizer) == Stop((ids["c"], ids["ab"]), "cab")
    # As it is written after a line break: without the space of a first word.
    assert read_stop("cab", spaced) == Stop((ids["c"], ids["ab"]), "cab")


def test_the_loop_ends_with_the_end_of_every_row():
    script = jax.numpy.array([[5, 1, 1, 2, 7], [1, 2, 7, 7, 7]])

    class Scripted:
        def start(self, prompts, num_more):
            return self.read(None, jax.numpy.array(0))

        def read(self, tokens, count):
            return jax.nn.one_hot(script[:, count], 9), count + 1

    mask = np.ones((2, 1), np.int32)
    prompts, table = Prompts(mask, mask, np.arange(2)), end_table([8, (1, 2)])
    keys = jax.random.split(jax.random.key(0), 2)
    found = Greedy().decode(Scripted(), prompts, keys, jax.numpy.asarray(table), 5)
    assert found.tolist() == [[5, 1, 1, 2, 0], [1, 2, 7, 7, 0]]
    assert [before_end(row, [8, (1, 2)]).tolist() for row in np.asarray(found)] == [
        [5, 1], [],
    ]  # fmt: skip


@pytest.mark.parametrize("end", [-1, 2**31, (), (1, -1), 1.0, "a", ((1,),), None])
def test_an_end_is_tokens(end):
    with pytest.raises(InputError, match="`stop` must be ids of tokens, or several"):
        end_table([end])


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({"eos_token_id": [2, 7]}, None, {2, 7}),
        ({"eos_token_id": 7}, None, {7}),
        ({"eos_token_id": None}, None, set()),
        ({}, None, {2}),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 5}, {5}),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": [5, 6]}, {5, 6}),
        ({"eos_token_id": [2, 7]}, {}, set()),
    ],
)
def test_a_text_ends_where_transformers_ends_it(tmp_path, config, generation, wanted):
    from transformers import GenerationConfig, LlamaConfig

    sizes = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1}
    more = {"intermediate_size": 8, "num_attention_heads": 1, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **more, **config}))
    if generation is None:
        theirs = LlamaConfig.from_pretrained(tmp_path)
        theirs = GenerationConfig.from_model_config(theirs).eos_token_id
    else:
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps(generation))
        theirs = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    _, ours = read_config(tmp_path)
    found = ends_of_model(tmp_path, ours.eos_ids, ours.vocab_size)
    theirs = theirs if isinstance(theirs, list) else [theirs]
    assert found == {*theirs} - {None} == wanted


@pytest.mark.parametrize("end", ["2", 2.0, True, [None], [[2]], {}])
def test_an_end_of_another_kind_is_refused(tmp_path, end):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(InputError, match="must be the id of a token, or a list of ids"):
        ends_of_model(tmp_path, (), 10)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, "\udcff", "9" * 5000])
def test_a_broken_generation_config_is_one_line(tmp_path, text):
    path = tmp_path / "generation_config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="generation_config.json` must be a JSON obj"):
        ends_of_model(tmp_path, (), 10)


def test_ends_that_the_model_lacks_end_nothing(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [-1, 9, 10]}))
    assert ends_of_model(tmp_path, (), 10) == {9}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """Returns a decoder of characters whose template ends turns with its own token."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = characters(chat_template=CHATML)
    config = replace(CONFIG, vocab_size=len(tokenizer), max_positions=128)
    model = Model(CausalLM, LLAMA, config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f4"), model.abstract())
    save_pretrained(model, params, folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_end_that_training_taught_ends_a_text(chatty, tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = tmp_path / "chats.jsonl"
    data.write_text((json.dumps({"messages": messages}) + "\n") * 2)
    settings = text_settings(chatty, data, tmp_path / "run", max_length=64)
    (asked,) = read_requests(data, load_writer(chatty), None, False)[:1]
    # The answer that a file has is not what the model goes on with.
    assert asked.prompt == messages[:1]
    kept = load_model_and_data(settings).objective.settings
    assert kept["eos_token_id"] == [3]
    assert load_writer(chatty).stop == (1,)
    about = {
        "base_model": str(chatty),
        "base_hash": base_hash(chatty),
        "method": LoRA(rank=2),
    }
    for ends, wanted in (([3], (1, 3)), (None, (1,)), ([99], None), ("3", None)):
        adapter = Adapter(task="causal", settings={"eos_token_id": ends}, **about)
        adapter = adapter_of(chatty, adapter)
        save_adapter(tmp_path / "adapter.safetensors", adapter)
        if wanted:
            writer = load_writer(None, tmp_path / "adapter.safetensors")
            assert writer.stop == wanted
        else:
            with pytest.raises(
                InputError, match="`eos_token_id` of the adapter must be"
            ):
                load_writer(None, tmp_path / "adapter.safetensors")


def adapter_of(folder, adapter):
    """Returns an adapter with the arrays that a method of its name adds."""
    model, params = from_pretrained(folder, head=CausalLM)
    added = LoRA(rank=2).added(params, jax.random.key(0))
    added = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f4"), added)
    return replace(adapter, added=added)


def test_a_terminal_is_shown_no_control_characters(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = "a\x1b[2Jb\r\x9bc\td\ne\u200d\xa0\u3000"
    for stream, shown in (
        (Terminal(), "a\\x1b[2Jb\\r\\x9bc\td\ne\u200d\xa0\u3000\n"),
        (io.StringIO(), text + "\n"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        _show(text)
        assert stream.getvalue() == shown
    piped = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", piped)
    _show("é")
    piped.flush()
    assert piped.buffer.getvalue() == b"\\xe9\n"


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

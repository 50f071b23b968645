"""Generated texts: those of PyTorch, whatever they are batched with."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import batch_of, random_model

from sparse_jax import Beams, CausalLM, Greedy, Sample, from_pretrained, generate
from sparse_jax.errors import InputError
from sparse_jax.generation.cpu import layers_apart
from sparse_jax.generation.generate import _written
from sparse_jax.generation.prompts import Prompts
from sparse_jax.methods.lora import LoRA
from sparse_jax.methods.prefix import Prefix
from sparse_jax.models.attachment import Attachment, LayerValues
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import MaskedLM

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLASSIC = {
    "vocab_size": 61, "n_layer": 2, "n_head": 4, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {
    **SIZES, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 7,
}  # fmt: skip
CASES = {
    "llama": ("llama", SIZES),
    "mistral": ("mistral", {**SIZES, "sliding_window": 5}),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 12}),
    "gemma": ("gemma", {**SIZES, "head_dim": 12}),
    "gemma 3": ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2}),
    "gpt2": ("gpt2", {**CLASSIC, "n_embd": 32, "n_positions": 64}),
    "bloom": ("bloom", {**CLASSIC, "hidden_size": 32, "seq_length": 64}),
}
every_case = pytest.mark.parametrize("case", CASES)
LENGTHS = (11, 7, 4, 1)
PROMPTS = [np.random.default_rng(1).integers(3, 61, n).tolist() for n in LENGTHS]
NEW = 12
# A token that the model lacks; without one, PyTorch takes that of the config.
NEVER = [61]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Returns a function that gives a tiny decoder: theirs, ours, our parameters."""
    made = {}

    def load(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            theirs = random_model(*CASES[case], folder)
            made[case] = (theirs, *from_pretrained(folder, head=CausalLM))
        return made[case]

    return load


@pytest.fixture(scope="module")
def llama(load):
    return load("llama")[1:]


def torch_texts(theirs, stop, **options):
    """Returns what PyTorch writes after the prompts, without the stop token."""
    import torch

    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in LENGTHS])
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0} | options
    found = theirs.generate(ids, attention_mask=mask, eos_token_id=stop, **options)
    return [until(row.tolist(), stop) for row in found[:, width:]]


def until(tokens, stop):
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens


def texts(*arguments, **options):
    options = {"max_new_tokens": NEW} | options
    return [row.tolist() for row in generate(*arguments, **options)]


def frequent(rows):
    """Returns the two tokens that end the most texts early, though not at once."""
    counts = Counter(token for row in rows for token in set(row[2:]))
    return [token for token, _ in counts.most_common(2)]


@every_case
@pytest.mark.quick(1)
def test_greedy_texts_equal_those_of_pytorch(case, load):
    theirs, model, params = load(case)
    free = texts(model, params, PROMPTS)
    assert free == torch_texts(theirs, NEVER)
    stop = frequent(free)
    stopped = texts(model, params, PROMPTS, stop=stop)
    assert stopped == torch_texts(theirs, stop)
    assert stopped == [until(row, stop) for row in free] != free


BEAMS = [
    Beams(2),
    Beams(4),
    Beams(4, early_stopping=True),
    Beams(4, length_penalty=0.6),
    Beams(3, length_penalty=2.0, early_stopping=True),
    Beams(2, length_penalty=-1.0),
]


@pytest.mark.parametrize("choice", BEAMS, ids=repr)
@pytest.mark.quick(1)
def test_beams_equal_those_of_pytorch(choice, load):
    theirs, model, params = load("llama")
    free = texts(model, params, PROMPTS)
    lengths = []
    for stop in (frequent(free), free[0][2:4], free[1][3:5], free[2][5:7]):
        found = texts(model, params, PROMPTS, choice=choice, stop=stop)
        assert found == torch_texts(theirs, stop, **vars(choice))
        lengths += map(len, found)
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("case", ["mistral", "bloom"])
def test_beams_that_never_end_equal_those_of_pytorch(case, load):
    theirs, model, params = load(case)
    found = texts(model, params, PROMPTS, choice=Beams(4))
    assert found == torch_texts(theirs, NEVER, num_beams=4)


@pytest.mark.parametrize("case", ["gemma 3", "bloom"])
def test_a_cache_changes_nothing(case, load):
    _, model, params = load(case)
    logits = jax.jit(model)
    row, written = PROMPTS[0], []
    for _ in range(NEW):
        ids = np.array([[*row, *written] + [0] * (NEW - len(written))])
        mask = np.arange(ids.shape[1])[None] < len(row) + len(written)
        scores = logits(params, batch_of(ids, mask))[0, len(row) + len(written) - 1]
        written.append(int(jnp.argmax(scores)))
    assert texts(model, params, [row]) == [written]


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), Prefix(length=3)], ids=lambda method: type(method).__name__
)
def test_what_is_attached_is_used(method, llama):
    model, params = llama
    noise = lambda a: 0.3 * jax.random.normal(jax.random.key(1), a.shape)
    added = method.added(params, jax.random.key(0))
    added = jax.tree.map(lambda a: a + noise(a), added)
    attachment = Attachment(LayerValues(added), response=method.respond)
    written = texts(model, params, PROMPTS[:1], attachment=attachment)
    assert written != texts(model, params, PROMPTS[:1])
    row = np.array([PROMPTS[0] + written[0]])
    scores = model(params, batch_of(row, np.ones_like(row)), attachment=attachment)
    assert jnp.argmax(scores[0, len(PROMPTS[0]) - 1 : -1], -1).tolist() == written[0]


@pytest.mark.parametrize(
    "choice", [Greedy(), Sample(temperature=2.0), Beams(2)], ids=repr
)
@pytest.mark.quick(1)
def test_a_text_does_not_depend_on_the_others(choice, llama):
    options = {"choice": choice, "key": jax.random.key(3)}
    together = texts(*llama, PROMPTS, **options)
    assert texts(*llama, PROMPTS, batch_size=1, **options) == together
    other = {"batch_size": 7, "max_length": 40, "pad_id": 9}
    assert texts(*llama, PROMPTS, **other, **options) == together


def test_samples_of_one_prompt_differ_with_place_and_key(llama):
    draw = lambda seed: texts(
        *llama, PROMPTS[:1] * 3, choice=Sample(2.0), key=jax.random.key(seed)
    )
    first = draw(0)
    assert len({tuple(row) for row in first + draw(1)}) == 6
    assert draw(0) == first


@dataclass(frozen=True)
class Traced(Model):
    """A model that counts how often a program of it is made."""

    count: ClassVar[list[int]] = []

    def cache(self, params, batch_size, length):
        self.count.append(length)
        return super().cache(params, batch_size, length)


def test_one_program_serves_twenty_lengths(llama):
    model, params = llama
    model = Traced(model.head, model.family, model.config)
    Traced.count.clear()
    for length in range(17, 33):
        texts(model, params, [[5] * length])
    texts(model, params, [[6] * 20], stop=())
    assert Traced.count == [32 + NEW - 1]
    texts(model, params, [[5] * length for length in range(1, 17)], batch_size=1)
    assert Traced.count == [32 + NEW - 1, 16 + NEW - 1]
    texts(model, params, [[5] * 40, [5]], max_length=45, batch_size=1)
    assert Traced.count[2:] == [45 + NEW - 1]


def test_layers_apart_share_the_memory_of_the_stack(llama):
    _, params = llama
    pick = lambda layers: layers["mlp"]["up"]["kernel"]
    whole, (_, second) = pick(params["layers"]), map(pick, layers_apart(params))
    size = whole.nbytes // 2
    assert second.shape == (1, 32, 48) and size == 32 * 48 * 4
    assert second.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + size
    np.testing.assert_array_equal(second[0], whole[1])


def test_what_is_not_on_one_device_stays_a_stack(llama):
    _, params = llama
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    assert layers_apart(spread) is None
    assert layers_apart(jax.tree.map(np.asarray, params)) is None


def test_a_stack_writes_what_layers_apart_write(llama, monkeypatch):
    apart = texts(*llama, PROMPTS)
    monkeypatch.setattr("sparse_jax.generation.generate.layers_apart", lambda _: None)
    assert texts(*llama, PROMPTS) == apart


def test_steps_of_several_rows_copy_no_keys_and_values(llama):
    model, params = llama
    rows, none = np.ones((4, 16), np.int32), Attachment()
    prompts = Prompts(rows, rows, np.arange(4, dtype=np.int32))
    lowered = jax.jit(
        _written, static_argnames=("model", "attached", "choice", "max_new_tokens")
    ).lower(
        params, layers_apart(params), none.trained, prompts, jax.random.key(0),
        jnp.zeros((0, 1), jnp.int32), model=model,
        attached=none._replace(trained=None), choice=Greedy(), max_new_tokens=NEW,
    )  # fmt: skip
    text = lowered.compile().as_text()
    cache = f"f32[4,2,{16 + NEW - 1},8]"
    assert cache in text
    assert not re.findall(re.escape(cache) + r"\S* copy\(.*", text)


def test_the_context_can_be_filled(llama):
    written = texts(*llama, [[5] * 52, [7]])
    assert [len(row) for row in written] == [12, 12]
    assert texts(*llama, [[7]]) == written[1:]


def test_nothing_is_written_after_nothing(llama):
    assert texts(*llama, []) == []


def test_a_stop_token_at_once_gives_an_empty_text(llama):
    first = texts(*llama, PROMPTS[:1], max_new_tokens=1)[0]
    found = generate(*llama, PROMPTS[:1], stop=first, max_new_tokens=NEW)
    assert found[0].shape == (0,) and found[0].dtype == np.int32


def test_the_likeliest_of_one_is_greedy(llama):
    key = jax.random.key(0)
    for choice in (Sample(top_k=1), Sample(temperature=1e-4, top_p=1e-6)):
        found = texts(*llama, PROMPTS, choice=choice, key=key)
        assert found == texts(*llama, PROMPTS)


def numpy_distribution(logits, temperature, top_k, top_p):
    """Transcribes temperature, top-k and top-p for one row."""
    scores = logits.astype(np.float64) / temperature
    if top_k is not None:
        scores[scores < np.sort(scores)[-top_k]] = -np.inf
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    if top_p is not None:
        kept, total = [], 0.0
        for token in np.argsort(-weights):
            if total < top_p:
                kept.append(token)
            total += weights[token]
        weights[np.setdiff1d(np.arange(len(weights)), kept)] = 0
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("top_k", [None, 5, 500])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.9, 1.0])
def test_the_distribution_is_that_of_a_transcription(temperature, top_k, top_p):
    logits = 2 * np.random.default_rng(0).normal(size=(3, 61)).astype(np.float32)
    choice = Sample(temperature, top_k, top_p)
    ours = jax.nn.softmax(choice.restricted(jnp.asarray(logits)))
    k = top_k if top_k != 500 else None
    expected = [numpy_distribution(row, temperature, k, top_p) for row in logits]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    np.testing.assert_array_equal(np.array(ours) > 0, np.array(expected) > 0)


def test_the_distribution_is_that_of_pytorch():
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    # Equal logits across the last of the k.
    rounded = np.random.default_rng(0).normal(size=(4, 61)).astype(np.float32).round(1)
    warm, top_k, top_p = TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    scores = top_k(9)(None, warm(0.7)(None, torch.tensor(rounded)))
    ours = Sample(0.7, 9).restricted(jnp.asarray(rounded))
    np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-6)
    logits = np.random.default_rng(0).normal(size=(4, 61)).astype(np.float32)
    scores = top_p(0.8)(None, top_k(30)(None, torch.tensor(logits)))
    ours = Sample(top_k=30, top_p=0.8).restricted(jnp.asarray(logits))
    np.testing.assert_array_equal(ours, scores.numpy())


def test_equals_are_kept_together():
    kept = Sample(top_p=0.5).restricted(jnp.log(jnp.array([[0.3, 0.2, 0.3, 0.2]])))
    assert jnp.isfinite(kept).tolist() == [[True, False, True, False]]
    kept = Sample(top_p=0.2).restricted(jnp.zeros((1, 4)))
    assert jnp.isfinite(kept).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_is_likely(temperature):
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    expected = np.array([0.6, 0.3, 0.1]) ** (1 / temperature)
    expected /= expected.sum()
    number = 4000
    keys = jax.random.split(jax.random.key(0), number)
    choose = jax.jit(Sample(temperature).choose)
    drawn = choose(jnp.tile(logits, (number, 1)), keys)
    shares = np.bincount(drawn, minlength=3) / number
    # Four standard errors.
    error = 4 * np.sqrt(expected * (1 - expected) / number)
    assert (np.abs(shares - expected) < error).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sample(temperature=0), "`temperature` must be positive, got 0"),
        (
            lambda: Sample(temperature=float("nan")),
            "`temperature` must be positive and finite, got nan. Greedy decoding, "
            "without `temperature`, `top_k` and `top_p`, takes the likeliest token.",
        ),
        (lambda: Sample(top_k=0), "`top_k` must be at least 1, got 0"),
        (lambda: Sample(top_p=0.0), r"`top_p` must be in \(0, 1\], got 0.0"),
        (lambda: Beams(1), "`num_beams` must be at least 2, got 1"),
        (lambda: Beams(2, float("inf")), "`length_penalty` must be a finite number"),
        (lambda: Sample(top_p=1.1), r"`top_p` must be in \(0, 1\], got 1.1"),
    ],
)
def test_a_choice_out_of_range_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "`prompt` must have at least one token, .* prompt 0"),
        ([[5], [5] * 53], {}, "at most 52 tokens besides 12 new ones, got 53 for prom"),
        ([[5] * 9], {"max_length": 8}, "`prompt` must have at most 8 tokens"),
        ([[61]], {}, r"`prompt` must be token ids in \[0, 61\), got 61 to 61"),
        ([[-1]], {}, r"`prompt` must be token ids in \[0, 61\), got -1"),
        ([[0.5]], {}, r"`prompt` must be token ids"),
        ([[5]], {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ([[5]], {"max_new_tokens": 64}, "must be less than the 64 positions"),
        ([[5]], {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ([[5]], {"pad_id": -1}, r"`pad_id` must be in \[0, 61\), got -1"),
        ([[5]], {"choice": Sample()}, "`key` must be given for Sample"),
    ],
)
def test_a_wrong_argument_is_named(prompts, options, message, llama):
    with pytest.raises(InputError, match=message):
        texts(*llama, prompts, **options)


def test_an_encoder_writes_nothing():
    config = EncoderConfig(
        vocab_size=9, hidden_size=4, num_layers=1, num_heads=2, intermediate_size=8
    )
    with pytest.raises(InputError, match="`model` must have the head CausalLM, got Ma"):
        generate(Model(MaskedLM, BERT, config), {}, [[5]])

"""A tiny decoder with its tokenizer, and tiny instructions, for whole runs."""

import json

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from sparse_jax import Settings, save_pretrained
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import DecoderConfig
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model
from sparse_jax.params.names import map_named

WORDS = ["say", "red", "blue", "green", "twice", "once", ":", "<unk>", "<s>", "</s>"]
CONFIG = DecoderConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    intermediate_size=24,
    max_positions=32,
)


def tiny_decoder(seed=0):
    """Returns a Llama of four layers and random parameters."""
    model = Model(CausalLM, LLAMA, CONFIG)
    return model, random_params(model, seed)


def random_params(model, seed=0):
    """Returns parameters that are large enough to matter."""
    random = np.random.default_rng(seed)

    def draw(name, leaf):
        scale = 1.0 if name.endswith("/scale") else 0.0
        return jnp.asarray(scale + 0.3 * random.normal(size=leaf.shape), leaf.dtype)

    return map_named(draw, model.abstract())


def write_decoder(folder, seed=0):
    """Writes the decoder and a tokenizer of words."""
    from transformers import PreTrainedTokenizerFast

    save_pretrained(*tiny_decoder(seed), folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_chats(path):
    """Writes questions whose answers repeat a color as they stand."""
    random = np.random.default_rng(0)
    lines = []
    for _ in range(40):
        color = str(random.choice(WORDS[1:4]))
        many = bool(random.integers(2))
        prompt = f"say {color} {'twice' if many else 'once'} :"
        response = " ".join([color] * (2 if many else 1))
        lines.append(json.dumps({"prompt": prompt, "completion": f" {response}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def text_settings(model, data, output, **changes):
    """Returns settings of a run that takes seconds."""
    fields = {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "task": "causal",
        "method": "lora",
        "rank": 2,
        "batch_size": 8,
        "epochs": 1,
        "max_length": 16,
        "held_out": 0.2,
        "learning_rate": 3e-2,
    }
    return Settings(**{**fields, **changes})

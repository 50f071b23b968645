"""A tiny pre-trained model with its tokenizer, and a tiny task, for whole runs."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from sparse_jax import Settings, save_pretrained
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import MaskedLM
from sparse_jax.params.names import map_named

WORDS = ["good", "great", "fine", "bad", "poor", "awful", "film", "book", "a", "the"]
VOCABULARY = {
    word: i
    for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
}
CONFIG = EncoderConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=24,
    max_positions=16,
    initializer_range=0.2,
    # Dropout takes as long to compile as everything else.
    hidden_dropout=0.0,
    attention_dropout=0.0,
    classifier_dropout=0.0,
)


def write_model(folder, dropout=0.0, **sizes):
    """Writes a masked language model: it has neither pooler nor classifier."""
    from transformers import BertTokenizer

    model = Model(MaskedLM, BERT, replace(CONFIG, hidden_dropout=dropout, **sizes))
    random = np.random.default_rng(0)

    def draw(name, leaf):
        scale = 1.0 if name.endswith("/scale") else 0.0
        return jnp.asarray(scale + 0.3 * random.normal(size=leaf.shape), leaf.dtype)

    save_pretrained(model, map_named(draw, model.abstract()), folder)
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizer(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def write_data(folder):
    """Writes sentences that are positive exactly if they have a good word."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, count in (("train", 22), ("dev", 13)):
        rows = []
        for label in random.integers(0, 2, count):
            first = random.choice(WORDS[:3] if label else WORDS[3:6])
            words = [first, *random.choice(WORDS[6:], 4)]
            rows.append({"sentence": " ".join(words), "label": int(label)})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def write_files(folder):
    """Returns the model and the data of a run, as its settings name them."""
    return {
        "model": write_model(folder / "model"),
        "data": write_data(folder / "data"),
    }


def tiny_settings(model, data, output, **changes):
    """Returns settings of a run that takes seconds."""
    fields = {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "task": "sst2",
        "density": 0.1,
        "rank": 2,
        "batch_size": 8,
        "epochs": 1,
        "learning_rate": 3e-2,
    }
    # An object brings its own.
    if not isinstance(changes.get("method", ""), str):
        del fields["density"], fields["rank"]
    return Settings(**{**fields, **changes})

"""The tokenizer of the quickstart's encoder, and its corpus as token ids.

    python -m experiments.quickstart_data.tokens --corpus corpus.npz

trains the tokenizer on the corpus without the documents of the validation rows, writes
it beside the model, and writes the ids for `experiments.quickstart_data.pretrain`.
"""

import argparse
import json
import string
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from tokenizers.trainers import WordPieceTrainer

from experiments.quickstart_data.corpus import documents
from experiments.quickstart_data.task import MODEL, held_out, rows

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4
MOST_TOKENS = 128  # in a sequence
_INNER = string.ascii_lowercase + string.digits  # characters inside a word
_ALPHABET = _INNER + string.punctuation + "‘’“”…–"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a lower-casing WordPiece tokenizer like BERT's."""
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        # Pieces that are not given at the start get their ids, which break ties, in
        # the order of a hash table: another vocabulary each time.
        special_tokens=[*SPECIAL, *(f"##{letter}" for letter in _INNER)],
        initial_alphabet=list(_ALPHABET),
        limit_alphabet=len(_ALPHABET),
        show_progress=False,
    )
    learner = _tokenizer({"[UNK]": 0})
    learner.train_from_iterator(texts, trainer)
    # In a tokenizer of its own the inner letters are pieces, not special tokens.
    tokenizer = _tokenizer(learner.get_vocab())
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def _tokenizer(vocab: dict[str, int]) -> Tokenizer:
    """Returns a tokenizer that splits words as BERT does."""
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder(prefix="##")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer in the Hugging Face layout, as a BERT tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    names = ("pad", "unk", "cls", "sep", "mask")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": MOST_TOKENS,
        **{f"{n}_token": token for n, token in zip(names, SPECIAL, strict=True)},
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text)


def stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns the ids of all texts, a [SEP] after each: uint16 `[N]`."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [np.asarray([*encoding.ids, 3], np.uint16) for encoding in encodings]
    return np.concatenate(ids)


def main() -> None:
    """Writes the tokenizer and the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("corpus.npz"))
    parser.add_argument("--output", type=Path, default=MODEL)
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    corpus = documents()
    hidden = held_out(corpus, rows(corpus)[1])
    seen = [d.text for i, d in enumerate(corpus) if i not in hidden]
    unseen = [d.text for i, d in enumerate(corpus) if i in hidden]
    tokenizer = train_tokenizer(seen, args.vocab_size)
    save_tokenizer(tokenizer, args.output)
    train, validation = stream(tokenizer, seen), stream(tokenizer, unseen)
    np.savez_compressed(args.corpus, train=train, validation=validation)
    print(f"{len(train)} tokens to train on, {len(validation)} held out")


if __name__ == "__main__":
    main()

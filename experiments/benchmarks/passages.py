"""Prompts of different lengths, and questions with candidates, from a passage."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["Question", "encoder", "prompts_of", "questions_of"]

TEXT = """
The harbor lies at the mouth of a slow river, and every morning the boats leave before
the sun is above the hills. Most of them carry nets and empty boxes; a few carry people
who want to see the islands. By noon the wind has turned, and whoever is late has to row
home against it. The old men on the wall know this, and they count the sails. They also
know which of the boats are too heavy, which ones leak, and who will come back without a
catch. In winter the harbor is quiet. The nets hang in the sheds, the ropes are mended,
and the children learn knots from the same men who counted the sails in June. When the
ice goes, the oldest of them walks to the end of the wall and looks at the river. If the
water is brown, he says, the fish are still far out; if it is green, they will be here
within a week. He has been wrong only once, in the year of the flood, when the river
carried trees into the bay and the boats stayed on land until the end of May.
"""
# Words of the prompts, and of the candidates of a question.
LENGTHS = (8, 12, 18, 25, 34, 45, 58, 72)
CANDIDATES = (2, 3, 5, 4, 3)

Question = tuple[np.ndarray, list[np.ndarray]]  # the prompt; the candidates


def encoder(model: str) -> Callable[[str], np.ndarray]:
    """Returns a function that gives the tokens of a text: bytes without a tokenizer."""
    if not (Path(model) / "tokenizer.json").is_file():
        return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: np.array(tokenizer(text)["input_ids"], np.int32)


def prompts_of(encode: Callable[[str], np.ndarray], number: int) -> list[np.ndarray]:
    """Returns the tokens of passages of different lengths."""
    words = TEXT.split()
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(number)]
    starts = [13 * i % (len(words) - max(LENGTHS)) for i in range(number)]
    return [
        encode(" ".join(words[start : start + length]))
        for start, length in zip(starts, lengths, strict=True)
    ]


def questions_of(encode: Callable[[str], np.ndarray], number: int) -> list[Question]:
    """Returns passages with four or five ways to go on."""
    words = TEXT.split()
    found = []
    for i, prompt in enumerate(prompts_of(encode, number)):
        sizes = CANDIDATES[: 4 + i % 2]
        starts = [
            17 * (i + 5 * place) % (len(words) - 8) for place in range(len(sizes))
        ]
        texts = [
            " " + " ".join(words[start : start + size])
            for start, size in zip(starts, sizes, strict=True)
        ]
        found.append((prompt, [encode(text) for text in texts]))
    return found

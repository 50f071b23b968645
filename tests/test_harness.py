"""The adapter of lm-evaluation-harness returns what its own model does."""

import numpy as np
import pytest
from tiny_text import write_decoder

from sparse_jax.generation.harness import harness_model
from sparse_jax.generation.writer import load_writer

lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

PAIRS = [
    ("say red", " twice"),
    ("say red", " once : red"),
    ("", "say blue"),
    ("say red twice : " * 9, "red"),
]
TEXTS = ["say red twice : red red", "say blue once : " * 15]
PROMPTS = [
    ("say red", {"until": ["blue"], "max_gen_toks": 6}),
    ("say", {"until": [], "max_gen_toks": 8}),
    ("say", {"until": [], "max_new_tokens": 3}),
]


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


@pytest.mark.filterwarnings("ignore")
def test_every_method_returns_what_the_model_of_the_harness_does(tmp_path):
    from lm_eval.models.huggingface import HFLM

    folder = str(write_decoder(tmp_path))
    ours = harness_model(load_writer(folder))
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", max_length=32)
    asked = requests("loglikelihood", PAIRS)
    found, wanted = (one.loglikelihood(asked) for one in (ours, theirs))
    np.testing.assert_allclose(*([x for x, _ in y] for y in (found, wanted)), rtol=1e-4)
    assert [x for _, x in found] == [x for _, x in wanted]
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    found, wanted = (one.loglikelihood_rolling(asked) for one in (ours, theirs))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    asked = requests("generate_until", PROMPTS)
    found, wanted = (one.generate_until(asked) for one in (ours, theirs))
    assert [one.strip() for one in found] == [one.strip() for one in wanted]

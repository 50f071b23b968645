"""A run that stays near its base: compared, stopped, and brought into its budget."""

import json
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_text import WORDS, text_settings, tiny_decoder, write_chats, write_decoder

from sparse_jax import InputError, Settings, evaluate_adapter, finetune, load_adapter
from sparse_jax.training.kl_budget import KlBudget, strength_within
from sparse_jax.training.loop import Loop

BUDGET = 0.02


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns the model and the data of a run, and a text of 40 words."""
    folder = tmp_path_factory.mktemp("files")
    words = np.random.default_rng(1).choice(WORDS[:7], 40)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    model, data = folder / "model", folder / "chats.jsonl"
    return write_decoder(model), write_chats(data), folder / "text.txt"


def budget_settings(files, output, **changes):
    *places, text = files
    fields = {"method": "sift", "density": 0.1, "kl_text": text, "kl_budget": BUDGET}
    fields |= {"eval_every": 1, "save_every": 1}
    return text_settings(*places, output, **{**fields, **changes})


def rows_of(run, split):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("split") == split]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Returns the folder of a run that ends outside of its budget."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finetune(budget_settings(files, run))
    return run


def test_a_text_that_is_not_there_is_told_before_the_model_is_read(files, tmp_path):
    for gone in (tmp_path / "gone.txt", tmp_path):
        settings = budget_settings(files, tmp_path / "run", kl_text=gone)
        settings = replace(settings, model="no-model")
        with pytest.raises(InputError, match="`kl_text` must be a file, got "):
            finetune(settings)


def test_the_strength_is_lowered_to_the_budget_at_the_end(files, whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    kls = [row["kl"] for row in rows_of(whole, "text")]
    # After every update but the last, at the end of the epoch, and in the budget.
    assert [row["step"] for row in rows_of(whole, "text")] == [1, 2, 3, 4, 4]
    assert 0 < kls[0] < kls[1] < kls[2] < kls[3]
    assert kls[3] > BUDGET >= kls[4] > 0.9 * BUDGET
    assert 0 < metrics["strength"] < 1
    assert (metrics["kl_budget"], metrics["eval"]["kl_text"]) == (BUDGET, kls[4])
    assert (
        "above `kl_budget`: the change to the base is scaled by"
        in metrics["warnings"][0]
    )
    # The evaluation of the task is that of the adapter in the file, too.
    *_, first, last = (row["loss"] for row in rows_of(whole, "validation"))
    assert first < last == metrics["eval"]["loss"]
    adapter = load_adapter(whole)
    assert adapter.settings["strength"] == metrics["strength"]
    found = evaluate_adapter(whole, data=str(files[1]), text=files[2])
    assert found == pytest.approx(metrics["eval"], rel=1e-6)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.slow
def test_a_run_stopped_anywhere_ends_in_the_same_budget(
    batches, files, whole, tmp_path, monkeypatch
):
    update = Loop._batch

    def stop(loop, state, at, batch):
        if at.batches == batches:
            raise KeyboardInterrupt
        return update(loop, state, at, batch)

    settings = budget_settings(files, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_batch", stop)
        finetune(settings)
    finetune(replace(settings, resume=True))
    name = "adapter.safetensors"
    assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert rows_of(whole, "text") == rows_of(tmp_path / "run", "text")


@pytest.mark.slow
def test_a_run_ends_at_the_first_comparison_above_its_budget(files, whole, tmp_path):
    kls = [row["kl"] for row in rows_of(whole, "text")]
    settings = budget_settings(files, tmp_path / "run", kl_budget=kls[1], kl_stop=True)
    metrics = finetune(settings)
    assert [row["step"] for row in rows_of(tmp_path / "run", "text")] == [1, 2, 3, 3]
    assert (metrics["steps"], metrics["strength"] < 1) == (3, True)
    assert metrics["eval"]["kl_text"] <= kls[1]


def test_a_run_that_stops_before_its_selection_names_the_budget(files, tmp_path):
    options = {"kl_budget": 1e-9, "kl_stop": True, "dense": ("scale$",)}
    settings = budget_settings(files, tmp_path / "run", select_after=3, **options)
    with pytest.raises(InputError, match="`kl_stop` must .* after 1 of the 3 updates"):
        finetune(settings)


# A copy of all, what is added to the base, layers in turn, values with masters.
METHODS = {
    "full": {"method": "full"},
    "dora": {"method": "dora"},
    "layers": {"sampler": "uniform", "active": 0.5},
    "bfloat16": {
        "dtype": "bfloat16",
        "split_masters": True,
        "sampler": "ist",
        "active": 0.5,
    },  # fmt: skip
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_every_method_is_brought_into_the_budget(name, files, tmp_path):
    changes = {
        "eval_every": None,
        "save_every": 100,
        "max_steps": 3,
        **METHODS[name],
    }
    settings = budget_settings(files, tmp_path / "run", **changes)
    metrics = finetune(settings)
    assert metrics["strength"] < 1
    assert 0.5 * BUDGET < metrics["eval"]["kl_text"] <= BUDGET
    found = evaluate_adapter(tmp_path / "run", text=files[2])
    assert found["kl_text"] == pytest.approx(metrics["eval"]["kl_text"], rel=1e-3)
    # Entries that are not in the adapter are those of the base.
    if name == "layers":
        leaf = "layers/attention/query/kernel"
        adapter, base = load_adapter(tmp_path / "run"), tiny_decoder()[1]
        values = np.asarray(base["layers"]["attention"]["query"]["kernel"])
        rows = zip(values, adapter.support[leaf], strict=True)
        start = np.stack([row.reshape(-1)[support] for row, support in rows])
        assert jnp.abs(adapter.values[leaf] - start).max() < 3 * 3e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_budget": 0.1}, "`kl_text` must be given with `kl_budget`, got nothing"),
        ({"eval_every": 0}, "`eval_every` must be positive, got 0"),
        ({"kl_text": "t", "kl_stop": True}, "`kl_budget` must be given with `kl_stop`"),
        ({"kl_text": "t", "kl_budget": -1.0}, "`kl_budget` must be positive, got -1"),
        (
            {"kl_text": "t", "task": "mrpc"},
            "`kl_text` must be left out with task 'mrpc",
        ),
        ({"kl_text": "t", "reselect_every": 2}, "be left out with `reselect_every`"),
        ({"kl_text": "t", "adapter": "a"}, "`kl_text` must be left out with `adapter`"),
        (
            {"kl_text": "t", "optimizer": "schedule_free_adamw"},
            "`kl_text` must be left out with optimizer 'schedule_free_adamw'",
        ),
        (
            {"kl_text": "t", "kl_budget": 0.1, "method": "prefix"},
            "`kl_budget` must be left out with Prefix",
        ),
    ],
)
def test_a_budget_that_means_nothing_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Settings(**{"model": "m", "task": "causal", "output": "o", **options})


def test_what_is_not_a_number_is_over_a_budget_only_where_there_is_one():
    budget = object.__new__(KlBudget)
    for budget._most in (0.1, math.inf):
        assert budget.is_over({"kl": math.nan}) == (budget._most == 0.1)
        assert not budget.is_over({"kl": 0.05})


def test_the_strength_is_found_where_the_kl_is_no_square():
    kinked = lambda strength: 0.0 if strength < 0.3 else 5 * (strength - 0.3)
    assert 0.3 < strength_within(0.01, kinked, 3.5) <= 0.302
    # What is not finite is above every budget.
    jumps = lambda strength: strength**2 if strength < 0.2 else float("nan")
    assert 0.15 < strength_within(0.1, jumps, float("nan")) < 0.2

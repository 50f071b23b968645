"""A run reports what it did, can be continued, and leaves what repeats it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import CONFIG, tiny_settings, write_data, write_model

from sparse_jax import InputError, Settings, evaluate_adapter, finetune, load_adapter
from sparse_jax.training.build import head_rules, make_job, make_tuner, method_of
from sparse_jax.training.checkpoint import Checkpoints
from sparse_jax.training.objective import make_loss
from sparse_jax.training.optimizer import learning_rate_at, make_optimizer, schedule_of
from sparse_jax.training.run_directory import RunDirectory

D, L = CONFIG.hidden_size, CONFIG.num_layers
HEAD = D * D + D + 2 * D + 2  # pooler and classifier, both new
MAPS = L * 4 * (D * D + D)  # query, key, value and attention output
SPARSE = L * 4 * (26 + 2)  # a tenth of 256 and of 16 entries, rounded up
LORA = L * 4 * 2 * (D * 2)
BIASES = L * (4 * D + 2 * D + 24 + D) + D  # maps, two norms, MLP; embedding norm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "sst2")


def rows_of(output):
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("changes", "without_head"),
    [
        ({"method": "head"}, 0),
        ({"method": "bitfit"}, BIASES),
        pytest.param(
            {"method": "lora", "dtype": "bfloat16"}, LORA, marks=pytest.mark.slow
        ),
        ({"method": "sift", "dtype": "bfloat16", "accumulate": 2}, SPARSE),
        ({"method": "random", "checkpointing": True}, SPARSE),
        pytest.param(
            {"method": "magnitude", "density": 1.0}, MAPS, marks=pytest.mark.slow
        ),
        pytest.param({"method": "full"}, None, marks=pytest.mark.slow),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
@pytest.mark.quick(1)
def test_an_adapter_repeats_the_metrics_of_its_run(
    model, data, tmp_path, changes, without_head
):
    metrics = finetune(tiny_settings(model, data, tmp_path / "run", **changes))
    if without_head is None:
        without_head = metrics["total_parameters"] - HEAD
    assert metrics["trained_parameters_without_head"] == without_head
    assert metrics["trained_parameters"] == without_head + HEAD
    assert metrics["steps"] == 3
    assert load_adapter(tmp_path / "run").entries == without_head + HEAD
    assert evaluate_adapter(tmp_path / "run", data=str(data)) == metrics["eval"]


def test_a_run_directory_holds_what_a_script_relies_on(model, data, tmp_path, pictures):
    output = tmp_path / "new" / "run"
    metrics = finetune(tiny_settings(model, data, output, epochs=4))
    names = sorted(path.name for path in output.iterdir())
    assert names == [
        "adapter.safetensors", "config.json", "curve.png", "metrics.json",
        "metrics.jsonl",
    ]  # fmt: skip
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert metrics["adapter_bytes"] == (output / names[0]).stat().st_size
    # Two moments for each trained value, a position for each sparse one, two counters.
    trained = metrics["trained_parameters"]
    assert metrics["optimizer_bytes"] == 8 * trained + 4 * SPARSE + 2 * 4
    assert metrics["seconds_per_step"] > 0
    assert metrics["peak_memory_bytes"] > 0
    config = json.loads((output / "config.json").read_text())
    asked = tiny_settings(model, data, output, epochs=4)
    assert Settings(**config["settings"]).record() == asked.record()
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")
    losses = [row["loss"] for row in rows_of(output) if "tokens" in row]
    assert len(losses) == 12
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("dtype", "dropout"), [("bfloat16", 0.1)])
def test_a_continued_run_gives_the_numbers_of_an_uninterrupted_one(
    data, tmp_path, monkeypatch, dtype, dropout
):
    model = write_model(tmp_path / "model", dropout)
    options = {"epochs": 2, "save_every": 2, "dtype": dtype, "sampler": "ist"}
    if dropout:  # Fewer supports compile faster.
        options["where"] = ("query",)
    whole = finetune(tiny_settings(model, data, tmp_path / "whole", **options))
    broken = tiny_settings(model, data, tmp_path / "broken", **options)
    save = Checkpoints.save

    # Checkpoints are after batches 2, 3 (end of the epoch), 4, and 6.
    def die_at_four(self, state, at):
        save(self, state, at)
        if at.batches == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", die_at_four)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken)
    monkeypatch.undo()
    assert not (tmp_path / "broken" / "metrics.json").exists()
    again = tiny_settings(model, data, tmp_path / "broken", resume=True, **options)
    metrics = finetune(again)
    same = ("eval", "splits", "steps", "trained_parameters", "optimizer_bytes")
    assert [metrics[name] for name in same] == [whole[name] for name in same]
    timeless = lambda rows: [
        {k: v for k, v in row.items() if k not in ("seconds", "is_compiling")}
        for row in rows
    ]
    rows = rows_of(tmp_path / "whole")
    assert timeless(rows_of(tmp_path / "broken")) == timeless(rows)
    # Lists are written once, and losses of probes if there are any.
    assert ["importance" in row for row in rows[1:3]] == [True, False]
    assert not any("probe_losses" in row for row in rows)
    [warning] = [line for line in whole["warnings"] if "probe" in line]
    assert "evenly in 6 updates: its first probe comes after 10" in warning
    a, b = (tmp_path / name / "adapter.safetensors" for name in ("whole", "broken"))
    assert a.read_bytes() == b.read_bytes()
    # A finished run has nothing left to do.
    assert finetune(again) == metrics


def test_a_run_resumes_only_with_its_own_settings(model, data, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with pytest.raises(InputError, match=r"must hold the `config.json` of a run"):
        finetune(tiny_settings(model, data, output, resume=True))
    finetune(tiny_settings(model, data, output, method="head", max_steps=1))
    with pytest.raises(InputError, match="`method` must be 'head' as in the run"):
        finetune(tiny_settings(model, data, output, max_steps=1, resume=True))


def test_a_run_from_before_groups_by_length_as_it_did(model, data, tmp_path):
    options = {"method": "head", "max_steps": 1}
    finetune(tiny_settings(model, data, tmp_path, **options))
    config = tmp_path / "config.json"
    stored = json.loads(config.read_text())
    assert stored["settings"].pop("group_by_length") is False
    config.write_text(json.dumps(stored))
    again = tiny_settings(model, data, tmp_path, **options, resume=True)
    with pytest.raises(
        InputError, match="`group_by_length` must be True as in the run"
    ):
        finetune(again)
    finetune(replace(again, group_by_length=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json` must be a JSON object, which it is not"),
        ("[]", "config.json` must be a JSON object, got list"),
        ("{}", "config.json` must have the settings of a run"),
    ],
)
def test_settings_of_a_run_that_are_damaged_are_named(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        finetune(tiny_settings("model", "data", tmp_path, resume=True))


def test_results_of_a_run_that_are_damaged_are_named(tmp_path):
    directory = RunDirectory(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(InputError, match="metrics.json` must be a JSON object"):
        directory.finished()
    # The last line was cut off by the end of a program.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert RunDirectory(tmp_path).rows == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{}\n')
    with pytest.raises(InputError, match="metrics.jsonl` line 2 must be a JSON obj"):
        RunDirectory(tmp_path)


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_is_no_output_folder(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="`output` must be a folder, got the file"):
        finetune(tiny_settings("model", "data", tmp_path / name))


def test_overwriting_replaces_the_files_of_a_run_and_no_others(model, data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text('{"step": 99}\n')
    settings = tiny_settings(
        model, data, tmp_path, method="head", max_steps=1, overwrite=True
    )
    finetune(settings)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 1]


def test_the_head_is_that_of_the_task_and_what_a_checkpoint_lacks():
    assert head_rules(["classifier"], []) == ("^classifier/",)
    new = ["classifier/bias", "pooler/kernel"]
    assert head_rules(["classifier"], new) == ("^classifier/", "^pooler/")
    settings = Settings(model="m", task="mrpc", output="o", method="sift")
    assert method_of(settings, ("^classifier/",)).dense == ("^classifier/",)


def test_the_rate_rises_for_six_percent_and_falls_to_the_end():
    schedule = schedule_of(1.0, 100)
    rates = [float(learning_rate_at(count, schedule)) for count in range(100)]
    assert rates[0] == pytest.approx(1 / 6)
    assert rates[5] == 1.0
    assert np.argmax(rates) == 5
    assert rates[-1] == pytest.approx(1 / 95)


@pytest.mark.parametrize(("warmup", "peak_at"), [(0, 0), (0.1, 1), (1, 0), (5, 4)])
def test_the_warmup_is_a_fraction_of_the_updates_or_their_number(warmup, peak_at):
    schedule = schedule_of(1.0, 20, warmup)
    rates = [float(learning_rate_at(count, schedule)) for count in range(20)]
    assert (np.argmax(rates), max(rates)) == (peak_at, 1.0)
    assert min(rates) > 0


def test_a_warmup_longer_than_the_run_is_refused_before_it(model, data, tmp_path):
    settings = tiny_settings(model, data, tmp_path / "run", warmup=4)
    with pytest.raises(InputError, match="`warmup` must be at most 3, the updates"):
        make_job(settings)


def test_the_norm_of_the_gradient_is_clipped_to_one(model, data, tmp_path):
    def make(**more):
        settings = tiny_settings(model, data, tmp_path / "run", **more)
        job = make_job(settings)
        parts = (job.method, job.sampler, job.base.placement)
        return make_tuner(settings, make_loss(job.base.model), *parts)

    tx, params = make().tx, {"w": jnp.zeros(2)}
    tx, grads = optax.with_extra_args_support(tx), {"w": jnp.array([30.0, 40.0])}
    _, state = tx.update(grads, tx.init(params), params, schedule=schedule_of(1.0, 9))
    mean = optax.tree.get(state, "mu")["w"]
    np.testing.assert_allclose(mean, [0.06, 0.08], rtol=1e-6)
    assert make(sampler="uniform").max_norm == 1.0


@pytest.mark.parametrize("sampler", [None, "uniform"])
def test_a_sweep_over_rates_and_lengths_compiles_once(model, data, tmp_path, sampler):
    def program(rate, updates, **more):
        settings = tiny_settings(
            model, data, tmp_path / "run", learning_rate=rate, method="bitfit",
            sampler=sampler, max_steps=min(updates, 3), **more,
        )  # fmt: skip
        job = make_job(settings)
        devices, loss = job.base.placement, make_loss(job.base.model)
        tuner = make_tuner(settings, loss, job.method, job.sampler, devices)
        key, schedule = jax.random.key(0), job.schedule(is_selected=True)
        state = jax.eval_shape(tuner.init, job.base.params, key)
        batch = next(iter(job.feed.train(0)))
        step = jax.jit(tuner.step, donate_argnums=0)
        return step.lower(state, batch, key, schedule=schedule).as_text()

    first = program(1e-3, 10)
    assert "tensor<f32>" in first
    assert first == program(2e-3, 10) == program(1e-3, 2, weight_decay=0.1)
    assert first == program(1e-3, 10, schedule="cosine", warmup=2)


def test_a_schedule_that_is_passed_gives_the_bits_of_one_that_is_compiled_in():
    def rate(count, peak=1e-2, updates=50, warm_up=3):
        count = count.astype(jnp.float32)
        fall = (updates - count) / (updates - warm_up + 1)
        return peak * jnp.minimum((count + 1) / warm_up, fall)

    params, schedule = {"w": jnp.linspace(-1, 1, 7)}, schedule_of(1e-2, 50)
    known = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    ours, ends = make_optimizer(), []
    # Checkpoints of before have arrays at these places.
    places = lambda tx: [x for x, _ in jax.tree.leaves_with_path(tx.init(params))]
    assert places(ours) == places(known)
    for tx, extra in ((known, {}), (ours, {"schedule": schedule})):

        @jax.jit
        def step(params, state, extra, tx=tx):
            grads = jax.tree.map(jnp.sin, params)
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        now, state = params, tx.init(params)
        for _ in range(50):
            now, state = step(now, state, extra)
        ends.append(jax.tree.map(np.asarray, (now, state)))
    for pair in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(*pair)


def test_a_filler_row_has_no_loss():
    logits = jnp.array([[2.0], [5.0]])
    loss = make_loss(lambda *args, **options: logits)
    batch = {"labels": jnp.array([1.0, 9.0]), "weights": jnp.array([1.0, 0.0])}
    assert loss({}, batch, None, None) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sifted"}, "`method` must be one of full, head"),
        ({"dtype": "float16"}, "`dtype` must be one of float32, bfloat16"),
        ({"rank": 0}, "`rank` must be positive, got 0"),
        (
            {"learning_rate": float("nan")},
            "`learning_rate` must be positive and finite, got nan",
        ),
        ({"method": "head", "where": ("query",)}, "`where` must be left out"),
        ({"accumulate": 3}, "`accumulate` must divide `batch_size`=8, got 3"),
        ({"overwrite": True, "resume": True}, "must not be given together"),
        ({"seed": -1}, "`seed` must be in"),
        (
            {"task": "causal", "packing": True, "group_by_length": True},
            "`group_by_length` must be left out with `packing`",
        ),
    ],
)
def test_settings_that_break_a_rule_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        tiny_settings("model", "data", "output", **changes)

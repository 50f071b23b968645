"""Settings: on the command line, in files, as words and as objects."""

import json
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import yaml
from tiny_run import tiny_settings, write_data, write_model
from typer.main import get_command

from sparse_jax import (
    LANE,
    Callbacks,
    Cyclic,
    Importance,
    InputError,
    LoRA,
    Series,
    Settings,
    Sparse,
    Uniform,
    evaluate_adapter,
    finetune,
    ist,
    load_adapter,
    register_sampler,
)
from sparse_jax.cli.main import app, main
from sparse_jax.methods.registry import METHODS
from sparse_jax.samplers.registry import SAMPLERS
from sparse_jax.training.build import method_of, sampler_of
from sparse_jax.training.config_file import read_settings
from sparse_jax.training.output_folder import require_usable

RUN = {"model": "m", "task": "sst2", "output": "o"}
HEAD = ("^classifier/",)
# Of the command line alone: files, processes, and a short way to write --sampler.
ALONE = {
    "config", "ist", "devices", "distributed", "coordinator", "processes", "process",
    "help",
}  # fmt: skip
# Objects that have no word.
NO_OPTION: set[str] = set()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_model(folder / "model"), write_data(folder / "data")


def options_of(command):
    return {one.name: one for one in get_command(app).commands[command].params}


def help_of(command, capsys, monkeypatch):
    """Returns the paragraphs of a help page by their options."""
    monkeypatch.setattr(sys, "argv", ["sparse-jax", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    page = re.sub(r"^\S.*:$", "", capsys.readouterr().out, flags=re.MULTILINE)
    parts = re.split(r"^  --", page, flags=re.MULTILINE)[1:]
    return {part.split()[0].replace("-", "_"): " ".join(part.split()) for part in parts}


def test_every_setting_is_an_option_and_every_option_a_setting():
    names = {one.name for one in fields(Settings)} - NO_OPTION
    assert options_of("finetune").keys() - ALONE == names


@pytest.mark.parametrize("command", ["finetune", "evaluate", "generate", "plan"])
def test_the_help_shows_the_default_that_holds(command, capsys, monkeypatch):
    for name, text in help_of(command, capsys, monkeypatch).items():
        option = options_of(command).get(name)
        if option is None or option.is_flag:
            continue
        assert text.endswith("[required]") or "[default: " in text, name
        if option.default is not None:
            assert f"[default: {option.default}]" in text


def test_the_help_of_finetune_shows_the_defaults_of_methods(capsys, monkeypatch):
    shown = help_of("finetune", capsys, monkeypatch)
    for name in ("size", "activation", "prefix_length", "dropout"):
        entry = next(one for one in METHODS.values() if name in one.options)
        made = entry.make({"rank": 1})
        default = getattr(made, entry.options[name].field)
        default = getattr(default, "__name__", default)
        text = default if isinstance(default, str) else f"{default:g}"
        assert f"[default: {text}]" in shown[name]
    for word, entry in METHODS.items():
        assert re.search(rf"\b{word}\b", shown["method"])
        assert f"{entry.learning_rate:g} for" in shown["learning_rate"]
    for word in SAMPLERS:
        assert f"({word})" in shown["sampler"]


OBJECTS = {
    "sift": (
        Sparse(density=0.1, where=("^layers/attention/(query|key|value|output)/",)),
        {"method": "sift", "density": 0.1},
    ),
    "lora": (
        LoRA(rank=2, alpha=3.0, where=("^attention/(query|key|value|output)$",)),
        {"method": "lora", "rank": 2, "alpha": 3.0},
    ),
    "series": (
        Series(size=4, activation=jax.nn.silu),
        {"method": "series", "size": 4, "activation": "silu"},
    ),
}


@pytest.mark.parametrize(("made", "words"), OBJECTS.values(), ids=OBJECTS)
def test_an_object_is_what_its_words_make(made, words):
    by_object = method_of(Settings(**RUN, method=made), HEAD)
    assert by_object == method_of(Settings(**RUN, **words), HEAD)
    assert Settings(**RUN, method=made).method_word == words["method"]


def test_a_sampler_is_what_its_words_make():
    made = Importance.fitted(num_layers=4, num_active=2, probe_every=3)
    words = Settings(**RUN, sampler="ist", active=0.5, probe_every=3)
    assert sampler_of(words, 4) == made
    assert sampler_of(Settings(**RUN, sampler=made), 4) == made
    assert Settings(**RUN, sampler=made).sampler_word == "ist"


NEEDED = {"layers": (0, 2), "layer_weights": (1.0, 1.0, 2.0, 2.0)}


@pytest.mark.parametrize("word", SAMPLERS)
def test_every_sampler_is_made_from_its_options_and_recorded(word):
    entry = SAMPLERS[word]
    given = {name: NEEDED[name] for name in entry.required}
    active = {"active": 0.5} if "active" in entry.options else {}
    made = sampler_of(Settings(**RUN, sampler=word, **active, **given), 4)
    assert (made.num_layers, made.num_active) == (4, 2)
    record = Settings(**RUN, sampler=made).record()["sampler"]
    assert record["name"] == word
    assert {**record} == json.loads(json.dumps(record))
    for name in entry.required:
        left_out = {key: value for key, value in given.items() if key != name}
        with pytest.raises(InputError, match=f"`{name}` must be given with sampler"):
            Settings(**RUN, sampler=word, **left_out)


def arrays_of(folder):
    adapter = load_adapter(folder)
    return jax.tree.map(
        np.asarray, (adapter.support, adapter.values, adapter.dense, adapter.added)
    )


@pytest.mark.slow
def test_a_run_of_objects_is_that_of_their_words_to_the_last_bit(files, tmp_path):
    """Also from the `config.json` of the first, which its words are not in."""
    where = ("^layers/attention/query/",)
    made, words = Sparse(density=0.1, where=where), {"method": "sift", "density": 0.1}
    sampler = Uniform(num_layers=2, num_active=1, hold=2)
    names = ("one", "two", "three")
    one, two, three = (tmp_path / name for name in names)
    objects = {"method": made, "sampler": sampler, "max_steps": 2}
    metrics = finetune(tiny_settings(*files, one, **objects))
    words |= {"where": where, "sampler": "uniform", "active": 0.5, "hold": 2}
    again = finetune(tiny_settings(*files, two, **words), max_steps=2)
    read = read_settings(one / "config.json")
    assert (read["method"], read["sampler"]) == (made, sampler)
    third = finetune(**{**read, "output": str(three)})
    changed = {"method": replace(made, density=0.5), "resume": True}
    with pytest.raises(InputError, match="`density` of `method` must be .* got 0.5"):
        finetune(**{**read, "output": str(three), **changed})
    assert metrics["eval"] == again["eval"] == third["eval"]
    for other in (two, three):
        jax.tree.map(np.testing.assert_array_equal, arrays_of(one), arrays_of(other))
    assert evaluate_adapter(one, data=str(files[1])) == metrics["eval"]


def test_a_run_takes_an_optimizer_and_needs_it_to_resume(files, tmp_path):
    given = {"learning_rate": None, "method": "head", "max_steps": 1}
    settings = tiny_settings(*files, tmp_path / "run", **given)
    metrics = finetune(settings, optimizer=optax.sgd(0.1))
    assert metrics["learning_rate"] is None
    # Plain descent has no moments.
    assert metrics["optimizer_bytes"] < 100
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["optimizer"] == "own"
    assert finetune(settings, optimizer=optax.sgd(0.1), resume=True) == metrics
    with pytest.raises(InputError, match="`optimizer` must be passed .* Pass the same"):
        finetune(settings, resume=True)
    with pytest.raises(
        InputError, match="`optimizer` in .* must be a name such as adamw, got 'own'"
    ):
        read_settings(tmp_path / "run" / "config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": LoRA(rank=2), "alpha": 2.0}, "`alpha` must be left out with meth"),
        ({"method": LoRA(rank=2), "rank": 8, "density": 0.5}, "`density` must be left"),
        ({"method": LoRA(rank=2), "rank": 4}, "`rank` must be left .*: set it there"),
        ({"method": LoRA(rank=2), "rank": 8}, "`rank` must be left .* got 8. An obj"),
        ({"method": LoRA(rank=2), "rslora": False}, "`rslora` must be left out with m"),
        ({"method": Sparse(density=0.1), "score": "gradient"}, "`score` must be left"),
        ({"method": Sparse(density=0.1), "density": 0.5}, "`density` must be left out"),
        ({"method": LoRA(rank=2, dense="a"), "dense": ("b",)}, "`dense` must be left"),
        ({"method": object()}, "`method` must be of a registered class"),
        ({"sampler": object()}, "`sampler` must be one of ist, uniform"),
        ({"sampler": Uniform(num_layers=2, num_active=1), "hold": 2}, "`hold` must be"),
        (
            {"granularity": LANE},
            "`granularity` must be one of entry, entry16, .*, got ",
        ),
        ({"score": lambda gradient, param: param}, "`score` must be one of gradient, "),
        (
            {"method": "series", "activation": jax.nn.gelu},
            "`activation` must be one of",
        ),
        ({"optimizer": optax.sgd}, "`optimizer` must be an Optax transformation"),
        ({"optimizer": optax.sgd(1.0), "learning_rate": 1.0}, "`learning_rate` must"),
        ({"optimizer": optax.sgd(1.0), "warmup": 0.1}, "`warmup` must be left out"),
        ({"warmup": 1.5}, r"`warmup` must be a fraction of the updates in \[0, 1\)"),
        ({"warmup": float("nan")}, "`warmup` must be .*, got nan"),
        ({"optimizer": optax.lbfgs()}, "`optimizer` must make updates .*'value_fn'"),
        (
            {"optimizer": optax.contrib.reduce_on_plateau()},
            "`optimizer` must make updates of .* argument: 'value'. Choose another",
        ),
    ],
)
def test_objects_that_contradict_other_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Settings(**RUN, **options)


OF_ANOTHER_TYPE = {
    "batch_size": ("8", True, 8.0, None),
    "accumulate": (2.0,),
    "epochs": (1.5,),
    "max_steps": (2.5, "3"),
    "seed": (0.5, None),
    "keep": ("2",),
    "rank": (2.0,),
    "learning_rate": ("1e-3", True, [1e-3], 10**400),
    "density": ("0.1",),
    "active": (None,),
    "held_out": ("0.1",),
    "mesh": (3,),
    "task": (None, 3),
    "model": (None, b"m"),
    "dtype": (3,),
    "template": (3,),
    "method": (None, 3),
    "sampler": (3,),
    "score": (3,),
    "resume": ("no", 1),
    "packing": ("false",),
    "where": (3, [3], ("a", None)),
    "dense": ({"a": 1},),
    "layers": ((1.5,), "0", 0.5),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in OF_ANOTHER_TYPE.items() for value in values],
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(InputError, match=f"^`{name}` must be .*, got "):
        Settings(**{**RUN, name: value})


def test_values_are_plain_python():
    given = {
        "model": Path("m"), "output": Path("a") / "b", "data": Path("d"),
        "batch_size": np.int64(8), "learning_rate": np.float32(0.5), "dense": "bias$",
        "where": ["query", "key"], "sampler": "static", "layers": [np.int32(1)],
    }  # fmt: skip
    settings = Settings(**{**RUN, **given})
    assert (settings.model, settings.output, settings.data) == ("m", "a/b", "d")
    assert json.loads(json.dumps(settings.record()))["batch_size"] == 8
    assert (settings.learning_rate, type(settings.learning_rate)) == (0.5, float)
    assert (settings.dense, settings.where) == (("bias$",), ("query", "key"))
    assert settings.layers == (1,)


def test_a_sampler_for_another_model_is_refused():
    settings = Settings(**RUN, sampler=Uniform(num_layers=3, num_active=1))
    with pytest.raises(InputError, match="`num_layers` of the sampler must be 2, "):
        sampler_of(settings, 2)


def test_no_rule_at_all_is_the_default():
    settings = Settings(**RUN, where=(), dense=())
    assert method_of(settings, HEAD) == method_of(Settings(**RUN), HEAD)


def test_the_numbers_of_numpy_are_recorded():
    settings = Settings(**RUN, method=LoRA(rank=np.int64(4), alpha=np.float32(2)))
    method = json.loads(json.dumps(settings.record()))["method"]
    assert (method["rank"], method["alpha"]) == (4, 2.0)


def test_the_settings_of_a_file_are_those_that_were_written(tmp_path):
    settings = Settings(
        **RUN, method="lora", rank=4, where=("query",), sampler="static", layers=(0, 1),
        learning_rate=3e-5, mesh="data=2",
    )  # fmt: skip
    record = json.loads(json.dumps(settings.record()))
    for name, text in {
        "whole.json": json.dumps({"settings": record, "versions": {}}),
        "part.json": json.dumps(record),
        "part.yaml": yaml.safe_dump(record),
    }.items():
        (tmp_path / name).write_text(text)
        assert Settings(**read_settings(tmp_path / name)).record() == settings.record()


def test_numbers_of_yaml_are_those_of_version_1_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "rank: 010\nmax_steps: 1_000\nlearning_rate: 1e-3\n"
        "method: {name: sift, density: 1e-2, where: null, score: gradient,"
        " granularity: entry, dense: null, stack: null}\n"
    )
    read = read_settings(path)
    assert (read["rank"], read["max_steps"], read["learning_rate"]) == (10, 1000, 1e-3)
    assert read["method"] == Sparse(density=0.01, stack=None)


def test_json_may_begin_with_a_mark_and_has_no_name_twice(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"rank": 3}', encoding="utf-8-sig")
    assert read_settings(path) == {"rank": 3}
    path.write_text('{"method": {"name": "lora", "name": "dora"}}')
    with pytest.raises(InputError, match="must be a YAML or JSON .* 'name' twice"):
        read_settings(path)


def test_what_an_earlier_run_resolved_is_beside_its_settings(tmp_path):
    path = tmp_path / "config.json"
    record = json.loads(json.dumps(Settings(**RUN, method="bitfit").record()))
    beside = {"learning_rate": 1e-3, "max_length": 128, "dense": ["bias$", "^head/"]}
    path.write_text(json.dumps({"settings": record, "versions": {}, **beside}))
    assert Settings(**read_settings(path)).record() == record


@pytest.mark.parametrize(
    "method", ["random", Sparse(density=0.1, score="random")], ids=["word", "object"]
)
def test_an_earlier_run_keeps_its_learning_rate_and_its_head(method, tmp_path):
    run = Settings(**{**RUN, "output": str(tmp_path)}, method=method)
    record, path = json.loads(json.dumps(run.record())), tmp_path / "config.json"
    del record["head_bias"]
    beside = {"learning_rate": 7e-4, "max_length": 128, "dense": []}
    path.write_text(json.dumps({"settings": record, "versions": {}, **beside}))
    read = Settings(**{**read_settings(path), "resume": True})
    assert (read.learning_rate, read.head_bias) == (7e-4, "zeros")
    require_usable(read)
    with pytest.raises(InputError, match="`learning_rate` must be 0.0007 as in the ru"):
        require_usable(replace(read, learning_rate=None))


@pytest.mark.parametrize("method", ["sift", LoRA(rank=2)])
def test_a_run_of_an_earlier_version_had_the_usual_options(method, tmp_path):
    run = Settings(**{**RUN, "output": str(tmp_path)}, method=method, resume=True)
    record = {**run.record(), "rank": 8, "density": 0.008}
    del record["granularity"]
    text = json.dumps({"settings": record})
    (tmp_path / "config.json").write_text(text)
    require_usable(run)
    (tmp_path / "config.json").write_text(text.replace("0.008", "0.1"))
    if method == "sift":
        with pytest.raises(InputError, match="`density` must be 0.1 as in the run"):
            require_usable(run)


def test_earlier_runs_recorded_usual_options_beside_an_object(tmp_path):
    path, run = tmp_path / "config.json", Settings(**RUN, method=LoRA(rank=2))
    record = {**run.record(), "rank": 8, "density": 0.008, "rslora": False}
    path.write_text(json.dumps({"settings": record, "versions": {}}))
    assert Settings(**read_settings(path)) == run
    path.write_text(json.dumps({"settings": {**record, "rank": 4}, "versions": {}}))
    with pytest.raises(InputError, match="`rank` must be left out with method LoRA"):
        Settings(**read_settings(path))


def test_an_object_takes_the_place_of_a_name_and_its_usual_options(tmp_path):
    places = {"model": str(tmp_path), "output": str(tmp_path / "run")}
    run = Settings(**{**RUN, **places}, method="sift")
    with pytest.raises(InputError, match="config.json"):
        finetune(run, method=LoRA(rank=2))
    with pytest.raises(InputError, match="`density` must be left out with method LoRA"):
        finetune(run, method=LoRA(rank=2), density=0.1)
    assert (run.record()["rank"], run.record()["density"]) == (8, 0.008)
    assert replace(run, method=LoRA(rank=2)).record()["rank"] is None


def test_a_run_that_replaced_another_is_resumed_from_its_file(tmp_path):
    path = tmp_path / "config.json"
    record = Settings(**RUN, overwrite=True).record()
    path.write_text(json.dumps({"settings": record}))
    resumed = {**read_settings(path), "resume": True}
    assert Settings(**resumed).record() == Settings(**RUN, resume=True).record()


FILES = {
    "of others": ("ist: true", "got 'ist'. Here it is `sampler: ist`. They are"),
    "unknown": ("densty: 0.1", "such as .*, got 'densty'. Did you mean 'density'?"),
    "twice": ("rank: 1\n'rank': 2", "must be a YAML or JSON file, .* 'rank' twice"),
    "twice in a method": ("method: {name: a, name: b}", "it has 'name' twice"),
    "a time": ("rank: 1:30", "`rank` in .* must be a whole number, got '1:30'"),
    "beside": (
        "rank: 3\nsettings: {rank: 2}",
        "`rank` beside .* must be 2 as .* got 3",
    ),
    "only beside": ("rank: 3\nsettings: {}", "`rank` beside .* must be None as"),
    "length beside": (
        "{versions: {}, max_length: 64, settings: {method: lora}}",
        "`max_length` beside .* must be None as they say, got 64. Set it under",
    ),
    "rules beside": (
        "{versions: {}, dense: [a], settings: {method: lora}}",
        "`dense` beside .* must be None as they say, got .*a.*. Set it under",
    ),
    "rate of an earlier run": (
        "{versions: {}, learning_rate: 1, max_length: 9, dense: [],"
        " settings: {method: lora}}",
        "`learning_rate` beside .* must be 0.001 as they say, got 1. Set it under",
    ),
    "another score": (
        "method: {name: random, density: 0.1, where: null, score: gradient,"
        " granularity: entry, dense: null, stack: null}",
        "`score` of `method` in .* must be 'random' with the name 'random', got 'gr",
    ),
    "a number for a name": (
        "method: {name: full, dense: null, stack: null, 3: 4, x: 5}",
        "must have only what `Dense` has, got 3",
    ),
    "text for a number": ("rank: many", "`rank` in .* must be a whole number, got 'ma"),
    "half a number": ("rank: 1.5", "`rank` in .* must be a whole number, got 1.5"),
    "null": ("batch_size: null", "`batch_size` in .* must be a whole number, got N"),
    "number for a text": ("task: 3", "`task` in .* must be text, got 3"),
    "no list": ("where: 3", "`where` in .* must be a list, each item text"),
    "no texts": ("where: [3]", "`where` in .* must be a list, each item text"),
    "list": ("- rank", "must be a file of settings"),
    "no YAML": ("a: [", "must be a YAML or JSON file"),
    "no date": ("a: !!timestamp b", "must be a YAML or JSON file"),
    "endless": (f"learning_rate: 1{'0' * 400}", "`learning_rate` in .* must be a numb"),
    "unknown method": ("method: {name: vera}", "must be one of full"),
    "method without rank": ("method: {name: lora}", "must have `"),
    "score without a word": (
        "method: {name: sift, score: null}",
        "`score` of `method` in .* must be one of gradient, .* got None",
    ),
    "layers of text": (
        "sampler: {name: static, num_layers: 2, num_active: 1, hold: 1, layers: [a]}",
        "`layers` in .* must be a list of whole numbers",
    ),
    "sampler": (
        "sampler: {name: uniform, num_layers: x}",
        "must have `|must be a whole",
    ),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_wrong_is_one_line(text, message, tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    words = ["sparse-jax", "finetune", "--config", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err) and "run.yaml" in err


def run(command, monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["sparse-jax", command, *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


@pytest.mark.slow
def test_options_win_over_the_file_of_settings(files, tmp_path, capsys, monkeypatch):
    model, data = files
    path = tmp_path / "run.yaml"
    settings = {
        "model": str(model), "data": str(data), "task": "sst2", "method": "lora",
        "rank": 2, "learning_rate": 1e-3, "max_steps": 3, "batch_size": 8,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    code, _, err = run("finetune", monkeypatch, capsys, "--config", path)
    assert code == 2 and "error: --output must be given, got nothing." in err
    more = ("--config", path, "--output", tmp_path / "run", "--max-steps", 1)
    assert run("finetune", monkeypatch, capsys, *more)[0] == 0
    config = tmp_path / "run" / "config.json"
    found = json.loads(config.read_text())["settings"]
    assert (found["max_steps"], found["rank"], found["method"]) == (1, 2, "lora")
    # The same run, by its own file.
    again = ("--config", config, "--output", tmp_path / "again")
    assert run("finetune", monkeypatch, capsys, *again)[0] == 0
    one, other = arrays_of(tmp_path / "run"), arrays_of(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, one, other)


@dataclass(frozen=True, kw_only=True)
class TwoByTwo(Cyclic):
    """A sampler of the user's own."""


@pytest.fixture
def registered():
    register_sampler("two_by_two", TwoByTwo, help="two at a time")
    yield
    del SAMPLERS["two_by_two"]


def test_a_sampler_of_ones_own_has_a_word_everywhere(registered, capsys, monkeypatch):
    made = TwoByTwo(num_layers=4, num_active=2, hold=3)
    settings = Settings(**RUN, sampler="two_by_two", active=0.5, hold=3)
    assert sampler_of(settings, 4) == made
    assert Settings(**RUN, sampler=made).record()["sampler"]["name"] == "two_by_two"
    tx = ist(
        optax.sgd(1.0), layer_of="layers", num_layers=4, num_active=2, hold=3,
        key=jax.random.key(0), sampler="two_by_two",
    )  # fmt: skip
    _, state = tx.update({"layers": np.ones(4)}, tx.init({"layers": np.ones(4)}))
    assert state.sampler.active.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("word", "kind", "message"),
    [
        ("ist", TwoByTwo, "`word` must be new, .* got 'ist'"),
        ("other", LoRA, "`kind` must be a subclass of `Sampler`"),
    ],
)
def test_a_sampler_that_cannot_be_registered_is_refused(word, kind, message):
    with pytest.raises(InputError, match=message):
        register_sampler(word, kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 3}, "`lerning_rate` must be left out.* 'learning_rate'"),
        ({"callbacks": {"on_step": print}}, "`callbacks` must be `Callbacks`, got"),
        ({"resume": True, "output": "nothere"}, "`output` must be the folder of a ru"),
    ],
)
def test_what_finetune_does_not_take_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        finetune(**options)


def test_a_callback_that_is_no_function_is_refused():
    with pytest.raises(
        InputError, match="`on_step` must be a function of one argument"
    ):
        Callbacks(on_step=3)


def test_optimizers_and_schedules_may_have_the_names_of_the_trainer():
    names = {"optimizer": "adamw_torch", "schedule": "warmup_stable_decay"}
    run = Settings(**RUN, **names)
    assert (run.optimizer, run.schedule) == ("adamw", "wsd")

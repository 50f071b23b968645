"""The command line: quick to help, and one line for wrong input."""

import errno
import json
import logging
import re
import resource
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
from tiny_run import tiny_settings, write_data, write_model

from sparse_jax import InputError, Settings, finetune
from sparse_jax.cli.finetune import LogLines
from sparse_jax.cli.json_file import write_json
from sparse_jax.cli.main import _about_place, main
from sparse_jax.cli.summary import print_summary


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    write_model(folder / "model")
    write_data(folder / "data")
    made = {"method": "head", "max_steps": 1}
    finetune(tiny_settings(folder / "model", folder / "data", folder / "made", **made))
    return folder


@pytest.fixture
def place(originals, tmp_path):
    """Returns a folder with a model and data that a test may spoil."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def command(place, monkeypatch, capsys):
    """Returns a function that runs a command: exit code, output, errors."""

    def run(*arguments):
        words = [str(word).replace("PLACE", str(place)) for word in arguments]
        monkeypatch.setattr(sys, "argv", ["sparse-jax", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


FINETUNE = (
    "finetune", "--model", "PLACE/model", "--task", "sst2", "--data", "PLACE/data",
    "--output", "PLACE/run",
)  # fmt: skip
EVALUATE = (
    "evaluate", "--adapter", "PLACE/made", "--model", "PLACE/model",
    "--data", "PLACE/data",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["finetune", "evaluate", "generate", "export", "inspect", "plan"]
)
@pytest.mark.quick(1)
def test_help_takes_little_longer_than_typer_itself_and_no_jax(name):
    # Of the processor, as other programs run on the same machine.
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    def answer(code, *words):
        began = used()
        words = [sys.executable, "-c", code, *words, "--help"]
        run = subprocess.run(words, capture_output=True, text=True, check=True)
        return run.stdout, used() - began

    code = (
        "import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); "
        "from sparse_jax.cli.main import main; main()"
    )
    # What Typer takes depends on its release: 0.29 imports Pydantic.
    typers = "import typer\ntyper.run(lambda: None)"
    ours, own = zip(
        *[(answer(code, name), answer(typers)) for _ in range(3)], strict=True
    )
    out, _ = ours[0]
    assert f"sparse-jax {name}" in out
    assert out.endswith("False\n")
    assert (
        min(seconds for _, seconds in ours) - min(seconds for _, seconds in own) < 0.3
    )


def test_the_package_is_run_as_the_command(monkeypatch):
    runs = []
    monkeypatch.setattr("sparse_jax.cli.main.run", lambda: runs.append("sparse-jax"))
    runpy.run_module("sparse_jax", run_name="__main__")
    assert runs == ["sparse-jax"]


def test_the_options_of_a_run_stand_under_headings(command):
    text = command("finetune", "--help")[1]
    first = {
        heading: found.split()[0]
        for heading, found in re.findall(r"^(\S.*):\n  (--.*)$", text, re.MULTILINE)
    }
    assert first == {
        "Run": "--model",
        "Data": "--batch-size",
        "What is trained": "--method",
        "Layers": "--sampler",
        "Optimizer, schedule and loss": "--optimizer",
        "Evaluation": "--eval-every",
        "Devices": "--mesh",
    }


def test_the_command_does_without_pytorch_where_it_is_installed():
    code = (
        "import sys; from sparse_jax.cli import main as cli; "
        "cli.main = lambda: None; cli.run(); "
        "from scipy.special import softmax; softmax([1.0, 2.0]); "
        "from transformers.utils import is_torch_available as asked; "
        "print(asked(), 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"


def test_a_run_and_its_evaluation(command, place):
    code, out, err = command(*FINETUNE, "--method", "head", "--max-steps", "2")
    assert code == 0
    assert "trained parameters" in out
    assert "step 2/2" in err
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    code, out, _ = command("evaluate", "--adapter", "PLACE/run", "--data", "PLACE/data")
    assert (code, json.loads(out)) == (
        0,
        metrics["eval"] | {"report": metrics["reports"]},
    )


def drop_column(place):
    (place / "data" / "train.jsonl").write_text('{"text": "good", "label": 1}\n')


def unknown_label(place):
    with (place / "data" / "train.jsonl").open("a") as file:
        file.write('{"sentence": "good film", "label": 7}\n')


def empty_file(place):
    (place / "data" / "train.jsonl").write_text("")


def broken_utf8(place):
    with (place / "data" / "dev.jsonl").open("ab") as file:
        file.write(b'{"sentence": "\xff", "label": 1}\n')


def only_pickles(place):
    (place / "model" / "model.safetensors").rename(
        place / "model" / "pytorch_model.bin"
    )


def fill_output(place):
    (place / "run").mkdir()
    (place / "run" / "thesis.tex").write_text("the only copy")


def more_tokens(place):
    path = place / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"film": 11', '"film": 99'))


nothing = lambda place: None


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (nothing, ("--density", "0"), "--density must be in (0, 1], got 0.0"),
        (nothing, ("--density", "1.5"), "--density must be in (0, 1], got 1.5"),
        (nothing, ("--density", "nan"), "--density must be in (0, 1], got nan"),
        (nothing, ("--devices", "4"), "--devices must come with a mesh, got 4"),
        (nothing, ("--where", "qwery"), "--where must match at least one parameter"),
        (nothing, ("--where", "("), "--where must be a regular expression"),
        (nothing, ("--dense", "clasifier"), "--dense must match at least one"),
        (nothing, ("--method", "lora", "--where", "qwery"), "--where must match"),
        (nothing, ("--task", "sst3"), "--task must be one of cola, sst2"),
        (nothing, ("--max-length", "17"), "--max-length must be at most"),
        (nothing, ("--data", "PLACE/dta"), "--data must be a file, a folder"),
        (nothing, ("--output", "PLACE/data/dev.jsonl/run"), "got the file `"),
        (nothing, ("--method", "lora", "--density", "0.008"), "--density must be"),
        (nothing, ("--rank", "8"), "--rank must be left out with method"),
        (nothing, ("--active", "0.25"), "--active must be left out without"),
        (nothing, ("--ist", "--sampler", "norm"), "--sampler must be left out with"),
        (nothing, ("--seed", "x"), "'--seed'"),
        (nothing, ("--densty", "1"), "--densty. Did you mean --density? See"),
        (nothing, ("--lr=1e-4",), "No such option: --lr. Here it is `--learning-rate`"),
        (nothing, ("--bf16",), "--bf16. Here it is `--dtype bfloat16`. See"),
        (nothing, ("--logging-steps", "1"), "--logging-steps. Here it is nothing to"),
        (nothing, ("--density",), "requires an argument"),
        (lambda p: (p / "model" / "config.json").unlink(), (), "with a `config.json`"),
        (lambda p: (p / "model" / "model.safetensors").unlink(), (), "has no weights"),
        (only_pickles, (), "has only the pickle pytorch_model.bin"),
        (drop_column, (), "line 1 must have a column `sentence`"),
        (unknown_label, (), "line 23 must have one of the labels"),
        (empty_file, (), "must have examples"),
        (more_tokens, (), "--model must have an embedding of every token"),
        (broken_utf8, (), "line 14 must be UTF-8, got the byte 0xff"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_nothing_written(
    command, place, spoil, options, message
):
    spoil(place)
    code, out, err = command(*FINETUNE, *options)
    assert (code, out) == (2, "")
    *log, error = err.splitlines()
    assert message in error
    assert error.startswith("error: ")
    # What is odd about a model or its data may have been said before.
    assert not any(line.startswith(("error", "Traceback", "---")) for line in log)
    assert not (place / "run").exists()


def test_a_folder_that_is_not_empty_is_left_alone(command, place):
    fill_output(place)
    code, _, err = command(*FINETUNE)
    assert code == 2
    assert "--output must be an empty or a new folder" in err
    assert [path.name for path in (place / "run").iterdir()] == ["thesis.tex"]


def other_weights(place):
    path = place / "model" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def truncated(place):
    path = place / "made" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (other_weights, (), "--model must be the base of the adapter"),
        (truncated, (), "must be a complete safetensors file"),
        (nothing, ("--task", "rte"), "must have a column `sentence1`"),
        (nothing, ("--adapter", "PLACE/none"), "does not exist"),
        (nothing, ("--batch-size", "0"), "--batch-size must be positive, got 0"),
        (nothing, ("--max-length", "0"), "--max-length must be positive, got 0"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(
    command, place, spoil, options, message
):
    spoil(place)
    code, out, err = command(*EVALUATE, *options)
    *log, error = err.splitlines()
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and message in error
    assert not any(line.startswith(("error", "Traceback", "---")) for line in log)


@pytest.mark.parametrize("name", ["evaluate", "predict", "export", "generate"])
def test_the_argument_of_a_command_is_called_as_in_its_help(command, name):
    more = {"export": ("--to", "delta", "--output", "PLACE/new"),
            "generate": ("--prompt", "x")}.get(name, ())  # fmt: skip
    code, _, err = command(name, "PLACE/none", *more)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: RUN must be an adapter file, or the folder of")


def test_a_dry_run_says_what_would_be_trained(command, place):
    asked = (*FINETUNE, "--density", "0.1", "--max-steps", "2")
    code, out, err = command(*asked, "--dry-run")
    assert (code, out) == (0, "")
    # A tenth of four maps of two layers with their biases; pooler and classifier.
    said = f"training sift: {8 * (26 + 2) + 17 * 16 + 17 * 2} of "
    assert [line for line in err.splitlines() if line.startswith(said)]
    last = "batch 1 of 1 in an epoch: 32 x 16 tokens, 224 without padding; "
    assert err.splitlines()[-1].startswith(last)
    assert not (place / "run").exists()
    assert command(*asked, "--dry-run", "--where", "qwery")[0] == 2
    # Where a run would be refused, too.
    code, _, err = command(*asked, "--output", "PLACE/made", "--dry-run")
    assert (code, "must be an empty or a new folder" in err) == (2, True)


def test_an_interrupted_run_says_how_to_go_on(command, place, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparse_jax.training.loop.Loop.run", interrupt)
        code, _, err = command(*FINETUNE, "--method", "head", "--max-steps", "1")
    assert code == 130
    assert "with --resume" in err
    # The folder of the run has its settings.
    resume = ("finetune", "--output", "PLACE/run", "--resume")
    code, _, err = command(*resume, "--max-steps", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "--max-steps must be 1 as in the run to resume, got 2" in err
    assert command(*resume)[0] == 0
    assert json.loads((place / "run" / "metrics.json").read_text())["steps"] == 1
    code, _, err = command("predict", "PLACE/run", "--output", "PLACE/out.jsonl")
    assert (code, err.splitlines()[-1]) == (0, f"13 lines in {place}/out.jsonl")


def test_a_value_that_cannot_be_read_is_told(command):
    _, _, err = command(*FINETUNE, "--seed", "x")
    assert "'x'" in err
    assert "See `sparse-jax finetune --help`." in err


LONG = "x" * 300  # no file system has such a name
EARLY = {
    "an option without its value": (("plan", "--density"), "See `sparse-jax plan --h"),
    "a folder of prompts": (
        ("generate", "--model", "PLACE/model", "--prompts", "PLACE/data"),
        "--prompts must be a file, got '",
    ),
    "no file of requests": (
        ("generate", "--model", "PLACE/model", "--input", "none"),
        "--input must be a file, got 'none', and there is none.",
    ),
    "no text": (
        ("evaluate", "PLACE/made", "--text", "none"),
        "--text must be a file, g",
    ),
    "no temperature": (
        ("generate", "--prompt", "x", "--temperature", "inf"),
        "--temperature must be positive and finite, got inf. Greedy decoding, without "
        "--temperature, --top-k and --top-p, takes the likeliest token.",
    ),
    "a list that is a folder": (
        ("inspect", "--model", "PLACE/model", "--json", "PLACE/data"),
        "--json must be a file in a folder that exists, got 'PLACE/data'.",
    ),
    "a name that is too long": (
        ("inspect", "--model", "PLACE/model", "--json", LONG),
        "--json must be a place that can be used, got 'xxx",
    ),
    "an equals sign": (("plan", f"--json={LONG}"), "--json must be a place that can"),
    "an argument": (("evaluate", LONG), "RUN must be a place that can be used, got 'x"),
}


@pytest.mark.parametrize(("words", "message"), EARLY.values(), ids=EARLY)
def test_what_is_wrong_is_named_as_it_was_typed(words, message, command, place):
    code, out, err = command(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message.replace("PLACE", str(place)) in err


def test_a_folder_that_holds_no_files_is_told(command):
    code, out, err = command("combine", "PLACE/made", "--output", "/proc/c.safetensors")
    assert (code, out) == (2, "")
    # What is odd about the model was said before.
    said = "--output must be a place that can be used, got '/proc/.c.safetensors.part'"
    assert err.splitlines()[-1].startswith(f"error: {said}: ")


@pytest.mark.parametrize("place", ["a/b.json", "a/.b.json.part", "a/b.json/c", "a"])
@pytest.mark.parametrize("typed", [("--json=a/b.json",), ("--json", "a/b.json")])
def test_a_closed_folder_is_told_by_its_option(place, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for found in (place, tmp_path / place):
        closed = PermissionError(errno.EACCES, "Permission denied", found)
        said = _about_place(closed, ["inspect", "--model", "m", *typed])
        assert said is not None and said.endswith(": Permission denied.")
        assert said.startswith("--json must be a place that can be used, got '")


@pytest.mark.parametrize(
    ("place", "typed", "names"),
    [
        ("out1/x", ("--output", "out1", "--seed", "1"), "--output"),
        ("data/dev.json", ("--data", "data", "--output", "data/run"), "--data"),
        ("data/run/x", ("--data", "data", "--output", "data/run"), "--output"),
        ("cola/x", ("--task", "cola", "--output", "cola"), "--task or --output"),
    ],
)
def test_of_several_places_that_are_typed_the_nearest_is_told(place, typed, names):
    closed = PermissionError(errno.EACCES, "Permission denied", place)
    said = _about_place(closed, ["finetune", *typed])
    assert said is not None and said.startswith(f"{names} must be a place")


@pytest.mark.parametrize("place", ["1", "lib/a.json", "a/b", "a/b.jsonl", ".", 3, None])
def test_an_error_about_a_place_that_nobody_typed_is_a_bug(
    place, tmp_path, monkeypatch
):
    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied", place)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparse_jax.cli.inspect.require_json_place", fail)
    words = ["inspect", "--model", "m", "--rank", "1", "--json", "a/b.json"]
    monkeypatch.setattr(sys, "argv", ["sparse-jax", *words])
    with pytest.raises(PermissionError):
        main()


def test_a_list_or_a_plan_that_cannot_be_written_is_one_line():
    with pytest.raises(InputError, match="`json` must be a file that can be written"):
        write_json("/dev/full", [1])


# Two layers of width 16 with three classes: leaf -> trained entries, added parameters.
INSPECTED = {
    "sift": ({"layers/attention/query/kernel": 2 * 26}, {}),
    "lora": ({}, {"layers/attention/query/kernel": 2 * 4 * (16 + 16)}),
    "bitfit": ({"layers/attention/query/bias": 2 * 16}, {}),
    "prefix": ({}, {"layers/attention/memory": 2 * 2 * 3 * 16}),
}
OWN = {
    "sift": ("--density", "0.1"), "lora": ("--rank", "4"), "bitfit": (),
    "prefix": ("--prefix-length", "3"),
}  # fmt: skip


def test_what_a_file_of_settings_trains_is_listed(command, place):
    settings = {"model": str(place / "model"), "task": "sst2", "method": "bitfit",
                "class_weights": "balanced", "data": "data"}  # fmt: skip
    (place / "run.json").write_text(json.dumps(settings))
    layers = ("--sampler", "static", "--layers", "1")
    code, out, _ = command("inspect", "--config", "PLACE/run.json", *layers)
    assert (code, "bitfit on bert with 2 layers" in out) == (0, True)
    assert out.splitlines()[-1] == "static trains 1 of the 2 layers in an update."
    _, both, _ = command("inspect", "--config", "PLACE/run.json")
    # A layer has seven biases of 16 and one of 24, the rest of the model 66.
    assert f"\n{66 + 136} of " in out
    assert f"\n{66 + 2 * 136} of " in both


@pytest.mark.parametrize("method", INSPECTED)
def test_a_method_is_listed_leaf_by_leaf(command, place, method):
    asked = ("--model", "PLACE/model", "--method", method, *OWN[method])
    code, out, err = command("inspect", *asked, "--json", "PLACE/list.json")
    assert (code, err) == (0, "")
    rows = {row["name"]: row for row in json.loads((place / "list.json").read_text())}
    trained, added = INSPECTED[method]
    assert {name: rows[name]["trained"] for name in trained} == trained
    assert {name: rows[name]["added"] for name in added} == added
    assert all(name in out for name in rows)
    # The head is trained with any method.
    assert rows["classifier/kernel"]["trained"] == 16 * 2
    total = sum(row["trained"] + row["added"] for row in rows.values())
    assert out.splitlines()[-1].startswith(f"{total:,} of ")


def test_the_version_is_that_of_the_package(command):
    assert command("--version")[:2] == (0, f"sparse-jax {version('sparse_jax')}\n")


def test_no_command_is_help(command):
    code, out, err = command()
    assert (code, err) == (0, "")
    assert "finetune" in out


@pytest.mark.parametrize(("skipped", "is_told"), [(0, False), (3, True)])
def test_skipped_batches_are_told(skipped, is_told, capsys):
    counts = ("trained_parameters", "total_parameters", "steps", "seconds_per_step")
    counts += ("trained_parameters_without_head", "optimizer_bytes", "adapter_bytes")
    metrics = dict.fromkeys((*counts, "peak_memory_bytes"), 1)
    settings = Settings(model="m", task="sst2", output="run")
    print_summary(settings, metrics | {"eval": {}, "skipped_batches": skipped})
    assert ("skipped batches" in capsys.readouterr().out) is is_told


def test_what_stands_in_a_file_is_never_obeyed_by_a_terminal(command, place):
    row = {"sentence": "a", "label": "\x1b[2J\u202ex\n"}
    (place / "data" / "train.jsonl").write_text(json.dumps(row))
    code, output, errors = command(*FINETUNE)
    assert (code, output) == (2, "")
    assert errors.rstrip("\n").isprintable()
    assert r"got '\x1b[2J\u202ex\n'" in errors


def test_lines_of_the_log_hold_no_control_codes(capsys):
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s", ("b\x1b[2J\nc",), None)
    LogLines().emit(record)
    assert capsys.readouterr().err == "b\\x1b[2J\nc\n"


def test_brackets_in_the_name_of_a_folder_are_letters(capsys):
    metrics = {
        "eval": {"accuracy": 1.0}, "trained_parameters": 1, "total_parameters": 2,
        "trained_parameters_without_head": 1, "optimizer_bytes": 1, "adapter_bytes": 1,
        "peak_memory_bytes": 1, "seconds_per_step": 1.0, "steps": 1,
        "skipped_batches": 0,
    }  # fmt: skip
    settings = Settings(model="m", task="sst2", output="a[/red]b\x1b[2J")
    print_summary(settings, metrics)
    assert "In a[/red]b\\x1b[2J: adapter" in capsys.readouterr().out

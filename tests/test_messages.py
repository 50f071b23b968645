"""Messages on the command line: options as they are typed, arguments in Python."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import sparse_jax
from sparse_jax import InputError, Settings
from sparse_jax.cli import main as cli
from sparse_jax.cli.messages import as_typed, names_typed
from sparse_jax.training.settings import setting_options

COMMANDS: Any = getattr(typer.main.get_command(cli.app), "commands", {})
SOURCES = sorted(Path(sparse_jax.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("name", setting_options())
def test_every_setting_has_the_name_of_its_option(name):
    message = f"`{name}` must be small, got 9. Lower `{name}`, or set `{name}=1`."
    option = f"--{name.replace('_', '-')}"
    assert option in {word for one in COMMANDS["finetune"].params for word in one.opts}
    assert as_typed(message, names_typed(COMMANDS["finetune"])) == (
        f"{option} must be small, got 9. Lower {option}, or set {option} 1."
    )


def refused(words, monkeypatch, capsys):
    """Returns the line that a command ends with."""
    monkeypatch.setattr(sys, "argv", ["sparse-jax", *words.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


RUN = "finetune --model M --task causal --output O"
LINES = {
    f"{RUN} --batch-size 0": "error: --batch-size must be positive, got 0.",
    f"{RUN} --batch-size 3 --accumulate 2":
        "error: --accumulate must divide --batch-size=3, got 2. A batch is all "
        "examples of one update.",
    f"{RUN} --update-in-backward":
        "error: --clip-by must be previous-norm with --update-in-backward, got "
        "global-norm: the global norm is known only after the first layers have been "
        "updated. Or set --max-grad-norm to 0, which does not clip.",
    f"{RUN} --packing --group-by-length":
        "error: --group-by-length must be left out with --packing. All packed rows "
        "have one length.",
    f"{RUN} --method head":
        "error: --method must not be 'head' with task 'causal': the model has no new "
        "head. Use lora or sift, or --dense '^lm_head/' with full.",
    f"{RUN} --overwrite --resume":
        "error: --overwrite and --resume must not be given together. The first starts "
        "over, the second continues.",
    "evaluate":
        "error: RUN must be given once, as the argument or by --adapter, got none. "
        "Pass the folder of a run, as in `sparse-jax evaluate runs/mrpc`.",
    "export R --to delta --output=": "error: --output must name a folder, got ''.",
    "evaluate nowhere":
        "error: RUN must be an adapter file, or the folder of a run or of PEFT, got "
        "`nowhere`, which does not exist. Check the spelling.",
    "evaluate model":
        "error: RUN must be an adapter file, or the folder of a run or of PEFT, got "
        "`model`, which does not exist. Check the spelling.",
    "evaluate --adapter nowhere":
        "error: --adapter must be an adapter file, or the folder of a run or of PEFT, "
        "got `nowhere`, which does not exist. Check the spelling.",
}  # fmt: skip


@pytest.mark.parametrize("words", LINES)
def test_errors_name_what_was_typed(words, monkeypatch, capsys):
    assert refused(words, monkeypatch, capsys) == LINES[words]


IN_FILE = {
    "rank: 0": "`rank` in `run.yaml` must be positive, got 0.",
    "batch_size: 3\naccumulate: 2":
        "`accumulate` in `run.yaml` must divide `batch_size`=3, got 2. A batch is all "
        "examples of one update.",
    "rank: 8\nbatch_size: 0": "--batch-size must be positive, got -1.",
    "rank: x": "`rank` in `run.yaml` must be a whole number, got 'x'.",
    "score: [": "--config must be a YAML or JSON file, got 'run.yaml': ",
}  # fmt: skip


@pytest.mark.parametrize("text", IN_FILE)
def test_what_a_file_of_settings_has_is_named_as_it_is_there(
    text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    typed = " --batch-size -1" if "size: 0" in text else ""
    said = refused(f"{RUN} --config run.yaml{typed}", monkeypatch, capsys)
    assert said.startswith(f"error: {IN_FILE[text]}")


def test_a_file_of_settings_that_is_not_there_is_said_once(monkeypatch, capsys):
    assert refused(f"{RUN} --config gone.yaml", monkeypatch, capsys) == (
        "error: --config must be a YAML or JSON file, got 'gone.yaml': No such file or "
        "directory."
    )


def test_python_users_read_the_argument():
    with pytest.raises(InputError, match="`accumulate` must divide `batch_size`=3, "):
        Settings(model="M", task="causal", output="O", batch_size=3, accumulate=2)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("`a.jsonl` line 1 must have a column `output`, got the columns id.", ...),
        ("`seed` in `run.yaml` must be a whole number, got 'x'.", ...),
        ("`density` of `method` in `config.json` must be a number, got 'x'.", ...),
        ("`rank` beside `settings` in `run.yaml` must be 2 as they say, got 3.", ...),
        ("`a.jsonl` must have tokens. Raise `seed`.", "`a.jsonl` must have tokens. "
         "Raise --seed."),
        ("tokens are those of an earlier run. Not with `no_cache=True`",
         "tokens are those of an earlier run. Not with --no-cache"),
        ("`rank` of the score must be positive, got 0.",
         "--score-rank must be positive, got 0."),
    ],
)  # fmt: skip
def test_names_in_a_file_stay_those_of_the_file(message, line):
    expected = message if line is ... else line
    assert as_typed(message, names_typed(COMMANDS["finetune"])) == expected


def spelled(node):
    """Returns what is written in a text, with `{}` for values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(spelled, node.values))
    return "{}"


def texts_of_calls(path, *names):
    """Yields what stands in the arguments of calls of functions of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield from map(spelled, node.args)


def texts_of_errors(path):
    """Yields the messages of the errors that a file raises."""
    return texts_of_calls(path, "InputError")


def test_no_line_of_the_log_names_an_option_which_python_does_not_have():
    found = [
        (path.name, text)
        for path in SOURCES
        for text in texts_of_calls(path, "_log.info", "_log.warning", "_log.error")
        if re.search(r"(?<!-)--[a-z]", text)
    ]
    assert not found


def test_names_of_settings_stand_in_backticks_in_every_error():
    # One word, such as "packing", may be English.
    names = "|".join(name for name in setting_options() if "_" in name)
    bare = re.compile(rf"(?<![`\w.'\"])({names})(?![`\w'\"])")
    found = [
        (path.name, text)
        for path in SOURCES
        for text in texts_of_errors(path)
        if bare.search(re.sub(r"`[^`]*`", "", text))
    ]
    assert found == []


def test_errors_outside_the_command_line_name_no_options():
    names = "|".join(name.replace("_", "-") for name in setting_options())
    option = re.compile(rf"(?<![\w-])--({names})(?![\w-])")
    found = [
        (path.name, text)
        for path in SOURCES
        if path.parent.name != "cli"
        for text in texts_of_errors(path)
        # What is quoted is a whole command.
        if option.search(re.sub(r"`[^`]*`", "", text))
    ]
    assert found == []

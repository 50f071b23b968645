"""The documents name commands and files that are there."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import sparse_jax
from sparse_jax import Settings
from sparse_jax.cli.main import app
from sparse_jax.methods.registry import METHODS, MethodOptions
from sparse_jax.samplers.registry import SAMPLERS
from sparse_jax.supports.scores import SCORES
from sparse_jax.training.other_names import OTHER_NAMES
from sparse_jax.training.settings import setting_options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_test_command_of_the_readme():
    [command] = [line for line in README.splitlines() if "-m pytest" in line]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert set(command.split(" && ")) <= set(ci)


def test_pre_commit_and_the_test_extra_pin_one_ruff():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    [version] = re.findall(r"rev: v([\d.]+)", hooks)
    assert f'"ruff=={version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


DOCUMENTS = [
    document
    for folder in (".", "docs", "experiments", "experiments/results")
    for document in (ROOT / folder).glob("*.md")
]


def anchors_of(text):
    """Returns the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_to_files_and_headings(document):
    text = document.read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name}: {path}"
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), anchor


def test_the_experiments_that_documents_run_are_commands():
    places = ("*.md", "docs/*.md", "experiments/**/*.md", "experiments/**/*.py")
    texts = [path.read_text("utf-8") for place in places for path in ROOT.glob(place)]
    named = set(re.findall(r"python -m (experiments[.\w]*\w)", "".join(texts)))
    assert len(named) > 20
    for name in named:
        module = ROOT / name.replace(".", "/")
        package = module / "__main__.py"
        file = package if package.is_file() else module.with_suffix(".py")
        assert "__main__" in file.read_text("utf-8"), name


def test_the_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9.]*)`", text))
    assert len(named) > 20
    places = (ROOT, ROOT / "sparse_jax")
    assert not {n for n in named if not any((p / n).exists() for p in places)}


OTHERS = (ROOT / "docs" / "other_libraries.md").read_text(encoding="utf-8")
# Of the second column of a row, with the option that says what it is for.
ROWS = [
    cell.replace("\\|", "|")
    for line in OTHERS.splitlines()
    if line.startswith("| ") and (cells := re.split(r"(?<!\\)\|", line))
    for cell in re.findall(r"`(--[^`]* [^`]*|--[a-z-]+)`", cells[2])
    if cell not in ("--model", "--output", "--to merged")
]


def test_most_rows_have_options():
    assert len(ROWS) > 35


class Ready(Exception):
    """Raised in place of a run."""


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.quick(3)
def test_a_row_of_another_library_is_a_run(row, monkeypatch):
    def stand_in(run):
        raise Ready

    monkeypatch.setattr(sparse_jax, "finetune", stand_in)
    words = shlex.split(row)
    task = [] if "--task" in words else ["--task", "mrpc"]
    given = ["finetune", "--model", "base", "--output", "run", *task, *words]
    with pytest.raises(Ready):
        app(given, standalone_mode=False)


def test_the_recipe_of_other_libraries_is_a_run():
    [text] = re.findall(r"```yaml\n(.*?)```", OTHERS, re.DOTALL)
    run = Settings(**yaml.safe_load(text))
    assert (run.schedule, run.warmup, run.weight_decay) == ("cosine", 0.03, 0.1)


def rows_of_others():
    """Names of other libraries in a row of a table, and the row."""
    pages = {"command_line": 3, "evaluation": 1, "other_libraries": 1}
    for page, there in pages.items():
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        for line in text.splitlines():
            cells = re.split(r"(?<!\\)\|", line)
            if line.startswith("| ") and len(cells) > 4:
                names = re.findall(r"(?:`|, |\()([a-z]\w*)(?=[`=:])", cells[there])
                yield {*names}, line


def test_hints_on_names_of_others_are_those_of_the_documents():
    rows = list(rows_of_others())
    for name, hint in OTHER_NAMES.items():
        option = re.match(r"--[a-z-]+|", hint)[0]
        is_there = any(name in names and option in row for names, row in rows)
        assert is_there or name in ("ist", "lora_r", "lr"), name
    # Of files of LLaMA-Factory.
    named = {n for _, row in rows if "`--" in row for n in re.findall(r"`(\w+): ", row)}
    assert len(named) > 25
    assert named <= {*OTHER_NAMES, *setting_options()}


TABLES = {"--method": METHODS, "--score": SCORES}


@pytest.mark.parametrize("option", TABLES)
def test_the_command_line_is_documented_with_all_names(option):
    text = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    [values] = re.findall(rf"^\| `{option}` \| (.*) \|$", text, re.MULTILINE)
    named = re.findall(r"[a-z0-9_/-]+", values.partition(";")[0])
    assert set(TABLES[option]) <= set(named), "docs/command_line.md"


def test_the_readme_names_all_methods():
    text = README.lower().replace("(ia)3", "ia3")
    known = {*METHODS} - {"head", "random", "magnitude"}
    assert not {name for name in known if not re.search(rf"\b{name}\b", text)}


def methods_with(option):
    return {name for name, entry in METHODS.items() if option in entry.options}


def named_in(text):
    return {*re.findall(r"\w+", text)} & {*METHODS}


@pytest.mark.parametrize("option", [one.name for one in fields(MethodOptions)])
def test_the_help_of_an_option_names_the_methods_that_have_it(option):
    about = setting_options()[option].help.partition(":")[0]
    assert named_in(about) in (set(), methods_with(option))


def test_the_help_of_where_names_the_methods_with_modules_of_their_own():
    default = {name: METHODS[name].options["where"].default
               for name in methods_with("where")}  # fmt: skip
    apart = {name for name in default if "query" not in str(default[name])}
    assert named_in(setting_options()["where"].shown) == apart


def test_the_help_names_all_methods_and_samplers():
    options = setting_options()
    assert named_in(options["method"].help) == {*METHODS}
    assert {*re.findall(r"\((\w+)\)", options["sampler"].help)} == {*SAMPLERS}

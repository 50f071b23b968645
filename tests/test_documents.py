"""The documents name commands and files that are there."""

import re
from pathlib import Path

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


def test_links_between_documents_lead_to_files():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    documents.append(ROOT / "experiments" / "README.md")
    for document in documents:
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9.]*)`", text))
    assert len(named) > 20
    places = (ROOT, ROOT / "sparse_jax")
    assert not {n for n in named if not any((p / n).exists() for p in places)}

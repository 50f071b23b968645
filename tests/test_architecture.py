"""Imports point downwards only, and the heavy ones wait until they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_jax

PACKAGE = Path(sparse_jax.__file__).parent

# From the ground up. A file may import from its own folder and from lower rooms.
ROOMS = (
    ("errors",),
    ("params",),
    ("samplers", "supports", "models"),
    ("transforms", "methods", "models/families"),
    ("models/hf",),
    ("adapter", "compact", "data"),
    ("sharding",),
    ("generation",),
    ("training",),
    ("planning",),
    ("cli",),
)
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}
FILES = sorted(PACKAGE.rglob("*.py"))
FILES.remove(PACKAGE / "__init__.py")
SLOW = {"torch", "datasets", "matplotlib", "transformers", "huggingface_hub"}


def room(parts):
    """The longest folder of a module that is a room, or the module itself."""
    names = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(name for name in names if name in LEVEL)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def name(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_downwards(path):
    here = room(path.relative_to(PACKAGE).with_suffix("").parts)
    for module in imported(path):
        assert not module.startswith(("experiments", "tests"))
        if module.startswith("sparse_jax."):
            there = room(module.split(".")[1:])
            assert there == here or LEVEL[there] < LEVEL[here], f"{here} -> {there}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_needs_a_table_of_contents(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=name)
def test_slow_libraries_are_imported_where_they_are_used(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        assert not {module.split(".")[0] for module in modules} & SLOW


IMPORTS = {
    "command line": ("import sparse_jax.cli.main", {"jax", "flax", "optax", "torch"}),
    "sift and ist": ("from sparse_jax import ist, sift", {"flax", "torch"}),
}


@pytest.mark.parametrize(("code", "heavy"), IMPORTS.values(), ids=IMPORTS)
def test_an_import_loads_no_library_that_it_does_not_need(code, heavy):
    code += f"; import sys; print({heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


def test_every_public_name_can_be_reached():
    for public in sparse_jax.__all__:
        assert getattr(sparse_jax, public) is not None

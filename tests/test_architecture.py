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
    ("errors", "axes"),
    ("names", "arguments", "sites", "top_k", "rows", "gradients", "lanes_tpu"),
    ("local_support",),
    ("lanes",),
    ("support", "top_k_local"),
    ("roles", "scores", "layers", "samplers", "entries"),
    ("packing", "granularity"),
    ("transforms", "adapters", "models"),
    ("tuner_checks",),
    ("compact", "tasks"),
    ("layerwise", "sharding"),
    ("adapter_file",),
    ("adapter_method",),
    ("adapter_use", "adapter_peft"),
    ("generation",),
    ("training",),
    ("planning",),
    ("cli",),
)
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)
FILES += sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")
SLOW = {"torch", "datasets", "matplotlib", "transformers", "huggingface_hub"}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
    here = room(path)
    for module in imported(path):
        assert not module.startswith(("experiments", "tests"))
        if module.startswith("sparse_jax."):
            there = module.split(".")[1]
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

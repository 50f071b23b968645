"""Imports point downwards only, and the heavy ones wait until they are used."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import sparse_jax
import sparse_jax.sharding

PACKAGE = Path(sparse_jax.__file__).parent

# From the ground up. A file may import from its own folder and from lower rooms.
ROOMS = (
    ("errors",),
    ("params",),
    ("samplers", "supports", "models"),
    ("transforms", "methods", "models/families"),
    ("models/hf",),
    ("adapter", "data"),
    ("compact", "interchange"),
    ("sharding",),
    ("generation",),
    ("training",),
    ("planning",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}
FILES = sorted(PACKAGE.rglob("*.py"))
FILES.remove(PACKAGE / "__init__.py")
SLOW = {"torch", "datasets", "matplotlib", "transformers", "huggingface_hub", "scipy"}


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


def arrows(path):
    """Rooms that a file imports from and must not."""
    here = room(path.relative_to(PACKAGE).with_suffix("").parts)
    for module in imported(path):
        if module.startswith(("experiments", "tests")):
            yield f"{here} -> {module}"
        if module.startswith("sparse_jax."):
            there = room(module.split(".")[1:])
            if there != here and LEVEL[there] >= LEVEL[here]:
                yield f"{here} -> {there}"


def heavy(path):
    """Slow libraries that a file loads when it is imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        yield from {module.split(".")[0] for module in modules} & SLOW


def too_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    return [f"{lines} lines"] if lines > 400 else []


LINTS = {
    "imports point downwards": arrows,
    "no file needs a table of contents": too_long,
    "slow libraries are imported where they are used": heavy,
}


@pytest.mark.parametrize("lint", LINTS.values(), ids=LINTS)
def test_every_file_of_the_package(lint):
    offenders = [f"{name(path)}: {what}" for path in FILES for what in lint(path)]
    assert not offenders, "\n".join(offenders)


IMPORTS = {
    "command line": ("import sparse_jax.cli.main", {"jax", "flax", "optax", "torch"}),
    "sift and ist": ("from sparse_jax import ist, sift", {"flax", "torch"}),
}


@pytest.mark.parametrize(("code", "heavy"), IMPORTS.values(), ids=IMPORTS)
def test_an_import_loads_no_library_that_it_does_not_need(code, heavy):
    code += f"; import sys; print({heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


@pytest.mark.parametrize("package", [sparse_jax, sparse_jax.sharding])
def test_every_public_name_can_be_reached(package):
    for public in package.__all__:
        assert getattr(package, public) is not None


def test_the_version_is_that_of_the_installed_package():
    assert sparse_jax.__version__ == version("sparse_jax")

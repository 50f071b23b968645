"""Builds the API reference from the docstrings: `python docs/api.py [FOLDER]`."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import sparse_jax

# Optax's types name each other in a way that pdoc cannot resolve. Anything else that a
# docstring or an annotation makes it complain of is an error.
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="(?s)Error parsing type.*ArrayTree")


def main(folder: Path) -> None:
    """Writes one page for the public names, and one for every module."""
    rooms = pkgutil.iter_modules(sparse_jax.__path__, "sparse_jax.")
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc("sparse_jax", *(room.name for room in rooms), output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))

"""Builds the API reference from the docstrings: `python docs/api.py [FOLDER]`."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

# The package beside this file, even where a copy of it is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

import sparse_jax

# Annotations are checked by pyright; pdoc cannot resolve all of them (aliases that name
# themselves, imports for type checkers alone, the extra `eval` where it is missing).
# Anything else it warns of is an error.
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="Error parsing type annotation")
missing = "Failed to run TYPE_CHECKING code .* No module named 'lm_eval'"
warnings.filterwarnings("ignore", message=missing)
# A TypedDict has no bases when it runs, so keys that it inherits are from nowhere.
inherited = r"Cannot determine where \S+Options\.\w+ is taken from"
warnings.filterwarnings("ignore", message=inherited)


def main(folder: Path) -> None:
    """Writes one page for the public names, and one for every module."""
    rooms = pkgutil.iter_modules(sparse_jax.__path__, "sparse_jax.")
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc("sparse_jax", *(room.name for room in rooms), output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))

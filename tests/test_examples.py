"""Every example of `experiments/examples` runs, and its loss falls."""

import importlib
import importlib.util
from pathlib import Path

import pytest

from experiments import examples

NEEDS = {"tunix_trainer": "tunix"}
EXAMPLES = sorted(
    path.stem
    for path in Path(examples.__file__).parent.glob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_loss_of_an_example_falls(name, capsys):
    library = NEEDS.get(name)
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install google-{library}")
    before, after = importlib.import_module(f"experiments.examples.{name}").main()
    assert after < before / 2
    assert capsys.readouterr().out.startswith(f"loss {before:.3f} -> {after:.3f}\n")

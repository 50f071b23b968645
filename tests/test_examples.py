"""Every example of `experiments/examples` runs, and its loss falls."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import tiny_settings, write_files

from experiments import examples
from sparse_jax import finetune

EXAMPLES = {path.stem for path in Path(examples.__file__).parent.glob("[a-z]*.py")}


PEFT = {"serve_with_peft", "continue_from_peft"}
OTHERS = {"tunix_trainer", *PEFT}  # with tests of their own


@pytest.mark.parametrize("name", sorted(EXAMPLES - OTHERS))
@pytest.mark.quick(1)
def test_the_loss_of_an_example_falls(name, capsys):
    before, after = importlib.import_module(f"experiments.examples.{name}").main()
    assert after < before / 2
    assert capsys.readouterr().out.startswith(f"loss {before:.3f} -> {after:.3f}\n")


def test_the_trainer_of_tunix_takes_sift():
    if importlib.util.find_spec("tunix") is None:
        pytest.skip("needs tunix: pip install google-tunix")
    # A process of its own: tunix promotes ranks, and uses what flax calls deprecated.
    command = [sys.executable, "-m", "experiments.examples.tunix_trainer"]
    run = subprocess.run(command, capture_output=True, text=True)
    found = re.match(
        r"loss (\S+) -> (\S+)\noptimizer state (\S+) bytes, .* (\S+)\n", run.stdout
    )
    assert found, run.stderr
    before, after, state, full = (float(n.replace(",", "")) for n in found.groups())
    assert after < before / 2 and state < full / 8


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_the_readme_serves_a_run_with_peft(tmp_path, monkeypatch):
    """What is run is the text, with a tiny model in the place of the one it names."""
    pytest.importorskip("peft")
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(import jax, torch\n.*?)```", text, re.DOTALL)
    assert code.count("\n") <= 20
    monkeypatch.chdir(tmp_path)
    files = write_files(tmp_path)
    finetune(tiny_settings(**files, output="runs/mrpc", method="sift", max_steps=2))
    found = {}
    exec(code.replace("FacebookAI/roberta-large", str(files["model"])), found)
    assert found["adapter"].support and found["logits"].shape == (1, 2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("name", sorted(PEFT))
@pytest.mark.slow
def test_peft_gives_our_logits(name, capsys):
    for library in ("peft", "torch"):
        pytest.importorskip(library)
    assert importlib.import_module(f"experiments.examples.{name}").main() < 1e-5
    assert capsys.readouterr().out.startswith("largest difference of the logits ")

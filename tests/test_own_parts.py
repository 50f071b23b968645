"""Your own method, score and sampler, by the public interface alone."""

import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from tiny_run import write_data, write_model

import sparse_jax
from sparse_jax.cli.main import main


@dataclass(frozen=True, kw_only=True)
class Salient(sparse_jax.Sparse):
    """Trains the entries of the feed-forward maps with the largest |g w|."""


@dataclass(frozen=True, kw_only=True)
class Last(sparse_jax.Sampler):
    """Trains the last layers."""

    def draw(self, memory, key, turn):
        """Returns their numbers."""
        del memory, key, turn
        return jnp.arange(self.num_layers - self.num_active, self.num_layers)


@pytest.fixture(autouse=True)
def registered():
    """Registers them as a user's program does, before it calls anything else."""
    from sparse_jax.methods.registry import METHODS
    from sparse_jax.samplers.registry import SAMPLERS
    from sparse_jax.supports.scores import SCORES

    sparse_jax.register_score("saliency", lambda gradient, param: gradient * param)
    sparse_jax.register_method(
        "salient", Salient, learning_rate=1e-2, where="mlp/.*kernel", score="saliency"
    )
    sparse_jax.register_sampler("last", Last, help="the last ones")
    yield
    del SCORES["saliency"], METHODS["salient"], SAMPLERS["last"]


def test_the_command_line_trains_by_their_words(tmp_path, monkeypatch, capsys):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    words = (
        f"sparse-jax finetune --model {model} --data {data} --task sst2 --output "
        f"{tmp_path / 'run'} --method salient --density 0.1 --sampler last "
        "--active 0.5 --batch-size 8 --max-steps 3"
    )
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    adapter = sparse_jax.load_adapter(tmp_path / "run")
    assert isinstance(adapter.method, Salient)
    assert {*adapter.support} == {"layers/mlp/up/kernel", "layers/mlp/down/kernel"}
    key = jax.random.key(0)  # of the head, which the adapter replaces
    _, base = sparse_jax.from_pretrained(model, num_labels=2, key=key)
    tuned, _ = sparse_jax.apply_adapter(base, adapter)
    kernels = (params["layers"]["mlp"]["up"]["kernel"] for params in (base, tuned))
    moved = jnp.any(jnp.not_equal(*kernels), axis=(1, 2))
    assert moved.tolist() == [False, True]  # the last of two layers

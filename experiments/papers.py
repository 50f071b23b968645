"""Shapes and plans of the models in the papers' tables, which no small machine runs."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sparse_jax import Settings
from sparse_jax.models.functional import Model

__all__ = ["MODELS", "llama", "network_from", "network_of", "print_plan"]

_ROBERTA = {
    "model_type": "roberta", "vocab_size": 50265, "hidden_size": 1024,
    "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1,
    "hidden_act": "gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip


def llama(width: int, layers: int, heads: int, hidden: int) -> dict[str, object]:
    """Returns the `config.json` of a first Llama."""
    return {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": hidden, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip


# What `config.json` of each says, of which `sparse-jax plan` needs no more.
MODELS: dict[str, dict[str, object]] = {
    "roberta-large": _ROBERTA,
    "llama-tiny": llama(256, 2, 4, 768),
    "smollm2-135m": {
        **llama(576, 30, 9, 1536),
        "vocab_size": 49152,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-1b": llama(2048, 16, 32, 8192),
    "llama-7b": llama(4096, 32, 32, 11008),
    "llama-13b": llama(5120, 40, 40, 13824),
    "llama-33b": llama(6656, 60, 52, 17920),
}


def network_of(model: str) -> Model:
    """Returns the network of a model of `MODELS`, without weights."""
    return network_from(MODELS[model])


def network_from(config: Mapping[str, object]) -> Model:
    """Returns the network that a `config.json` describes, without weights."""
    from sparse_jax.planning.abstract import read_model

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return read_model(folder)


def print_plan(
    model: str, rows: Mapping[str, Settings], *, length: int, target: str
) -> None:
    """Prints what one update of every row needs on devices that need not be here.

    Args:
      model: of `MODELS`.
      rows: settings of one batch size and one mesh.
      length: tokens of every example.
      target: as `sparse-jax plan --target` takes it.
    """
    from sparse_jax.cli.plan_table import print_plans
    from sparse_jax.planning.plan import make_plan
    from sparse_jax.planning.target import find_target
    from sparse_jax.sharding.mesh import MeshShape, parse_mesh

    first = next(iter(rows.values()))
    shape = parse_mesh(first.mesh) if first.mesh else MeshShape()
    network = network_of(model)
    found = find_target(target, shape.size)
    plans = []
    for number, (name, settings) in enumerate(rows.items(), 1):
        print(f"[{number}/{len(rows)}] {name}: compiling", flush=True)
        plans.append(
            make_plan(network, settings, length=length, shape=shape, target=found)
        )
    print_plans(plans, found, shape, (first.batch_size, length))

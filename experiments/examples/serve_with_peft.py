"""SIFT here, served by Hugging Face PEFT: the logits are the same.

    python -m experiments.examples.serve_with_peft

Needs `pip install peft torch`. Prints the largest difference of the logits.
"""

import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparse_jax

BERT = str(Path(__file__).parents[1] / "assets" / "quickstart_bert")
TEXTS = {"Opens a socket to a host.": "network", "Sorts a list by a key.": "data"}


def main() -> float:
    """Trains, exports, loads in PEFT, and returns the largest difference."""
    folder = Path(tempfile.mkdtemp())
    rows = [json.dumps({"text": k, "label": v}) for k, v in TEXTS.items()]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    own = sparse_jax.Settings(
        model=BERT, task="classification", data=str(folder), output=str(folder / "run")
    )
    sparse_jax.finetune(own, density=0.01)
    sparse_jax.export(folder / "run", to="peft", output=folder / "peft")

    base = AutoModelForSequenceClassification.from_pretrained(
        BERT, num_labels=2, dtype=torch.float32
    )
    theirs = PeftModel.from_pretrained(base, folder / "peft").eval()
    batch = AutoTokenizer.from_pretrained(BERT)([*TEXTS], padding=True)
    with torch.no_grad():
        logits = theirs(**batch.convert_to_tensors("pt")).logits.numpy()

    adapter = sparse_jax.load_adapter(folder / "run")
    model, params = sparse_jax.from_pretrained(
        BERT, labels=adapter.labels, key=jax.random.key(0)
    )
    params = sparse_jax.merge_adapter(params, adapter)
    inputs = dict(batch.convert_to_tensors("np"))
    ours = jax.jit(model)(params, inputs)
    difference = float(np.abs(logits - ours).max())
    print(f"largest difference of the logits {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()

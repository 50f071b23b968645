"""LoRA of Hugging Face PEFT, trained further here a few layers at a time, and back.

    python -m experiments.examples.continue_from_peft

Needs `pip install peft torch`. Prints the largest difference of the logits.
"""

import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparse_jax

BERT = str(Path(__file__).parents[1] / "assets" / "quickstart_bert")
TEXTS = {"Opens a socket to a host.": 1, "Sorts a list by a key.": 0}


def base() -> torch.nn.Module:
    """Returns the base, whose new head is replaced by that of the adapter."""
    return AutoModelForSequenceClassification.from_pretrained(
        BERT, num_labels=2, dtype=torch.float32
    )


def main() -> float:
    """Goes on from PEFT, gives it back, and returns the largest difference."""
    folder = Path(tempfile.mkdtemp())
    # Stands for an adapter that was trained with PEFT: B is not zero.
    config = LoraConfig(
        r=4, target_modules=["query", "value"], task_type="SEQ_CLS",
        init_lora_weights=False,
    )  # fmt: skip
    get_peft_model(base(), config).save_pretrained(str(folder / "theirs"))

    rows = [json.dumps({"text": k, "label": v}) for k, v in TEXTS.items()]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    sparse_jax.finetune(
        model=BERT,
        task="classification",
        data=str(folder),
        method="lora",  # with the settings of the adapter
        adapter=str(folder / "theirs"),
        sampler="ist",
        output=str(folder / "run"),
    )
    sparse_jax.export(folder / "run", to="peft", output=folder / "back")

    batch = AutoTokenizer.from_pretrained(BERT)([*TEXTS], padding=True)
    theirs = PeftModel.from_pretrained(base(), folder / "back").eval()
    with torch.no_grad():
        logits = theirs(**batch.convert_to_tensors("pt")).logits.numpy()

    adapter = sparse_jax.load_adapter(folder / "run")
    model, params = sparse_jax.from_pretrained(
        BERT, labels=adapter.labels, key=jax.random.key(0)
    )
    params = sparse_jax.merge_adapter(params, adapter)
    ours = jax.jit(model)(params, dict(batch.convert_to_tensors("np")))
    difference = float(np.abs(logits - ours).max())
    print(f"largest difference of the logits {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()

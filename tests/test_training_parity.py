"""A whole run makes the updates of transformers' Trainer on the same batches."""

import json
import warnings

import numpy as np
import pytest
from tiny_models import hugging_face_config, hugging_face_model
from tiny_run import VOCABULARY, tiny_settings, write_data, write_model
from tiny_text import text_settings, write_chats, write_decoder

from sparse_jax import finetune
from sparse_jax.training.build import make_job
from sparse_jax.training.run_files import updates_of

UPDATES = 50
ATTENTION = ("query", "key", "value", "attention.output.dense")
# method -> whether PyTorch trains a parameter, by its name
TRAINED = {
    "full": lambda name: True,
    "bitfit": lambda name: name.endswith(".bias") or name.startswith("classifier"),
    "head": lambda name: name.startswith("classifier"),
    "sift": lambda name: (
        (name.startswith("classifier") or any(site in name for site in ATTENTION))
        and "LayerNorm" not in name
    ),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Returns a folder with a BERT that PyTorch wrote, head included, and data."""
    from transformers import AutoModelForSequenceClassification

    folder = write_model(tmp_path_factory.mktemp("files") / "model")
    config = hugging_face_config(
        "bert", vocab_size=len(VOCABULARY), max_position_embeddings=16, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    hugging_face_model(AutoModelForSequenceClassification, config).save_pretrained(
        folder
    )
    return folder, write_data(folder.parent / "data")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_decoder(folder / "model"), write_chats(folder / "chats.jsonl")


def our_losses(settings):
    finetune(settings)
    with open(f"{settings.output}/metrics.jsonl", encoding="utf-8") as file:
        return [row["loss"] for row in updates_of([json.loads(line) for line in file])]


def batches_of(settings):
    """Yields the batches of a run as PyTorch's tensors, without its micro-batches."""
    import torch

    feed = make_job(settings).feed
    count = 0
    for epoch in range(settings.epochs):
        for batch in feed.train(epoch):
            if count == UPDATES:
                return
            count += 1
            whole = {
                name: x.reshape(-1, *x.shape[2:]) if settings.accumulate > 1 else x
                for name, x in batch.items()
            }
            yield {name: torch.tensor(x) for name, x in whole.items()}


def largest(gradient, density):
    """Returns a mask of the largest entries of a gradient."""
    import torch

    count = int(np.ceil(density * gradient.numel()))
    mask = torch.zeros(gradient.numel())
    mask[gradient.abs().flatten().topk(count).indices] = 1
    return mask.reshape(gradient.shape)


def trainer_losses(model, settings, loss_of, folder):
    """Returns the losses of transformers' Trainer on the batches of a run.

    Its schedules begin with a rate of zero: here they are for one update more, from the
    second on.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    batches = [*batches_of(settings)]
    for name, leaf in model.named_parameters():
        leaf.requires_grad = TRAINED[settings.method](name)
    if settings.method == "sift":
        loss_of(model, batches[0]).backward()
        for name, leaf in model.named_parameters():
            if leaf.requires_grad and not name.startswith("classifier"):
                mask = largest(leaf.grad, settings.density)
                leaf.register_hook(lambda gradient, mask=mask: gradient * mask)
        model.zero_grad()
    losses = []

    class Given(Trainer):
        def get_train_dataloader(self):
            parts = [
                {name: x.chunk(settings.accumulate)[i] for name, x in batch.items()}
                # Trainer takes the mean over the parts.
                | {"share": settings.accumulate / batch["weights"].sum()}
                for batch in batches
                for i in range(settings.accumulate)
            ]
            return torch.utils.data.DataLoader(parts, batch_size=None)

        def compute_loss(self, model, inputs, num_items_in_batch=None):
            loss = inputs["share"] * loss_of(model, inputs)
            losses.append(loss.item())
            return loss

        def create_scheduler(self, num_training_steps, optimizer=None):
            made = super().create_scheduler(num_training_steps + 1, optimizer)
            made.step()
            return made

    arguments = TrainingArguments(
        output_dir=str(folder),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.resolved_schedule,
        warmup_steps=max(1, round(settings.warmup * UPDATES)),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=1,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a step of the schedule before the first
        trainer = Given(model=model, args=arguments, train_dataset=batches)
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
    return np.mean(np.reshape(losses, [UPDATES, -1]), axis=1)


def class_loss(model, batch):
    """Returns the sum of the losses of a batch."""
    import torch

    inputs = {
        name: batch[name].long()
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    losses = torch.nn.functional.cross_entropy(
        model(**inputs).logits, batch["labels"].long(), reduction="none"
    )
    return (batch["weights"] * losses).sum()


def token_loss(model, batch):
    """Returns the sum of the losses of the tokens of a batch."""
    import torch

    ids, weights = batch["input_ids"].long(), batch["weights"][:, 1:]
    logits = model(ids, attention_mask=batch["attention_mask"].long()).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return (weights * losses).sum()


@pytest.mark.parametrize(
    ("method", "learning_rate", "accumulate", "more"),
    [
        ("full", 3e-3, 4, {"schedule": "cosine", "weight_decay": 0.3}),
        ("full", 3e-3, 1, {"weight_decay": 0.3, "max_grad_norm": 0.5, "warmup": 0}),
        ("sift", 1e-2, 1, {"weight_decay": 0.0}),
        pytest.param("full", 3e-3, 4, {"weight_decay": 0.3}, marks=pytest.mark.slow),
        pytest.param(
            "full", 3e-3, 1, {"schedule": "cosine", "max_grad_norm": 0},
            marks=pytest.mark.slow,
        ),
        pytest.param("bitfit", 1e-2, 1, {}, marks=pytest.mark.slow),
        pytest.param("head", 1e-2, 1, {}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.quick(1)
def test_a_classifier_learns_as_with_trainer(
    method, learning_rate, accumulate, more, encoder, tmp_path
):
    from transformers import AutoModelForSequenceClassification

    options = {
        "method": method,
        "learning_rate": learning_rate,
        "accumulate": accumulate,
        "epochs": 17,
        "max_steps": UPDATES,
        **more,
    }
    settings = tiny_settings(*encoder, tmp_path / "run", **options)
    model = AutoModelForSequenceClassification.from_pretrained(encoder[0])
    expected = trainer_losses(model, settings, class_loss, tmp_path)
    assert min(expected) < 0.9 * expected[0]
    np.testing.assert_allclose(our_losses(settings), expected, atol=1e-4)


@pytest.mark.parametrize("accumulate", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_decoder_learns_as_with_trainer(accumulate, decoder, tmp_path):
    from transformers import AutoModelForCausalLM

    settings = text_settings(
        *decoder, tmp_path / "run", method="full", weight_decay=0.1,
        learning_rate=1e-3, epochs=13, max_steps=UPDATES, accumulate=accumulate,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(decoder[0])
    expected = trainer_losses(model, settings, token_loss, tmp_path)
    assert min(expected) < 0.9 * expected[0]
    np.testing.assert_allclose(our_losses(settings), expected, atol=1e-4)

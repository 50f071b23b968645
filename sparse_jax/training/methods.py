"""The seven methods of the command line."""

from collections.abc import Callable, Sequence

from sparse_jax.adapters.dense import Dense
from sparse_jax.adapters.lora import LoRA
from sparse_jax.adapters.method import Method
from sparse_jax.adapters.sparse import Sparse
from sparse_jax.scores import SCORES
from sparse_jax.training.settings import Settings

__all__ = ["METHODS", "head_rules", "method_of"]

# The maps that the paper adapts in its GLUE experiments: query, key, value and output.
_MAPS = "attention/(query|key|value|output)"
SPARSE_WHERE = (f"^layers/{_MAPS}/",)
LORA_WHERE = (f"^{_MAPS}$",)

Rules = tuple[str, ...]


def head_rules(new: Sequence[str]) -> Rules:
    """Returns the rules of a head: the classifier and whatever a checkpoint lacks.

    BERT's pooler is part of it only if the checkpoint comes without one, because it
    then starts at random.

    Args:
      new: names of the leaves that the checkpoint does not have.

    Example:
      >>> head_rules(["classifier/bias", "pooler/bias"])
      ('^classifier/', '^pooler/')
    """
    roots = {"classifier", *(name.partition("/")[0] for name in new)}
    return tuple(f"^{root}/" for root in sorted(roots))


def _sparse(score: str) -> Callable[[Settings, Rules], Method]:
    """Returns the maker of a sparse method that ranks entries by a score."""
    return lambda settings, head: Sparse(
        density=settings.density,
        where=settings.where or SPARSE_WHERE,
        dense=head,
        rank_by=SCORES[score],
    )


def _lora(settings: Settings, head: Rules) -> Method:
    """Returns LoRA on the chosen sites."""
    return LoRA(rank=settings.rank, where=settings.where or LORA_WHERE, dense=head)


# word -> (settings, rules of the head) -> method
METHODS: dict[str, Callable[[Settings, Rules], Method]] = {
    "full": lambda settings, head: Dense(dense=settings.dense or (".*",)),
    "head": lambda settings, head: Dense(dense=head),
    "bitfit": lambda settings, head: Dense(dense=("bias$", *head)),
    "lora": _lora,
    "sift": _sparse("gradient"),
    "random": _sparse("random"),
    "magnitude": _sparse("magnitude"),
}


def method_of(settings: Settings, new: Sequence[str]) -> Method:
    """Returns the method that settings ask for.

    Args:
      settings: a run's settings; `dense` replaces the rules of the head.
      new: names of the leaves that the checkpoint does not have.

    Example:
      >>> settings = Settings(model="m", task="cola", output="o", method="bitfit")
      >>> method_of(settings, ["classifier/bias"]).dense
      ('bias$', '^classifier/')
    """
    return METHODS[settings.method](settings, settings.dense or head_rules(new))

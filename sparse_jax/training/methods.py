"""The methods of the command line."""

from collections.abc import Callable, Sequence

from sparse_jax.adapters.bottleneck import HOULSBY, PFEIFFER, Bottleneck
from sparse_jax.adapters.dense import Dense
from sparse_jax.adapters.dora import DoRA
from sparse_jax.adapters.ia3 import IA3
from sparse_jax.adapters.lora import LoRA
from sparse_jax.adapters.method import Method
from sparse_jax.adapters.parallel import Parallel
from sparse_jax.adapters.prefix import Prefix
from sparse_jax.adapters.series import Series
from sparse_jax.adapters.sparse import Sparse
from sparse_jax.models.activations import ACTIVATIONS
from sparse_jax.scores import SCORES
from sparse_jax.training.settings import GRANULARITIES, Settings

__all__ = ["METHODS", "head_rules", "method_of"]

# The maps that the paper adapts in its GLUE experiments: query, key, value and output.
_MAPS = "attention/(query|key|value|output)"
SPARSE_WHERE = (f"^layers/{_MAPS}/",)
LORA_WHERE = (f"^{_MAPS}$",)

Rules = tuple[str, ...]
# (settings, rules of the head) -> method
Make = Callable[[Settings, Rules], Method]


def head_rules(head: Sequence[str], new: Sequence[str]) -> Rules:
    """Returns the rules of a head: that of the task, and whatever a checkpoint lacks.

    BERT's pooler is part of it only if the checkpoint comes without one, because it
    then starts at random.

    Args:
      head: subtrees of the task.
      new: names of the leaves that the checkpoint does not have.

    Example:
      >>> head_rules(["classifier"], ["classifier/bias", "pooler/bias"])
      ('^classifier/', '^pooler/')
    """
    roots = {*head, *(name.partition("/")[0] for name in new)}
    return tuple(f"^{root}/" for root in sorted(roots))


def _sparse(score: str) -> Make:
    """Returns the maker of a sparse method that ranks entries by a score."""
    return lambda settings, head: Sparse(
        density=settings.density,
        where=settings.where or SPARSE_WHERE,
        dense=head,
        rank_by=SCORES[score],
        granularity=GRANULARITIES[settings.granularity],
    )


def _low_rank(kind: type[LoRA]) -> Make:
    """Returns the maker of a method with thin matrices."""
    return lambda settings, head: kind(
        rank=settings.rank,
        alpha=settings.alpha,
        rslora=settings.rslora,
        dropout=settings.dropout or 0.0,
        where=settings.where or LORA_WHERE,
        dense=head,
    )


def _bottleneck(kind: type[Bottleneck], where: Rules) -> Make:
    """Returns the maker of a method with a bottleneck."""
    return lambda settings, head: kind(
        size=settings.size or 64,
        activation=ACTIVATIONS[settings.activation or "relu"],
        where=settings.where or where,
        dense=head,
    )


def _ia3(settings: Settings, head: Rules) -> Method:
    """Returns (IA)3; `where` is about the scaled outputs."""
    return IA3(where=settings.where or IA3.where, dense=head)


# word -> maker
METHODS: dict[str, Make] = {
    "full": lambda settings, head: Dense(dense=settings.dense or (".*",)),
    "head": lambda settings, head: Dense(dense=head),
    "bitfit": lambda settings, head: Dense(dense=("bias$", *head)),
    "lora": _low_rank(LoRA),
    "dora": _low_rank(DoRA),
    "series": _bottleneck(Series, HOULSBY),
    "parallel": _bottleneck(Parallel, PFEIFFER),
    "ia3": _ia3,
    "prefix": lambda settings, head: Prefix(
        length=settings.prefix_length or 16, dense=head
    ),
    "sift": _sparse("gradient"),
    "random": _sparse("random"),
    "magnitude": _sparse("magnitude"),
}


def method_of(settings: Settings, head: Rules) -> Method:
    """Returns the method that settings ask for.

    Args:
      settings: a run's settings; `dense` replaces the rules of the head.
      head: rules of the leaves that are trained in full, as from `head_rules`.

    Example:
      >>> settings = Settings(model="m", task="cola", output="o", method="bitfit")
      >>> method_of(settings, ("^classifier/",)).dense
      ('bias$', '^classifier/')
    """
    return METHODS[settings.method](settings, settings.dense or head)

"""The methods of the command line."""

from collections.abc import Sequence

from sparse_jax.adapter_method import METHODS
from sparse_jax.adapters.method import Method
from sparse_jax.training.settings import Settings

__all__ = ["head_rules", "method_of"]


def head_rules(head: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
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


def method_of(settings: Settings, head: tuple[str, ...]) -> Method:
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

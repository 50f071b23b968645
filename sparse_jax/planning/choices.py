"""Choices of what an update keeps of a trained value, and the words that name them."""

from collections.abc import Mapping
from types import MappingProxyType

from sparse_jax.training.recipe_options import MOMENTS, PREVIOUS_NORM
from sparse_jax.training.settings import Settings

__all__ = ["STATE_CHOICES", "choices_in"]

# word -> the settings that it stands for
STATE_CHOICES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "split": {"split_masters": True},
        **{word: {"moment_dtype": word} for word in MOMENTS[1:]},
        "backward": {"update_in_backward": True, "clip_by": PREVIOUS_NORM},
    }
)


def choices_in(settings: Settings) -> tuple[str, ...]:
    """Returns the words of what settings keep otherwise than by default.

    Example:
      >>> settings = Settings(model="m", task="causal", output="o", dtype="bfloat16")
      >>> from dataclasses import replace
      >>> choices_in(replace(settings, split_masters=True))
      ('split',)
    """
    return tuple(
        word
        for word, meant in STATE_CHOICES.items()
        if all(getattr(settings, name) == value for name, value in meant.items())
    )

"""Choices of a layout and of what is kept of a trained value, and their words."""

from collections.abc import Mapping
from types import MappingProxyType

from sparse_jax.training.recipe_options import MOMENTS, PREVIOUS_NORM
from sparse_jax.training.settings import Settings

__all__ = ["CHOICES", "choices_in"]

# Those of `GRANULARITIES` but the usual one; its module imports JAX, which takes long.
_GRANULARITIES = ("entry16", "lane", "row", "column", "4x4", "256x256")
# word -> the settings that it stands for
CHOICES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        **{word: {"granularity": word} for word in _GRANULARITIES},
        "split": {"split_masters": True},
        **{word: {"moment_dtype": word} for word in MOMENTS[1:]},
        "backward": {"update_in_backward": True, "clip_by": PREVIOUS_NORM},
    }
)


def choices_in(settings: Settings) -> tuple[str, ...]:
    """Returns the words of what settings choose otherwise than by default.

    Example:
      >>> settings = Settings(model="m", task="causal", output="o", dtype="bfloat16")
      >>> from dataclasses import replace
      >>> choices_in(replace(settings, split_masters=True))
      ('split',)
    """
    # Without clipping there is nothing to say of the norm that it goes by.
    clips = settings.max_grad_norm != 0
    return tuple(
        word
        for word, meant in CHOICES.items()
        if all(
            getattr(settings, name) == value
            for name, value in meant.items()
            if clips or name != "clip_by"
        )
    )

"""Names with values, such as text=review,label=stars."""

from collections.abc import Mapping

from sparse_jax.errors import InputError, brief

__all__ = ["PAIRS", "read_pairs"]

PAIRS = Mapping[str, str]  # the type of a setting


def read_pairs(what: str, value: object) -> dict[str, str]:
    """Returns a mapping of texts, also from a text of pairs.

    Args:
      what: the name of the setting, for messages.
      value: a mapping, or pairs with `=` within and `,` between them.

    Raises:
      InputError: if it is neither, or a name is there twice.

    Example:
      >>> read_pairs("`columns`", "text=review, label=stars")
      {'text': 'review', 'label': 'stars'}
    """
    pairs: list[tuple[object, object]] = []
    if isinstance(value, Mapping):
        pairs = [*value.items()]
    elif isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",")]
        pairs = [(name.strip(), said.strip()) for name, _, said in parts]
    found = {
        name: said
        for name, said in pairs
        if isinstance(name, str) and isinstance(said, str) and name and said
    }
    if not pairs or len(found) < len(pairs):
        raise InputError(
            f"{what} must be a mapping such as {{text: review}}, or pairs such as "
            f"text=review,label=stars, each name once, got {brief(value)}."
        )
    return found

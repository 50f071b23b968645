"""Groups of documents that share sentences, so that a split cannot leak."""

from collections import Counter, defaultdict
from collections.abc import Sequence

__all__ = ["groups_of"]

_WORDS = 4  # in a shingle
_COMMON = 40  # a shingle in more documents than this is a turn of phrase


def groups_of(texts: Sequence[str], share: float = 0.3) -> list[int]:
    """Returns for every text the number of its group.

    Two texts are joined when they have at least `share` of the four-word shingles of
    the shorter one in common; groups are the connected components.

    Example:
      >>> groups_of(["a b c d e", "x b c d e y", "nothing of the kind"])
      [0, 0, 2]
    """
    parent = list(range(len(texts)))
    shingles = [_shingles(text) for text in texts]
    for (i, j), common in _overlaps(shingles).items():
        if common >= share * min(len(shingles[i]), len(shingles[j])):
            first, second = sorted((_root(parent, i), _root(parent, j)))
            parent[second] = first
    return [_root(parent, i) for i in range(len(texts))]


def _shingles(text: str) -> set[tuple[str, ...]]:
    """Returns the runs of four words of a text."""
    words = text.lower().split()
    return set(zip(*(words[i:] for i in range(_WORDS)), strict=False))


def _overlaps(shingles: Sequence[set]) -> Counter[tuple[int, int]]:
    """Counts the shingles that each pair of texts has in common."""
    places = defaultdict(list)
    for i, own in enumerate(shingles):
        for shingle in own:
            places[shingle].append(i)
    common: Counter[tuple[int, int]] = Counter()
    for where in places.values():
        if len(where) <= _COMMON:
            common.update((i, j) for n, i in enumerate(where) for j in where[n + 1 :])
    return common


def _root(parent: list[int], i: int) -> int:
    """Returns the representative of a text's group."""
    while parent[i] != i:
        parent[i] = i = parent[parent[i]]
    return i

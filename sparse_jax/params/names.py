"""Leaf names, and ordered rules over them."""

import difflib
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax

from sparse_jax.errors import InputError

__all__ = [
    "Rule",
    "Tree",
    "first_match",
    "leaf_names",
    "leaves_by_name",
    "map_named",
    "patterns",
    "require_match",
]

Rule = str | Sequence[str]
Node = TypeVar("Node")
# Nodes in the nesting of a tree of parameters, as `jax.tree.map` takes it.
Tree: TypeAlias = Node | Iterable["Tree[Node]"] | Mapping[str, "Tree[Node]"]

# The last part of a leaf's name, which no one means by a single letter.
_KINDS = ("kernel", "bias", "scale", "embedding")

# Nodes that Flax puts around an array, with the array under `value`.
_BOXES = (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata"))


def leaf_names(tree: object) -> Tree[str]:
    """Returns a tree of the structure of `tree` whose leaves are their names.

    Example:
      >>> leaf_names({"query": {"kernel": 0, "bias": 0}})
      {'query': {'bias': 'query/bias', 'kernel': 'query/kernel'}}
    """
    return map_named(lambda name, leaf: name, tree)


def leaves_by_name(tree: object) -> dict[str, Any]:
    """Returns the leaves of a tree by their names.

    Example:
      >>> leaves_by_name({"query": {"kernel": 1, "bias": 2}})
      {'query/bias': 2, 'query/kernel': 1}
    """
    names = jax.tree.leaves(leaf_names(tree))
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def map_named(
    function: Callable[..., object],
    tree: object,
    *rest: object,
    is_leaf: Callable[[object], bool] | None = None,
) -> Any:
    """Maps `function(name, leaf, *rest_leaves)` over the leaves of a tree.

    The name of a leaf is the keys on its path joined by `/`. The `value` that Flax puts
    between a variable and its array is left out, so that a rule written for a pure
    dictionary also holds for the state it came from.

    Raises:
      InputError: if two leaves have the same name.

    Example:
      >>> map_named(lambda name, x: f"{name}={x}", {"a": 1, "b": 2})
      {'a': 'a=1', 'b': 'b=2'}
    """
    names: dict[str, tuple[Hashable, ...]] = {}
    boxes, is_leaf = _boxes(), is_leaf or (lambda node: False)
    stops = lambda node: isinstance(node, boxes) or is_leaf(node)
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stops):
        inside = [()]
        if isinstance(node, boxes):
            below = jax.tree_util.tree_leaves_with_path(node, is_leaf=is_leaf)
            inside = [keys[1:] for keys, _ in below]
        for keys in inside:
            whole = (*path, *keys)
            name = jax.tree_util.keystr(whole, simple=True, separator="/")
            if name in names:
                first, second = map(jax.tree_util.keystr, (names[name], whole))
                raise InputError(
                    f"`params` must have leaves of different names, got `{name}` for "
                    f"{first} and {second}. Rename one of them."
                )
            names[name] = whole
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    others = map(structure.flatten_up_to, rest)
    return structure.unflatten(map(function, names, leaves, *others))


def _boxes() -> tuple[type, ...]:
    """Returns the classes of boxes that a tree can hold by now."""
    # Importing Flax takes twice as long as all that `sift` needs of this library, and
    # no tree has boxes before somebody else imports it.
    return tuple(
        getattr(sys.modules[module], name)
        for module, name in _BOXES
        if module in sys.modules
    )


def first_match(rules: Mapping[str, Rule | None], name: str, default: str) -> str:
    """Returns the label of the first rule that matches a name.

    A rule is a regular expression, or several, searched for anywhere in the name;
    anchor it with `^` and `$` to match the whole. `None` matches nothing. Names that
    no rule matches get `default`, so every leaf is covered.

    Example:
      >>> rules = {"dense": "classifier", "sparse": "kernel$"}
      >>> [first_match(rules, n, "frozen") for n in ("classifier/kernel", "q/bias")]
      ['dense', 'frozen']
    """
    for label, rule in rules.items():
        if any(re.search(pattern, name) for pattern in patterns(rule)):
            return label
    return default


def require_match(
    argument: str, rule: Rule | None, names: Sequence[str], noun: str = "parameter"
) -> None:
    """Raises unless every pattern of a rule matches at least one name.

    Args:
      argument: name of the rule in messages.
      rule: expressions, searched for anywhere in a name.
      names: names of one kind.
      noun: what the names are called in messages.

    Raises:
      InputError: naming the pattern and the names nearest to it.

    Example:
      >>> require_match("where", "query", ["query/kernel", "value/kernel"])
    """
    for pattern in patterns(rule):
        if not isinstance(pattern, str):
            raise InputError(
                f"`{argument}` must be a regular expression, or a sequence of them, "
                f"got {rule!r}."
            )
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"`{argument}` must be a regular expression, got {pattern!r}: {error}."
            ) from error
        if not any(expression.search(name) for name in names):
            raise InputError(
                f"`{argument}` must match at least one {noun}, got {pattern!r}. "
                f"{_nearest(pattern, names)}"
            )


def patterns(rule: Rule | None) -> Sequence[str]:
    """Returns the patterns of a rule as a sequence."""
    if rule is None:
        return ()
    return rule if isinstance(rule, Sequence) and not isinstance(rule, str) else (rule,)


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Returns a sentence with up to four names that look most like a pattern.

    First come those with parts that begin as the words of the pattern do: `q_proj` is
    short for a query.
    """
    if not names:
        return "There is none."
    words = re.findall("[a-z]+", pattern.lower())

    def likeness(name: str) -> tuple[int, float]:
        parts = [part for part in name.lower().split("/") if part not in _KINDS]
        begun = sum(any(part.startswith(word) for part in parts) for word in words)
        return begun, difflib.SequenceMatcher(None, pattern, name).ratio()

    nearest = sorted(names, key=likeness, reverse=True)[:4]
    return f"The nearest names are {', '.join(f'`{name}`' for name in nearest)}."

"""Names, roles, supports and packing: the ground the methods stand on."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from sparse_jax import ENTRY, InputError, gather, scatter, sift
from sparse_jax.params.names import first_match, leaf_names, require_match
from sparse_jax.supports.layout import require_density, support_size
from sparse_jax.supports.masters import current_values, keep_masters
from sparse_jax.supports.packing import pack, unpack
from sparse_jax.supports.roles import DENSE, FROZEN, SPARSE, map_roles, roles_of
from sparse_jax.supports.scores import SCORES, leaf_key


class Toy(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.Linear(2, 3, rngs=rngs)


def test_a_state_and_its_pure_dictionary_have_the_same_names():
    state = nnx.state(Toy(nnx.Rngs(0)))
    names = jax.tree.leaves(leaf_names(state))
    assert names == jax.tree.leaves(leaf_names(nnx.to_pure_dict(state)))
    assert names == ["query/bias", "query/kernel"]


class Heads(NamedTuple):
    query: Any
    value: Any


@dataclasses.dataclass(frozen=True)
class Block:
    key: Any
    value: Any


jax.tree_util.register_dataclass(Block)
ARRAY = np.zeros(2, np.float32)
NAMED_TREES = {
    "tuple": (Heads(ARRAY, ARRAY), ["query", "value"]),
    "dataclass": ({"a": Block(ARRAY, ARRAY)}, ["a/key", "a/value"]),
    "linen box": ({"k": nn.Partitioned(ARRAY, ("x",))}, ["k"]),
    "variables": ({"value": nnx.Param(ARRAY), "x": nnx.Param(ARRAY)}, ["value", "x"]),
    "boxed tuple": (nnx.Param(Heads(ARRAY, ARRAY)), ["query", "value"]),
    "empty key": ({"": ARRAY}, [""]),
    "numbers": ({2: ARRAY, 10: [ARRAY, ARRAY]}, ["2", "10/0", "10/1"]),
    "none": ({"a": None, "b": ARRAY}, ["b"]),
    "array": (ARRAY, [""]),
    "nothing": ({}, []),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "names"), NAMED_TREES.values(), ids=NAMED_TREES)
def test_a_leaf_is_named_by_the_keys_on_its_path(tree, names):
    assert jax.tree.leaves(leaf_names(tree)) == names


def test_a_field_called_value_is_trained_by_its_name():
    params = Heads(query=jnp.ones(4), value=jnp.ones(4))
    tx = sift(optax.sgd(1.0), 0.25, where="^value$")
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(jnp.abs(updates.query).sum()) == 0.0
    assert float(jnp.abs(updates.value).sum()) == 1.0


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"got `a/b` for \['a'\]\['b'\] and \['a/b'\]"):
        leaf_names({"a": {"b": ARRAY}, "a/b": ARRAY})


def test_characters_of_expressions_are_escaped_to_match_themselves():
    params = {"a.b": ARRAY, "a+b": ARRAY, "axb": ARRAY}
    roles = roles_of(params, where=re.escape("a+b"))
    kinds = map_roles(lambda role: role.kind, roles)
    assert kinds == {"a.b": FROZEN, "a+b": SPARSE, "axb": FROZEN}


RULES = {"dense": "^classifier/", "sparse": ("query", "value/kernel$")}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("classifier/query", "dense"),
        ("layers/query/bias", "sparse"),
        ("layers/value/kernel", "sparse"),
        ("layers/value/bias", "frozen"),
    ],
)
def test_the_first_rule_that_matches_wins(name, label):
    assert first_match(RULES, name, "frozen") == label


def test_a_broken_expression_is_reported():
    with pytest.raises(InputError, match="must be a regular expression, got '\\('"):
        require_match("where", "(", ["a"])


@pytest.mark.parametrize(
    ("word", "ours"),
    [("q_proj", "query"), ("k_proj", "key"), ("o_proj", "output"), ("qeury", "query")],
)
def test_the_nearest_name_is_the_one_that_a_word_is_short_for(word, ours):
    names = [f"layers/{part}/kernel" for part in ("up", "output", "key", "query")]
    message = f"names are `layers/{ours}/kernel`"
    with pytest.raises(InputError, match=message):
        require_match("where", word, names)


def test_every_leaf_gets_a_role():
    tree = {
        "embedding": jnp.zeros((5, 2)),
        "layers": {"kernel": jnp.zeros((3, 2, 4)), "steps": jnp.zeros(3, jnp.int32)},
        "classifier": jnp.zeros((2, 2)),
        "empty": jnp.zeros((0, 2)),
    }
    roles = roles_of(tree, where="layers", dense="classifier", stacked="^layers/")
    kinds = map_roles(lambda role: role.kind, roles)
    assert kinds == {
        "embedding": FROZEN,
        "layers": {"kernel": SPARSE, "steps": FROZEN},
        "classifier": DENSE,
        "empty": FROZEN,
    }
    assert roles["layers"]["kernel"].size == 8


@pytest.mark.parametrize(
    ("density", "size", "k"),
    [
        (0.07, 100, 7),  # 7.000000000000001 in binary
        (0.1, 10, 1),
        (0.05, 16_777_216, 838_861),
        (1e-9, 10, 1),
        (1.0, 10, 10),
    ],
)
def test_the_support_is_the_density_rounded_up(density, size, k):
    assert support_size(density, size) == k


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_density_is_a_fraction(density):
    with pytest.raises(InputError, match=r"`density` must be in \(0, 1\]"):
        require_density(density)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scatter_writes_what_gather_reads(dtype):
    stack = jnp.arange(24.0, dtype=dtype).reshape(2, 3, 4)
    support = jnp.array([[0, 11], [5, 6]])
    np.testing.assert_array_equal(gather(stack, support), [[0, 11], [17, 18]])
    changed = scatter(stack, support, -gather(stack, support))
    np.testing.assert_array_equal(jnp.flatnonzero(changed != stack), [11, 17, 18])
    assert changed.dtype == dtype
    restored = scatter(changed, support, gather(stack, support))
    np.testing.assert_array_equal(restored, stack)


def test_a_donated_array_is_written_in_place():
    stack, support = jnp.zeros((4, 64, 64)), jnp.zeros((4, 10), jnp.int32)
    compiled = (
        jax.jit(scatter, donate_argnums=0)
        .lower(stack, support, jnp.zeros((4, 10)))
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == stack.nbytes
    assert memory.temp_size_in_bytes < stack.nbytes / 4


def test_packing_keeps_the_structure_of_the_parameters():
    params = {"a": jnp.arange(4.0), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(3)}
    roles = roles_of(params, where="a", dense="b")
    masked = optax.MaskedNode()
    support = {"a": jnp.array([1, 3]), "b": masked, "c": masked}
    packed = pack(roles, support, params)
    np.testing.assert_array_equal(packed["a"], [1, 3])
    assert packed["b"].dtype == jnp.float32 and packed["c"] == masked
    masters = keep_masters(roles, packed, params)
    assert masters["a"] == masked and masters["c"] == masked
    now = current_values(roles, support, masters, params)
    jax.tree.map(np.testing.assert_array_equal, now, packed)
    whole = unpack(roles, support, params, packed)
    np.testing.assert_array_equal(whole["a"], [0, 1, 0, 3])
    np.testing.assert_array_equal(whole["c"], [0, 0, 0])
    assert whole["b"].dtype == jnp.bfloat16


def test_each_layer_of_a_stack_is_selected_on_its_own():
    grads = jnp.stack([jnp.arange(6.0), jnp.arange(6.0)[::-1] * 100])
    support = ENTRY.choose(
        SCORES["gradient"], grads, grads, 2, jax.random.key(0), stacked=True
    )[0]
    np.testing.assert_array_equal(support, [[4, 5], [0, 1]])


def test_random_choices_are_uniform():
    x = jnp.zeros((200, 50))
    key = leaf_key(jax.random.key(0), "w")
    support = ENTRY.choose(SCORES["random"], x, x, 10, key, stacked=True)[0]
    counts = np.bincount(np.asarray(support).ravel(), minlength=50)
    # Each of 50 entries is drawn with probability 0.2 in 200 layers: 40 +- 5.7.
    assert counts.min() > 40 - 4 * 5.7 and counts.max() < 40 + 4 * 5.7

"""Adapters are added, subtracted, compared, and put on and taken off exactly."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparse_jax import (
    Adapter,
    AdapterSwitch,
    Attachment,
    DoRA,
    InputError,
    LoRA,
    apply_adapter,
    combine_adapters,
    compare_supports,
    load_adapter,
    merge_adapter,
    save_adapter,
    swap,
)
from sparse_jax.methods.lora import LowRank

L, D = 3, 8
DTYPES = ["float32", "bfloat16"]
STACK, TABLE, HEAD = "layers/up/kernel", "word", "classifier/kernel"


def base_params(dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.dtype(dtype))
    return {
        "layers": {"up": {"kernel": draw(L, D, D)}},
        "word": draw(20),
        "classifier": {"kernel": draw(D, 2)},
    }


def adapter_at(stack, table, dtype="float32", seed=1, head=False):
    """Returns an adapter of positions in each layer of the stack and in the table."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.normal(size=shape).astype(jnp.dtype(dtype))
    support = {
        STACK: np.tile(np.array(stack, np.int32), (L, 1)),
        TABLE: np.array(table, np.int32),
    }
    values = {name: draw(*array.shape) for name, array in support.items()}
    dense = {HEAD: draw(D, 2)} if head else {}
    task = f"task {seed}"
    return Adapter(support, values, dense, base_hash="ab", word="sift", task=task)


def in_the_whole():
    """Returns an adapter with a position in the second layer, by the whole stack."""
    return Adapter({STACK: np.array([D * D], np.int32)}, {STACK: np.ones(1, "float32")})


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def on(params, adapter):
    return apply_adapter(params, adapter)[0]


def as_floats(tree):
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_adapters_come_off_bit_for_bit(dtype):
    params = base_params(dtype)
    before, random = bits(params), np.random.default_rng(0)
    draw = lambda n, k: np.sort(random.choice(n, k, replace=False))
    for seed in range(500):
        adapter = adapter_at(draw(D * D, 5), draw(20, 4), dtype, seed, head=True)
        changed, undo = swap(params, adapter)
        assert bits(changed) != before
        params, again = swap(changed, undo)
        assert bits(params) == before
        assert bits(again.values) == bits(adapter.values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_switch_leaves_the_bits_of_the_base(dtype):
    params, before = base_params(dtype), bits(base_params(dtype))
    adapters = {
        "a": adapter_at([0, 5], [1], dtype, 1, head=True),
        "b": adapter_at([1, 7], [2, 3], dtype, 2),
        "c": adapter_at([5, 9], [4], dtype, 3, head=True),
    }
    expected = {name: bits(on(params, one)) for name, one in adapters.items()}
    both = bits(on(on(params, adapters["a"]), adapters["b"]))
    switch = AdapterSwitch(jax.tree.map(jnp.copy, params), adapters)
    for name in ("a", "b", "c", "a"):
        assert bits(switch.to(name)) == expected[name]
    assert bits(switch.to("a", "b")) == both
    assert switch.active == {"a": 1.0, "b": 1.0}
    half = switch.to({"b": 0.5})
    table, places = np.asarray(params[TABLE], np.float32), adapters["b"].support[TABLE]
    middle = (table[places] + adapters["b"].values[TABLE].astype(np.float32)) / 2
    expected = middle.astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(half[TABLE], np.float32)[places], expected)
    assert bits(switch.to()) == before and bits(switch.params) == before


def test_arrays_of_numpy_are_adapted_and_kept():
    params, adapter = base_params(), adapter_at([0, 5], [1], head=True)
    numpy = jax.tree.map(np.array, params)
    changed, undo = swap(numpy, adapter)
    assert bits(changed) == bits(on(params, adapter))
    assert bits(swap(changed, undo)[0]) == bits(params)
    switch = AdapterSwitch(numpy, {"a": adapter})
    assert bits(switch.to("a")) == bits(changed) and bits(switch.to()) == bits(params)
    assert bits(numpy) == bits(params)


def test_leaves_that_are_one_array_are_switched_apart():
    table = jnp.arange(4.0)
    adapter = Adapter({"word": np.array([1])}, {"word": np.ones(1, np.float32)})
    more = Adapter(dense={"head": np.zeros(4, np.float32)})
    switch = AdapterSwitch({"head": table, "word": table}, {"a": adapter, "b": more})
    for names in (("a",), ("a", "b"), ("b",)):
        found = switch.to(*names)
        assert found["word"].tolist() == [0, 1.0, 2, 3]
        assert found["head"].tolist() == ([0] * 4 if "b" in names else [0, 1, 2, 3])
    assert bits(switch.to()) == bits([np.arange(4, dtype=np.float32)] * 2)


def test_a_switch_compiles_nothing_after_the_first_use():
    adapters = {n: adapter_at([0, n + 1], [n], seed=n, head=True) for n in range(3)}
    adapters = {str(n): adapter for n, adapter in adapters.items()}
    switch = AdapterSwitch(base_params(), adapters)
    for name in ("0", "1", "2"):
        switch.to(name)
    switch.to()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    try:
        for name in ("2", "0", "1"):
            switch.to(name)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled


def test_a_switch_of_sharded_parameters():
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    params = base_params()
    spec = {"layers": {"up": {"kernel": P(None, "fsdp")}}, "word": P("fsdp")}
    place = lambda s: jax.NamedSharding(mesh, s)
    spec = {**spec, "classifier": {"kernel": P()}}
    sharded = jax.device_put(params, jax.tree.map(place, spec))
    adapter = adapter_at([0, 5, 62], [1, 19], head=True)
    switch = AdapterSwitch(sharded, {"a": adapter})
    assert bits(switch.to("a")) == bits(on(params, adapter))
    assert switch.params["word"].sharding.spec == P("fsdp")
    assert bits(switch.to()) == bits(params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_of_separate_adapters_keeps_every_bit(dtype):
    params = base_params(dtype)
    first = adapter_at([0, 5], [1], dtype, 1, head=True)
    second = adapter_at([1, 7, 9], [2, 3], dtype, 2)
    total = combine_adapters(params, [first, second])
    assert bits(on(params, total)) == bits(on(on(params, first), second))
    assert total.support[TABLE].tolist() == [1, 2, 3]
    assert (total.word, total.task, total.base_hash) == ("combined", "task 1", "ab")


def test_weights_and_shared_entries():
    params = base_params()
    first, second = adapter_at([0, 5], [1], seed=1), adapter_at([5, 6], [1], seed=2)
    total = on(params, combine_adapters(params, [first, second], [2.0, -0.5]))
    terms = zip(
        as_floats(params), as_floats(on(params, first)), as_floats(on(params, second)),
        strict=True,
    )  # fmt: skip
    expected = [w + 2.0 * (a - w) - 0.5 * (b - w) for w, a, b in terms]
    for found, wanted in zip(as_floats(total), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_an_adapter_minus_itself_is_the_base():
    params = base_params("bfloat16")
    adapter = adapter_at([0, 5], [1], "bfloat16", head=True)
    nothing = combine_adapters(params, [adapter, adapter], [1.0, -1.0])
    assert bits(on(params, nothing)) == bits(params)


def test_layers_with_unequal_unions_keep_the_base_elsewhere():
    params = base_params()
    first, second = adapter_at([0, 5], [1]), adapter_at([5, 6], [1], seed=2)
    rows = np.array([[0, 5], [5, 6], [0, 1]], np.int32)
    second = replace(second, support={**second.support, STACK: rows})
    total = combine_adapters(params, [first, second])
    assert total.support[STACK].tolist() == [[0, 1, 5], [0, 5, 6], [0, 1, 5]]
    changed = np.asarray(on(params, total)["layers"]["up"]["kernel"]).reshape(L, -1)
    before = np.asarray(params["layers"]["up"]["kernel"]).reshape(L, -1)
    assert changed[0, 1] == before[0, 1]
    assert (np.diff(total.support[STACK]) > 0).all()


def test_whole_and_sparse_leaves_are_summed():
    params = base_params()
    whole = Adapter(dense={TABLE: np.arange(20, dtype=np.float32)})
    sparse = adapter_at([0], [3])
    total = combine_adapters(params, [whole, sparse])
    expected = np.arange(20) + np.zeros(20)
    expected[3] += sparse.values[TABLE][0] - float(params[TABLE][3])
    np.testing.assert_allclose(total.dense[TABLE], expected, rtol=0, atol=1e-6)


def test_the_head_is_that_of_one_adapter():
    params = base_params()
    pair = [adapter_at([0], [1], seed=seed, head=True) for seed in (1, 2)]
    total = combine_adapters(params, pair, [1.0, 0.5], new=(HEAD,), head=1)
    assert bits(total.dense[HEAD]) == bits(pair[1].dense[HEAD])
    assert total.task == "task 2"


def test_classifiers_of_other_labels_are_not_summed():
    head = lambda *labels: replace(adapter_at([0], [1], head=True), labels=labels)
    pair = [head("no", "yes"), head("yes", "no")]
    with pytest.raises(InputError, match="got no, yes and yes, no. Train"):
        combine_adapters(base_params(), pair)
    total = combine_adapters(base_params(), pair, new=(HEAD,), head=1)
    assert total.labels == ("yes", "no")


def test_a_sum_is_saved_and_loaded(tmp_path):
    params = base_params()
    adapters = [adapter_at([0, 5], [1], seed=1), adapter_at([5, 6], [2], seed=2)]
    total = combine_adapters(params, adapters)
    save_adapter(tmp_path / "adapter.safetensors", total)
    assert bits(on(params, load_adapter(tmp_path))) == bits(on(params, total))


def low_rank(rank, sites, seed, kind: type[LowRank] = LoRA, **options):
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    pair = lambda: {"a": draw(L, D, rank), "b": draw(L, rank, D)}
    where = tuple(f"^{site}$" for site in sites)
    added = {site: pair() for site in sites}
    return Adapter(added=added, method=kind(rank=rank, where=where, **options))


def test_lora_is_summed_by_its_ranks():
    params = {"blocks": {n: {"kernel": jnp.zeros((L, D, D))} for n in ("up", "down")}}
    first = low_rank(2, ["up", "down"], 1, alpha=1.0, stack="blocks")
    second = low_rank(3, ["up"], 2, rslora=True, stack="blocks")
    total = combine_adapters(params, [first, second], [2.0, -0.5])
    assert isinstance(total.method, LoRA)
    assert (total.method.rank, total.method.scale) == (5, 1.0)
    found = merge_adapter(params, total)
    one, two = merge_adapter(params, first), merge_adapter(params, second)
    for site in ("up", "down"):
        w = 2.0 * one["blocks"][site]["kernel"] - 0.5 * two["blocks"][site]["kernel"]
        np.testing.assert_allclose(
            found["blocks"][site]["kernel"], w, rtol=0, atol=1e-5
        )
    assert isinstance(apply_adapter(params, total)[1], Attachment)


def test_supports_are_compared():
    first, second = adapter_at([0, 5], [1]), adapter_at([5, 6, 7], [2], head=True)
    both = compare_supports(first, second)
    assert both[STACK] == (2 * L, 3 * L, L) and both[STACK].fraction == 0.25
    assert both[TABLE] == (1, 1, 0) and both[HEAD] == (0, 16, 0)
    whole = Adapter(dense={TABLE: np.zeros(20, np.float32)})
    assert compare_supports(first, whole)[TABLE] == (1, 20, 1)


LAYERS_AND_WHOLE = "same layers of `layers/up/kernel`, got the whole and 3 layers"


def test_positions_in_layers_and_in_the_whole_are_not_compared():
    layers, whole = adapter_at([0], [1]), in_the_whole()
    for pair in itertools.permutations((layers, whole)):
        with pytest.raises(InputError, match=LAYERS_AND_WHOLE):
            compare_supports(*pair)


REFUSED_SUMS = {
    "layers and whole": ([0, 8, 9], {}, LAYERS_AND_WHOLE),
    "whole and layers": ([8, 0], {}, LAYERS_AND_WHOLE),
    "no adapter": ([], {}, "`weights` must be as many as adapters, at least one"),
    "a weight too few": ([0, 1], {"weights": [1.0]}, "got 1 for 2"),
    "NaN": ([0], {"weights": [float("nan")]}, "`weights` must be finite"),
    "no such leaf": ([0], {"new": ["classifier"]}, "`new` must name leaves .*'classif"),
    "no such head": ([0], {"head": 1}, r"`head` must be in \[0, 1\), got 1"),
    "another base": ([0, 2], {}, r"must be of one base, got  \(ab\), other \(cd\)"),
    "LoRA and sparse": ([0, 3], {}, "must be all LoRA, or all without .* lora, sift"),
    "DoRA": ([4, 4], {}, "must be all LoRA, or all without added arrays, got dora"),
    "too many ranks": ([3, 3, 3, 3, 3], {}, "up to at most 8, the .* `up`, got 10"),
    "another leaf": ([5], {}, "`params` must have the leaf `other`"),
    "another dtype": ([6], {}, r"must be float32\[3, 8, 8\] .*, got bfloat16"),
    "out of range": ([7], {}, r"`word.support` must hold positions below 20"),
}


@pytest.mark.parametrize("name", REFUSED_SUMS)
def test_what_has_no_sum_is_refused(name):
    numbers, options, message = REFUSED_SUMS[name]
    adapters = [
        adapter_at([0], [1]),
        adapter_at([1], [2]),
        replace(adapter_at([1], [2]), base_hash="cd", base_model="other"),
        low_rank(2, ["up"], 1),
        low_rank(2, ["up"], 1, kind=DoRA),
        Adapter(dense={"other": np.zeros(2, np.float32)}),
        adapter_at([1], [2], "bfloat16"),
        adapter_at([1], [20]),
        in_the_whole(),
        Adapter(dense={STACK: np.zeros((L, D, D), np.float32)}),
    ]
    with pytest.raises(InputError, match=message):
        combine_adapters(base_params(), [adapters[n] for n in numbers], **options)


REFUSED_SWITCHES = {
    "NaN": (({"a": float("nan")},), "must have finite strengths, got nan for 'a'"),
    "infinity": (("a", {"b": float("inf")}), "finite strengths, got inf for 'b'"),
    "no such adapter": (("c",), "`names` must be of a, b, got 'c'"),
    "shared entries": (("a", "b"), "got 'a' and 'b', which share some of `layers/up/"),
}


@pytest.mark.parametrize("name", REFUSED_SWITCHES)
def test_a_switch_that_is_refused_changes_nothing(name):
    names, message = REFUSED_SWITCHES[name]
    adapters = {"a": adapter_at([0, 5], [1]), "b": adapter_at([5], [2], seed=2)}
    switch = AdapterSwitch(base_params(), adapters)
    before = bits(switch.to("a"))
    with pytest.raises(InputError, match=message):
        switch.to(*names)
    assert bits(switch.params) == before and switch.active == {"a": 1.0}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (low_rank(2, ["up"], 1), "to be applied in place, got 'lora' for 'a'"),
        (adapter_at([0], [20]), "must hold positions below 20"),
        (adapter_at([0], [-1]), r"must hold positions below 20 .* \[1\] down to -1"),
        (replace(adapter_at([0], [1]), values={}), "as many positions as values"),
        (replace(adapter_at([0], [1]), support={}), "as many positions as values"),
        (
            replace(adapter_at([0], [1]), dense={TABLE: np.zeros(20, "float32")}),
            "`word` in `adapter` must be there as a whole or as some .* got both",
        ),
        (adapter_at([0], [1], "bfloat16"), "must be float32.* as in the model, got bf"),
    ],
    ids=[
        "adds arrays",
        "out of range",
        "negative",
        "no values",
        "no positions",
        "whole and sparse",
        "another dtype",
    ],
)
def test_what_cannot_be_switched_is_refused(adapter, message):
    with pytest.raises(InputError, match=message):
        AdapterSwitch(base_params(), {"a": adapter})
    if not adapter.added:
        with pytest.raises(InputError, match=message):
            combine_adapters(base_params(), [adapter])


def test_heads_in_full_are_those_of_the_first_and_not_scaled():
    first, second = (adapter_at([n], [n], seed=n, head=True) for n in (0, 1))
    switch = AdapterSwitch(base_params(), {"a": first, "b": second})
    for names in (("a", "b"), ({"a": 0.5, "b": 1.0},)):
        head = switch.to(*names)["classifier"]["kernel"]
        assert bits(head) == bits(first.dense[HEAD])
    assert bits(switch.to()) == bits(base_params())


def test_an_adapter_at_strength_0_is_off():
    first, second = (adapter_at([n], [n], seed=n, head=True) for n in (0, 1))
    switch = AdapterSwitch(
        base_params(), {"a": first, "b": second, "same as b": second}
    )
    head = switch.to({"a": 0.0, "same as b": 0, "b": 1.0})["classifier"]["kernel"]
    assert bits(head) == bits(second.dense[HEAD])
    assert switch.active == {"b": 1.0}


def test_shared_entries_of_a_head_are_refused():
    part = lambda seed: Adapter(
        {"lm_head": np.array([1], np.int32)}, {"lm_head": np.ones(1, np.float32)}
    )
    params = {"lm_head": jnp.zeros(4)}
    with pytest.raises(InputError, match="which share some of `lm_head`"):
        AdapterSwitch(params, {"a": part(0), "b": part(1)}).to("a", "b")

"""Tasks that are trained outside the entries of earlier ones go on and off exactly."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import tiny_settings, write_files

from sparse_jax import (
    Adapter,
    AdapterSwitch,
    Compact,
    InputError,
    Sparse,
    compare_supports,
    entries_to_avoid,
    evaluate_adapter,
    finetune,
    from_pretrained,
    load_adapter,
    save_adapter,
)
from sparse_jax.adapter.calculus import shared_leaves
from sparse_jax.models.hf.pretrained import base_hash
from sparse_jax.supports.granularity import granularity_named
from sparse_jax.supports.layout import Shards
from sparse_jax.supports.top_k import top_k_support

HEAD = ("classifier/", "pooler/")
WHERE = ("^layers/attention/(query|output)/",)
SIFT = {"method": "sift", "density": 0.2, "where": WHERE, "max_steps": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """Three runs, each outside of the entries of those before."""
    folder, before = tmp_path_factory.mktemp("runs"), ()
    for number, score in enumerate(("gradient", "random", "magnitude")):
        output = str(folder / score)
        more = {**SIFT, "score": score, "seed": number, "avoid": before}
        finetune(tiny_settings(**files, output=output, **more))
        before = (*before, output)
    return before


@pytest.mark.slow
def test_the_runs_train_other_entries_of_the_same_leaves(runs):
    adapters = [load_adapter(run) for run in runs]
    for first, second in itertools.combinations(adapters, 2):
        shared = shared_leaves(first, second)
        assert shared and all(leaf.startswith(HEAD) for leaf in shared)
        found = compare_supports(first, second)["layers/attention/query/kernel"]
        assert found.first == found.second > 0 and found.shared == 0


@pytest.mark.slow
def test_every_run_is_evaluated_as_before(files, runs):
    for run in runs:
        metrics = json.loads(Path(run, "metrics.json").read_text())["eval"]
        assert evaluate_adapter(run, data=str(files["data"])) == metrics


def test_any_of_them_are_on_at_once_and_come_off_exactly(files, runs):
    labels = load_adapter(runs[0]).labels
    _, params = from_pretrained(files["model"], labels=labels, key=jax.random.key(0))
    adapters = {run: load_adapter(run) for run in runs}
    bits = lambda tree: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    before = bits(params)
    switch = AdapterSwitch(jax.tree.map(jnp.copy, params), adapters)
    alone = {run: bits(switch.to(run)) for run in runs}
    switch.to(*runs)
    assert bits(switch.params) not in ([before], *alone.values())
    head = np.asarray(switch.params["classifier"]["kernel"])
    assert head.tobytes() == adapters[runs[0]].dense["classifier/kernel"].tobytes()
    for run in runs:
        leaf = adapters[run].support["layers/attention/query/kernel"]
        kernel = switch.params["layers"]["attention"]["query"]["kernel"]
        rows = np.asarray(kernel).reshape(leaf.shape[0], -1)
        found = np.take_along_axis(rows, leaf.astype(np.int64), axis=1)
        wanted = adapters[run].values["layers/attention/query/kernel"]
        assert found.tobytes() == wanted.tobytes()
    for run in runs:
        assert bits(switch.to(run)) == alone[run]
    assert bits(switch.to()) == before


def make_loss(params, x, key, attachment):
    del key, attachment
    return jnp.sum(params["w"] * x), 1.0


@pytest.mark.parametrize("score", ["gradient", "magnitude", "random"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.quick(1)
def test_the_best_of_what_is_left_is_chosen(score, stacked):
    random = np.random.default_rng(0)
    shape = (3, 10) if stacked else (10,)
    w, x = (jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(2))
    params, avoided = {"w": w}, np.array([1, 4, 7], np.int32)
    method = Sparse(density=0.3, score=score, stack="w" if stacked else None)
    if stacked:
        params, avoided = {"w": {"k": w}}, np.tile(avoided, (3, 1))
        loss = lambda params, x, key, attachment: (
            jnp.sum(
                jax.vmap(lambda w, layer: attachment.weights({"k": w}, layer)["k"])(
                    params["w"]["k"], attachment.trained
                )
                * x
            ),
            1.0,
        )
    else:
        loss = make_loss
    name = "w/k" if stacked else "w"
    tuner = Compact(loss, method, optax.sgd(0.1))
    mine = Adapter({name: avoided}, {name: np.ones(avoided.shape, np.float32)})
    avoid, key = entries_to_avoid(tuner, params, [mine]), jax.random.key(0)
    state, _ = tuner.select(tuner.init(params, key), x, key, avoid)
    chosen = jax.tree.leaves(state.support)[0]
    assert not np.isin(np.asarray(chosen), avoided[..., :]).any()
    if score != "random":
        by = np.abs(np.asarray(x if score == "gradient" else w)).reshape(-1, 10)
        by[:, [1, 4, 7]] = -1
        best = np.sort(np.argsort(-by, axis=1)[:, :3], axis=1)
        np.testing.assert_array_equal(np.asarray(chosen).reshape(best.shape), best)


@pytest.mark.parametrize("stack", ["w", None])
def test_positions_must_be_in_what_the_run_chooses_from(stack):
    positions = np.zeros((1,) if stack else (3, 1), np.int32)
    mine = Adapter({"w/k": positions}, {"w/k": np.ones(positions.shape, np.float32)})
    tuner = Compact(make_loss, Sparse(density=0.1, stack=stack), optax.sgd(0.1))
    with pytest.raises(InputError, match="as this run has, got .*the same `stack`"):
        entries_to_avoid(tuner, {"w": {"k": jnp.ones((3, 10))}}, [mine])


def test_arrays_of_numpy_are_avoided():
    tuner = Compact(make_loss, Sparse(density=0.25, stack=None), optax.sgd(0.1))
    mine = Adapter({"w": np.array([3], np.int32)}, {"w": np.ones(1, np.float32)})
    params = {"w": np.ones(4, np.float32)}
    assert entries_to_avoid(tuner, params, [mine])["w"].tolist() == [3]


def test_entries_with_positions_of_two_bytes_avoid_the_same():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)
    best = np.asarray(top_k_support(x, 90), np.int32)
    mine = Adapter({"w": best}, {"w": np.ones(90, np.float32)})
    key, found = jax.random.key(0), []
    for granularity in ("entry", "entry16"):
        method = Sparse(density=0.001, granularity=granularity, stack=None)
        tuner = Compact(make_loss, method, optax.sgd(0.1))
        state = tuner.init({"w": jnp.ones((300, 300))}, key)
        avoid = entries_to_avoid(tuner, state.params, [mine])
        state, finite = tuner.select(state, x, key, avoid)
        assert finite
        layout = granularity_named(granularity)
        support = np.asarray(state.support["w"])
        found.append(layout.to_positions(support, (300, 300))[0])
    np.testing.assert_array_equal(*found)
    both = np.sort(np.concatenate([best, found[0]]))
    np.testing.assert_array_equal(both, top_k_support(x, 180))


def test_lanes_avoid_nothing():
    method = Sparse(density=0.1, granularity="lane", stack=None)
    tuner = Compact(make_loss, method, optax.sgd(0.1))
    mine = Adapter({"w": np.array([1], np.int32)}, {"w": np.ones(1, np.float32)})
    with pytest.raises(
        InputError, match="must be 'entry' or 'entry16' to avoid entries"
    ):
        entries_to_avoid(tuner, {"w": jnp.ones((128, 2))}, [mine])


def test_the_entries_of_a_sharded_array_are_avoided():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("fsdp",), auto, devices=jax.devices()[:2])
    x = jnp.arange(1.0, 17.0).reshape(4, 4)
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    params = {"w": jax.device_put(jnp.ones((4, 4)), sharding)}
    shards = {"w": Shards((("fsdp",), ()), (2, 1))}
    method = Sparse(density=0.25, stack=None)
    tuner = Compact(make_loss, method, optax.sgd(0.1), shards=shards)
    places = np.array([0, 7, 13, 15], np.int32)
    mine = Adapter({"w": places}, {"w": np.ones(4, np.float32)})
    avoid, key = entries_to_avoid(tuner, params, [mine]), jax.random.key(0)
    with jax.set_mesh(mesh):
        state, _ = jax.jit(tuner.select)(tuner.init(params, key), x, key, avoid)
        support = tuner.adapter(state).support["w"]
    assert support.tolist() == [10, 11, 12, 14]


def query(positions):
    name = "layers/attention/query/kernel"
    array = np.tile(np.array(positions, np.int32), (2, 1))
    return Adapter({name: array}, {name: np.zeros(array.shape, np.float32)})


REFUSED = {
    "too few left": (query(range(200)), {"density": 0.5}, "`density` must leave enou"),
    "in full": (query([0]), {"method": "full", "density": 0.02}, "which this run trai"),
    "out of range": (query([10**6]), {}, "must hold positions below"),
    "another base": (Adapter(base_hash="ab"), {}, "`model` must be the base of the"),
    "no adapter": (None, {}, "`avoid` must be an adapter file, or the folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_avoided_is_refused_before_anything_is_written(
    name, files, tmp_path
):
    adapter, options, message = REFUSED[name]
    path = tmp_path / "earlier.safetensors"
    if adapter is not None:
        digest = adapter.base_hash or base_hash(files["model"])
        save_adapter(path, replace(adapter, base_hash=digest))
    options = {**SIFT, **options, "avoid": (str(path),)}
    if options["method"] == "full":
        options = {**options, "where": None, "dense": ("attention",)}
    with pytest.raises(InputError, match=message):
        finetune(tiny_settings(**files, output=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_head_of_the_base_is_avoided():
    def loss(params, x, key, attachment):
        del key, attachment
        return jnp.sum(params["lm_head"]["kernel"] * x), 1.0

    name, places = "lm_head/kernel", np.array([3], np.int32)
    tuner = Compact(loss, Sparse(density=0.25, stack=None), optax.sgd(0.1))
    mine = Adapter({name: places}, {name: np.ones(1, np.float32)})
    params = {"lm_head": {"kernel": jnp.ones(4)}}
    assert entries_to_avoid(tuner, params, [mine])[name].tolist() == [3]
    assert not entries_to_avoid(tuner, params, [mine], new=(name,))

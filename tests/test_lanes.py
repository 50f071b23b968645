"""As many entries of every 128 rows of a column: chosen, read and written exactly."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
import tiny_text

from sparse_jax import (
    LANE,
    Attachment,
    Compact,
    InputError,
    Layerwise,
    Settings,
    Sparse,
    Static,
    evaluate_adapter,
    finetune,
    gather,
    load_adapter,
)
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import EncoderConfig
from sparse_jax.models.families.bert import BERT
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.params.names import map_named
from sparse_jax.sharding.mesh import MeshShape, make_mesh, mesh_of
from sparse_jax.sharding.placement import Placement
from sparse_jax.sharding.runner import MeshRunner
from sparse_jax.supports.lanes_tpu import get_rows, has_kernel, set_rows
from sparse_jax.supports.scores import SCORES
from sparse_jax.training.checkpoint import Checkpoints
from sparse_jax.training.objective import make_token_loss

CONFIG = EncoderConfig(
    vocab_size=50,
    hidden_size=128,
    num_layers=2,
    num_heads=2,
    intermediate_size=256,
    num_labels=2,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
MODEL = Model(SequenceClassifier, BERT, CONFIG)
WHERE, HEAD = "query/(kernel|bias)|(up|down)/kernel", "^classifier/"
METHOD = Sparse(density=0.05, where=WHERE, dense=HEAD, granularity=LANE)
# Whole groups, and columns whose last group has fewer rows.
SHAPES = [(256, 5), (384,), (192, 5), (330, 3), (200,)]
EDGES = [0.0, -0.0, 1.0, -1.0, 2.0, np.nan, np.inf]


def top_lanes(x, count):
    """Returns the rows of the largest entries of every group."""
    draws = jax.random.key(0)
    k = count * -(-x.shape[0] // 128) * (x.size // x.shape[0])
    return LANE.choose(SCORES["gradient"], x, x, k, draws)[0]


def groups_of(x):
    """Returns the entries, group by group, NaN past the end: shape=(G, 128, C)."""
    x = np.array(x, np.float32).reshape(len(x), -1)
    x = np.pad(x, ((0, -len(x) % 128), (0, 0)), constant_values=np.nan)
    return x.reshape(-1, 128, x.shape[1])


def some_rows(shape, seed=0, rows=None):
    """Returns distinct rows in every group, ascending: shape=(..., m, G, C)."""
    *lead, count, groups, columns = shape
    draws = np.random.default_rng(seed).random((*lead, 128, groups, columns))
    draws[..., (rows or groups * 128) - (groups - 1) * 128 :, -1, :] = 2  # no such rows
    rows = np.sort(np.argsort(draws, axis=-3)[..., :count, :, :], axis=-3)
    return rows.astype(np.uint8)


def with_edges(shape, seed=0):
    """Returns numbers, some of which are not finite."""
    random = np.random.default_rng(seed)
    x = random.normal(size=shape).astype(np.float32)
    return np.where(random.random(shape) < 0.2, random.choice(EDGES, shape), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_group_has_its_best_entries(shape, count, dtype):
    random = np.random.default_rng(count)
    x = jnp.asarray(random.choice(EDGES, shape, p=[0.1] * 3 + [0.2] * 3 + [0.1]), dtype)
    entries = groups_of(x)
    size = np.where(np.isfinite(entries), np.abs(entries), -1)
    size[-1, (len(x) - 1) % 128 + 1 :] = -2  # past the end
    best = np.argsort(-size, axis=1, kind="stable")[:, :count]
    wanted = np.sort(best, axis=1).transpose(1, 0, 2)
    np.testing.assert_array_equal(top_lanes(x, count), wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_entries_are_read_and_written_exactly(shape, dtype):
    x = jnp.asarray(with_edges(shape), dtype)
    count, columns = 4, shape[1] if len(shape) == 2 else 1
    rows = some_rows((count, -(-shape[0] // 128), columns), rows=shape[0])
    support = jnp.asarray(rows)
    places = rows.transpose(1, 0, 2).astype(int)
    entries = groups_of(x)
    wanted = np.take_along_axis(entries, places, 1).transpose(1, 0, 2)
    packed = jax.jit(LANE.gather)(x, support)
    assert packed.dtype == dtype
    np.testing.assert_array_equal(packed.astype(jnp.float32), wanted)
    new = jnp.asarray(with_edges(rows.shape, seed=1))
    values = np.asarray(new.astype(dtype).astype(jnp.float32)).transpose(1, 0, 2)
    np.put_along_axis(entries, places, values, 1)
    written = jax.jit(LANE.scatter)(x, support, new)
    assert written.dtype == dtype
    np.testing.assert_array_equal(groups_of(written), entries)


@pytest.mark.parametrize("layers", [None, (0, 2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.quick(1)
def test_a_stack_is_its_layers(shape, layers):
    x = jnp.asarray(with_edges((3, *shape)))
    numbers = layers or (0, 1, 2)
    columns = shape[1] if len(shape) == 2 else 1
    groups = -(-shape[0] // 128)
    rows = some_rows((len(numbers), 4, groups, columns), rows=shape[0])
    support = jnp.asarray(rows)
    given = None if layers is None else jnp.array(layers, jnp.int32)
    alone = [jnp.asarray(row) for row in rows]
    packed = jax.jit(LANE.gather)(x, support, given)
    for i, layer in enumerate(numbers):
        np.testing.assert_array_equal(packed[i], LANE.gather(x[layer], alone[i]))
    values = jnp.asarray(with_edges(rows.shape, seed=1))
    written = jax.jit(LANE.scatter)(x, support, values, given)
    for i, layer in enumerate(numbers):
        one = LANE.scatter(x[layer], alone[i], values[i])
        np.testing.assert_array_equal(written[layer], one)
    if layers:
        np.testing.assert_array_equal(written[1], x[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape", [(128, 16), (33 * 128, 300), (576, 40), (33 * 128 + 8, 24)]
)
@pytest.mark.quick(1)
def test_the_kernels_of_tpus_do_the_same(shape, dtype):
    x = jnp.asarray(with_edges((3, *shape)), dtype)
    layers = jnp.array([0, 2], jnp.int32)
    table = (2, 3, -(-shape[0] // 128), shape[1])
    support = jnp.asarray(some_rows(table, rows=shape[0]))
    args = (x, layers, support)
    bits = lambda x: np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")
    ours = get_rows(*args, interpret=True)
    np.testing.assert_array_equal(bits(ours), bits(LANE.gather(x, support, layers)))
    values = jnp.asarray(with_edges(support.shape, seed=1), dtype)
    ours = set_rows(*args, values, interpret=True)
    theirs = LANE.scatter(x, support, values, layers)
    np.testing.assert_array_equal(bits(ours), bits(theirs))


def test_kernels_are_for_few_rows_of_common_types():
    assert has_kernel(jnp.bfloat16, 7) and has_kernel(jnp.dtype("float32"), 16)
    assert not has_kernel(jnp.float32, 17) and not has_kernel(jnp.float16, 7)


@pytest.mark.parametrize("rows", [256, 192])
def test_positions_in_the_whole_array_say_the_same(rows):
    x = jnp.asarray(with_edges((2, rows, 5)))
    support = jnp.asarray(some_rows((2, 4, 2, 5), rows=rows))
    positions, values = LANE.to_positions(
        np.asarray(support), x.shape, np.asarray(LANE.gather(x, support))
    )
    assert positions.dtype == np.int32 and positions.shape == (2, 40)
    assert (np.diff(positions) > 0).all()
    np.testing.assert_array_equal(values, gather(x, jnp.asarray(positions)))
    back, again = LANE.from_positions(positions, x.shape, values)
    np.testing.assert_array_equal(back, support)
    np.testing.assert_array_equal(again, LANE.gather(x, support))


def test_an_empty_support_has_distinct_entries():
    support = LANE.empty((2, 256, 5), 3 * 10, stacked=True)
    assert support.shape == (2, 3, 2, 5)
    assert support[1, :, 1, 4].tolist() == [0, 1, 2]


def loss(params, batch, key, attachment):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = MODEL(params, inputs, key=None, attachment=attachment, unroll=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.sum(), losses.size


def make_batch(seed, parts=()):
    ids = jax.random.randint(jax.random.key(seed), (*parts, 4, 6), 1, 50)
    labels = jax.random.randint(jax.random.key(seed + 9), (*parts, 4), 0, 2)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": labels}


def run(tuner, params, steps=3, parts=()):
    state = jax.jit(tuner.init)(params, jax.random.key(0))
    batch = make_batch(0, parts)
    state, finite = jax.jit(tuner.select)(state, batch, jax.random.key(0))
    assert finite
    state = jax.tree.map(jnp.copy, state)
    step = jax.jit(tuner.step, donate_argnums=0)
    for i in range(steps):
        state, _ = step(state, make_batch(i, parts), jax.random.key(i))
    return state


def masks_of(state):
    """Returns which entries of every leaf are trained, from the support."""
    supports = {}
    map_named(lambda name, node: supports.update({name: node}), state.support)

    def mask(name, leaf):
        found = np.full(leaf.shape, "classifier" in name)
        if name in supports:
            positions = LANE.to_positions(np.asarray(supports[name]), leaf.shape)[0]
            np.put_along_axis(found.reshape(len(found), -1), positions, True, 1)
        return found

    return map_named(mask, state.params)


def test_the_numbers_are_those_of_masked_gradients():
    params = MODEL.init(jax.random.key(0), jnp.float32)
    state = run(Compact(loss, METHOD, optax.sgd(0.3)), params)
    masks = masks_of(state)
    query = masks["layers"]["attention"]["query"]["kernel"]
    assert (query.sum(axis=1) == 7).all()  # ceil(0.05 * 128) rows of every column

    @jax.jit
    def step(params, batch):
        grads = jax.grad(lambda p: loss(p, batch, None, Attachment())[0] / 4)(params)
        return jax.tree.map(lambda p, g, m: p - 0.3 * g * m, params, grads, masks)

    dense = params
    for i in range(3):
        dense = step(dense, make_batch(i))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        state.params,
        dense,
    )
    moved = jax.tree.map(lambda a, b: np.asarray(a != b), state.params, params)
    assert all(jax.tree.leaves(jax.tree.map(lambda m, k: (m <= k).all(), moved, masks)))


def test_the_gradient_decides_what_is_trained():
    params = MODEL.init(jax.random.key(0), jnp.float32)
    state = run(Compact(loss, METHOD, optax.sgd(0.3)), params, steps=0)
    mean = lambda p: loss(p, make_batch(0), None, Attachment())[0] / 4
    grads = jax.jit(jax.grad(mean))(params)
    up = lambda tree: tree["layers"]["mlp"]["up"]["kernel"]
    for layer in range(2):
        wanted = top_lanes(up(grads)[layer], 7)
        np.testing.assert_array_equal(up(state.support)[layer], wanted)


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_other_scores_choose_by_group(score):
    method = Sparse(density=0.05, where=WHERE, granularity=LANE, score=score)
    params = MODEL.init(jax.random.key(0), jnp.float32)
    tuner = Compact(loss, method, optax.sgd(0.1))
    state = jax.jit(tuner.init)(params, jax.random.key(0))
    state, _ = jax.jit(tuner.select)(state, make_batch(0), jax.random.key(0))
    query = state.support["layers"]["attention"]["query"]["kernel"]
    assert query.shape == (2, 7, 1, 128) and query.dtype == jnp.uint8
    assert (np.diff(np.asarray(query, int), axis=1) > 0).all()
    assert (query[0] != query[1]).any()


@pytest.mark.slow
def test_micro_batches_and_masters_below_float32():
    params = MODEL.init(jax.random.key(0), jnp.bfloat16)
    tuner = Compact(loss, METHOD, optax.sgd(1e-4), accumulate=2)
    state = run(tuner, params, parts=(2,))
    query = lambda tree: tree["layers"]["attention"]["query"]["kernel"]
    masters = query(state.masters)
    assert masters.dtype == jnp.float32 and masters.shape == (2, 7, 1, 128)
    entries = LANE.gather(query(state.params), query(state.support))
    np.testing.assert_array_equal(entries, masters.astype(jnp.bfloat16))
    # The steps are too small for bfloat16, and are not lost.
    before = LANE.gather(query(params), query(state.support)).astype(jnp.float32)
    assert (np.asarray(masters) != np.asarray(before)).mean() > 0.3


@pytest.mark.slow
def test_a_few_layers_at_a_time():
    params = MODEL.init(jax.random.key(0), jnp.float32)
    sampler = Static.of(1, num_layers=2)
    tuner = Layerwise(loss, METHOD, optax.sgd(0.3), sampler=sampler)
    state = run(tuner, params)
    whole = run(Compact(loss, METHOD, optax.sgd(0.3)), params, steps=1)
    up = lambda tree: tree["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(up(state.params)[0], up(params)[0])
    once = run(tuner, params, steps=1)
    np.testing.assert_allclose(up(once.params)[1], up(whole.params)[1], atol=1e-7)
    assert (up(state.params)[1] != up(once.params)[1]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_holds_no_second_copy_of_a_weight(dtype):
    tuner = Compact(loss, METHOD, optax.adam(1e-3))
    params = MODEL.init(jax.random.key(0), dtype)
    state = jax.eval_shape(tuner.init, params, jax.random.key(0))
    state, _ = jax.eval_shape(tuner.select, state, make_batch(0), jax.random.key(0))
    step = jax.jit(tuner.step, donate_argnums=0)
    lowered = step.lower(state, make_batch(0), jax.random.key(0))
    memory = lowered.compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # Of the head there are masters, and nothing reads it in bfloat16.
    assert memory.alias_size_in_bytes >= held - 1024
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096


def test_an_array_without_rows_is_named():
    method = Sparse(density=0.1, granularity=LANE, stack=None)
    with pytest.raises(InputError, match=r"`w` must be a matrix .*got shape \[4, 4, 2"):
        method.roles({"w": jnp.zeros((4, 4, 2))})


@pytest.mark.parametrize("rows, k", [(576, 5 * 7), (128, 7), (64, 7), (7, 7)])
def test_the_last_group_of_a_column_has_as_many_entries_as_the_others(rows, k):
    assert LANE.size(0.05, (rows, 3)) == 3 * k
    support = LANE.empty((rows, 3), 3 * k)
    assert support.shape == (7, -(-rows // 128), 3)


def test_a_last_group_with_too_few_rows_is_named():
    message = "`density` must be at most 0.03125 in lanes of 132 rows, whose last group"
    with pytest.raises(InputError, match=message):
        LANE.size(0.05, (132, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a model of 128 columns and with data."""
    folder = tmp_path_factory.mktemp("lanes")
    config = replace(tiny_run.CONFIG, hidden_size=128, intermediate_size=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "CONFIG", config)
        tiny_run.write_model(folder / "model")
    tiny_run.write_data(folder / "data")
    return folder


def settings_of(folder, output, **more):
    options = {"granularity": "lane", "where": ("query",), "save_every": 1, **more}
    return tiny_run.tiny_settings(folder / "model", folder / "data", output, **options)


@pytest.fixture(scope="module")
def metrics(folder):
    """Returns what came out of a run."""
    return finetune(settings_of(folder, folder / "run"))


def test_an_adapter_is_that_of_any_sparse_method(folder, metrics):
    # Thirteen of 128 rows, in a map of two layers and in its bias.
    assert metrics["trained_parameters_without_head"] == 2 * 13 * (128 + 1)
    adapter = load_adapter(folder / "run")
    assert adapter.method.granularity == "lane"
    positions = adapter.support["layers/attention/query/kernel"]
    assert positions.shape == (2, 13 * 128) and positions.dtype == np.int32
    again = evaluate_adapter(folder / "run", data=str(folder / "data"))
    assert again == metrics["eval"]


def test_a_run_says_what_does_not_fit_before_it_begins(folder, tmp_path):
    tiny_run.write_model(tmp_path / "model")
    model = str(tmp_path / "model")
    settings = settings_of(folder, tmp_path / "run", density=0.2)
    message = "`density` must be at most 0.125 in lanes of 16 rows"
    with pytest.raises(InputError, match=message):
        finetune(replace(settings, model=model))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"granularity": "lanes"},
            "`granularity` must be one of entry, entry16, .*'lan",
        ),
        ({"granularity": "lane", "method": "lora"}, "It belongs to sift, lift, rand"),
    ],
)
def test_words_of_the_command_line_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        Settings(model="m", task="sst2", output="o", **options)


def test_an_interrupted_run_goes_on(folder, metrics, tmp_path, monkeypatch):
    save = Checkpoints.save

    def die_at_two(self, state, at):
        save(self, state, at)
        if at.batches == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", die_at_two)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings_of(folder, tmp_path / "run"))
    monkeypatch.undo()
    again = finetune(settings_of(folder, tmp_path / "run", resume=True))
    assert again["eval"] == metrics["eval"]
    ours, theirs = (load_adapter(path / "run") for path in (tmp_path, folder))
    for name, values in theirs.values.items():
        np.testing.assert_array_equal(ours.support[name], theirs.support[name])
        np.testing.assert_array_equal(ours.values[name], values)


DECODER = replace(
    tiny_text.CONFIG, hidden_size=256, num_layers=2, head_size=64, intermediate_size=256
)


# A matrix of each direction: every one compiles a selection of its own.
TWO = "layers/.*(query|down)/kernel"


def run_decoder(shape=None, method=None):
    """Returns losses and the last state of a decoder, on a mesh if there is one."""
    model = Model(CausalLM, LLAMA, DECODER)
    params = model.init(jax.random.key(0), jnp.float32)
    loss, tx = make_token_loss(model), optax.sgd(0.3)
    method = method or Sparse(density=0.05, where=TWO, granularity=LANE)
    ids = np.random.default_rng(0).integers(0, 10, (8, 6)).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    batch["weights"] = np.ones(ids.shape, np.float32)
    mesh = mesh_of(None) if shape is None else make_mesh(shape)
    placement = Placement.of(model.abstract(), mesh)
    shards, axes = placement.shards("layers"), placement.data_axes
    runner = MeshRunner(Compact(loss, method, tx, 1, shards, axes), placement)
    params, batch = jax.device_put(params, placement.params), placement.put(batch)
    state = runner.init(params, jax.random.key(0))
    state, finite = runner.select(state, batch, jax.random.key(1))
    assert finite
    losses = []
    for i in range(3):
        state, metrics = runner.step(state, batch, jax.random.key(i))
        losses.append(float(metrics["loss"]))
    return losses, state


def test_a_mesh_has_the_numbers_of_one_device():
    (one, first), (many, second) = run_decoder(), run_decoder(MeshShape(2, 2, 2))
    np.testing.assert_allclose(one, many, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, *_positions(first, second))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        first.params,
        second.params,
    )


def _positions(*states):
    return [jax.tree.map(np.asarray, jax.tree.leaves(s.support)) for s in states]


def test_a_mesh_that_cuts_groups_is_refused():
    with pytest.raises(InputError, match="`layers/.* 256 rows in 8 parts"):
        run_decoder(MeshShape(fsdp=8))

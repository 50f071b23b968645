"""Plans: what an update needs, before it runs and on devices that are not here."""

import dataclasses
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import write_model
from tiny_text import CONFIG, write_decoder

from sparse_jax import LoRA, Uniform
from sparse_jax.cli.main import main
from sparse_jax.cli.plan import _compared
from sparse_jax.cli.plan_table import print_plans
from sparse_jax.errors import InputError
from sparse_jax.models.attachment import Attachment
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import LayerKind
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model
from sparse_jax.planning import plan as plans
from sparse_jax.planning import target as targets
from sparse_jax.planning.abstract import abstract_run, held_bytes, read_model
from sparse_jax.planning.choices import CHOICES, choices_in
from sparse_jax.planning.cycles import seconds_of
from sparse_jax.planning.hlo import Traffic, collectives_of, instructions
from sparse_jax.planning.often import Often, often_of
from sparse_jax.planning.operations import Kernel, count_flops
from sparse_jax.planning.plan import Plan, make_plan, with_largest_batch
from sparse_jax.planning.target import CHIPS, Chip, Target, find_target
from sparse_jax.sharding.mesh import MeshShape
from sparse_jax.supports.granularity import GRANULARITIES
from sparse_jax.training.settings import Settings

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the compiler of TPUs: pip install libtpu",
)
ALL = MeshShape(data=2, fsdp=2, tensor=2)
ALONE = MeshShape()
TINY = Model(CausalLM, LLAMA, CONFIG)
# Two of the seven matrices: each compiles a selection of its own.
SIFT = {"method": "sift", "density": 0.1, "where": ("query", "down")}
METHODS = {
    "sift": SIFT,
    "sift+ist": {**SIFT, "sampler": "ist", "active": 0.5},
    "lora": {"method": "lora", "rank": 2},
    "full": {"method": "full"},
}


def settings_of(**changes):
    fields = {"batch_size": 4, "dtype": "bfloat16", "density": 0.1, **changes}
    return Settings(model="m", task="causal", output="o", **fields)


def plan_of(shape=ALL, target=None, length=16, model=TINY, **changes):
    target = target or find_target("cpu", shape.size)
    options = {"length": length, "shape": shape, "target": target}
    return make_plan(model, settings_of(**changes), **options)


def held_of(shape=ALL, **changes):
    """Returns the bytes of the state, which need no compiler."""
    devices = jax.devices()[: shape.size]
    return held_bytes(abstract_run(TINY, settings_of(**changes), 16, shape, devices))


def update_of_stacks(shape=ALONE, batch_size=1, **changes):
    """Compiles an update of stacks that are much larger than their activations."""
    config = dataclasses.replace(
        CONFIG, hidden_size=1024, num_layers=16, num_heads=8, num_kv_heads=8,
        head_size=128, intermediate_size=1024, max_positions=128,
    )  # fmt: skip
    model = Model(CausalLM, LLAMA, config)
    changes = {"where": ("^layers/.*/kernel$",), "checkpointing": True, **changes}
    changes = {"density": 0.1, "batch_size": batch_size, **changes}
    settings = settings_of(**changes)
    devices = find_target("v5e:2x2", shape.size).devices
    run = abstract_run(model, settings, 128, shape, devices)
    lowered = run.runner.lower(run.state, run.batch, run.key, schedule=run.schedule)
    return plans._program(lowered), held_bytes(run)


def test_loops_count_as_often_as_they_run():
    def chain(x, stack):
        return jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(x, w), None), x, stack)[0]

    x, stack = jnp.ones((2, 8)), jnp.ones((5, 8, 8))
    forward = 5 * 2 * 2 * 8 * 8
    assert count_flops(chain, x, stack) == forward
    total = jax.grad(lambda x, w: jnp.sum(chain(x, w)), argnums=(0, 1))
    assert count_flops(total, x, stack) == 3 * forward


def test_a_gather_in_a_loop_counts_in_every_round():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    stack = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=cut)
    x = jax.ShapeDtypeStruct((64,), jnp.float32)
    whole = jax.NamedSharding(mesh, jax.P())

    def chain(x, stack):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(w, whole) @ x, None

        return jax.lax.scan(layer, x, stack)[0]

    text = jax.jit(chain).lower(x, stack).compile().as_text()
    assert collectives_of(text)["all-gather"] == Traffic(5, 5 * 64 * 64 * 4)


def flops_of(**changes):
    run = abstract_run(TINY, settings_of(**changes), 16, ALONE, jax.devices()[:1])
    return run, plans.flops_of(run)


def test_only_layers_that_are_drawn_count_as_trained():
    def flops(*layers):
        return flops_of(**SIFT, sampler="static", layers=layers)[1]

    frozen, trained = flops(1, 3) - flops(2, 3), flops(2, 3) - flops(3)
    # The backward pass ends at the lowest trained layer.
    assert flops(0) - flops(3) == 3 * frozen
    # 4 x 16 tokens; the gradients of query, 16 x 16, and down, 24 x 16.
    assert trained - frozen == 2 * 64 * (16 * 16 + 24 * 16)


def test_a_probe_counts_with_its_share_of_the_updates():
    ist = {**METHODS["sift+ist"], "active": 1.0}
    rare, often = (flops_of(**ist, probe_every=n)[1] for n in (10, 5))
    run, _ = flops_of(**SIFT)
    loss = lambda *args: run.tuner.loss(*args, Attachment())[0]
    forward = count_flops(loss, run.state.params, run.batch, run.key)
    assert often - rare == pytest.approx(3 * forward / 10, rel=1e-6)


def test_the_middle_update_of_a_sampler_is_known_before_it_runs():
    often = often_of(Uniform(num_layers=4, num_active=1))
    # The only drawn layer is each of four: 4, 3, 2 or 1 layers have a backward pass.
    assert often.layers == pytest.approx(2.5, abs=0.4)
    assert often.trained == pytest.approx(1 / often.layers)
    assert often_of(None) == (1.0, 1.0, 1.0)


OFTEN = Often(layers=2.5, trained=0.4, probes=0.1)
SAMPLED_LOOP = """
%frozen (x: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} negate(%x), backend_config={"estimated_cycles":"1000"}
}
%trained (x: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} fusion(%x), calls=%reach
}
%reach (x: f32[8]) -> f32[2] {
  ROOT %y = f32[2]{0} gather(%x, %i), slice_sizes={1}
}
%body (x: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} conditional(%p, %x, %x), BRANCHES, NAME/body/cond"}
}
%more (x: f32[8]) -> pred[] {
  ROOT %y = pred[] compare(%x, %x)
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %a = f32[8]{0} while(%x), condition=%more, body=%body, NAME"}
  ROOT %get_rows.7 = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
}""".replace("NAME", 'metadata={op_name="jit(_step)/jvp(sampled_layers)/while')
SAMPLED_LOOP = SAMPLED_LOOP.replace(
    "BRANCHES", "branch_computations={%frozen, %trained}"
)


def test_branches_of_sampled_layers_run_as_often_as_layers_are_drawn():
    found = {one.computation: one.times for one in instructions(SAMPLED_LOOP, OFTEN)}
    assert found == pytest.approx(
        {"main": 1, "body": 2.5, "trained": 1.0, "reach": 1.0,
         "frozen": 1.5}
    )  # fmt: skip


def test_the_time_is_the_cycles_the_kernels_and_the_entries():
    chip = Chip("toy", 0, flops=1e12, bandwidth=1e9, links=1, clock=1e6)
    kernels = {("get_rows", (8,)): Kernel(flops=2e12, bytes=1e9)}
    found = seconds_of(SAMPLED_LOOP, chip, kernels, OFTEN)
    # 1.5 times 1000 cycles, two seconds of products, and two entries gathered.
    assert found == pytest.approx((1.5e-3, 2.0, 2 * 2550 / 1e9))
    # What the compiler does not know is the largest number that it has.
    unknown = ', backend_config={"estimated_cycles":"9223372036854775807"}'
    text = SAMPLED_LOOP.replace("calls=%reach", f"calls=%reach{unknown}")
    assert unknown in text and seconds_of(text, chip, kernels, OFTEN) == found
    assert seconds_of("ENTRY %main () -> f32[] {\n}", chip, kernels) is None


@needs_compiler
def test_products_in_a_loop_take_their_rounds_and_no_less_than_at_the_peak():
    place = jax.sharding.SingleDeviceSharding(find_target("v5e:2x2").devices[0])
    matrix = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    chain = lambda x, stack: jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    def seconds(rounds):
        args = matrix(4096, 2048), matrix(rounds, 2048, 2048)
        text = plans._program(jax.jit(chain).lower(*args)).as_text()
        at_peak = count_flops(chain, *args) / CHIPS["v5e"].flops
        found = seconds_of(text, CHIPS["v5e"], {}).total
        assert at_peak < found < 2 * at_peak
        return found

    assert seconds(12) == pytest.approx(2 * seconds(6), rel=0.1)


@pytest.mark.parametrize(("step", "times"), [(1, 8), (2, 4), (3, 3)])
def test_a_loop_ends_where_its_counter_is(step, times):
    sends = "collective-permute(%x), source_target_pairs={{0,1},{1,0}}"
    text = (
        "%body (p: (f32[2], u32[])) -> (f32[2], u32[]) {\n"
        f"  %one = u32[]{{:T(128)}} constant({step})\n"
        "  %i = u32[]{:T(128)} get-tuple-element(%p), index=1\n"
        f"  %y = f32[2]{{0}} {sends}\n"
        "  %next = u32[]{:T(128)} add(%i, %one)\n"
        "  ROOT %t = (f32[2]{0}, u32[]) tuple(%y, %next)\n"
        "}\n"
        "%condition (p: (f32[2], u32[])) -> pred[] {\n"
        "  %end = u32[]{:T(128)} constant(8)\n"
        "  %i = u32[]{:T(128)} get-tuple-element(%p), index=1\n"
        "  ROOT %less = pred[] compare(%i, %end), direction=LT\n"
        "}\n"
        "ENTRY %main (p: (f32[2], u32[])) -> (f32[2], u32[]) {\n"
        "  ROOT %w = (f32[2]{0}, u32[]) while(%p), condition=%condition, body=%body\n"
        "}\n"
    )
    assert collectives_of(text) == {"collective-permute": Traffic(times, 8 * times)}


def test_the_pieces_of_one_collective_count_once():
    gather = "all-gather(%x), channel_id=7, replica_groups={{0,1}}"
    text = (
        "%async_collective_fusion.1 (x: f32[2]) -> f32[4] {\n"
        f"  ROOT %y = f32[4]{{0}} {gather}\n"
        "}\n"
        "%fused_computation.2 (x: f32[2]) -> f32[4] {\n"
        f"  ROOT %z = f32[4]{{0}} {gather}\n"
        "}\n"
        "ENTRY %main (x: f32[2]) -> f32[4] {\n"
        "  %a = f32[4]{0} fusion(%x), calls=%async_collective_fusion.1\n"
        "  ROOT %b = f32[4]{0} fusion(%x), calls=%fused_computation.2\n"
        "}\n"
    )
    assert collectives_of(text) == {"all-gather": Traffic(1, 16)}


def test_collectives_put_together_from_others_count_each():
    gather = "all-gather(%x), channel_id=1, replica_groups={{0,1}}"
    text = (
        "ENTRY %main (x: f32[2]) -> f32[4] {\n"
        f"  %a = f32[4]{{0}} {gather}\n"
        f"  ROOT %b = f32[4]{{0}} {gather}\n"
        "}\n"
    )
    assert collectives_of(text) == {"all-gather": Traffic(2, 32)}


def test_the_parts_that_are_reduced_and_scattered_count_whole():
    groups = "replica_groups=mesh['a'=2,'b'=4] {'b'}"
    text = (
        "ENTRY %main (x: f32[8]) -> f32[2] {\n"
        f"  ROOT %y = f32[2]{{0}} reduce-scatter(%x), channel_id=1, {groups}\n"
        "}\n"
    )
    assert collectives_of(text) == {"reduce-scatter": Traffic(1, 32)}


def test_an_all_reduce_of_which_parts_are_kept_is_a_reduce_scatter():
    text = (
        "%all-reduce-scatter.1.clone (x: f32[8]) -> f32[2] {\n"
        "  %y = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}\n"
        "  ROOT %z = f32[2]{0} dynamic-slice(%y, %i), dynamic_slice_sizes={2}\n"
        "}\n"
        "ENTRY %main (x: f32[8]) -> f32[2] {\n"
        "  ROOT %b = f32[2]{0} fusion(%x), calls=%all-reduce-scatter.1.clone\n"
        "}\n"
    )
    assert collectives_of(text) == {"reduce-scatter": Traffic(1, 32)}


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_of_the_state_are_those_of_a_run(name):
    devices = jax.devices()[: ALL.size]
    run = abstract_run(TINY, settings_of(**METHODS[name]), 16, ALL, devices)
    held = held_bytes(run)
    params = jax.device_put(TINY.init(jax.random.key(0)), run.placement.params)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    state = run.runner.init(params, jax.random.key(0))

    def on_one(tree):
        arrays = [
            jax.random.key_data(leaf)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
            for leaf in jax.tree.leaves(tree)
        ]
        return sum(array.addressable_shards[0].data.nbytes for array in arrays)

    assert held["parameters"] == on_one(state.params)
    assert held["masters"] == on_one(state.masters)
    assert held["supports"] == on_one(state.support)
    assert held["optimizer"] == on_one(state.opt_state)
    assert held["added"] == on_one(state.added)


@pytest.mark.parametrize(
    "name", [pytest.param("sift", marks=pytest.mark.slow), "sift+ist"]
)
def test_a_plan_has_what_the_compiler_says(name):
    plan = plan_of(**METHODS[name])
    assert plan.method == name
    # The state is an argument of the program, and the program overwrites it.
    assert plan.reserved >= plan.state + plan.temporaries
    assert plan.peak == max(plan.update_peak, plan.selection_peak)
    assert plan.peak >= plan.temporaries
    assert plan.reserved < plan.state + plan.temporaries + 4096
    assert plan.collectives["all-gather"].bytes > 0
    assert (plan.fits, plan.largest_batch, plan.seconds) == (None, None, None)
    json.dumps(plan.as_dict())


@pytest.mark.slow
def test_a_selection_by_several_batches_keeps_what_enters_each_layer():
    four, eight = (plan_of(ALONE, **SIFT, select_batches=n) for n in (4, 8))
    # 4 layers, 4 examples of 16 tokens, 16 wide, bfloat16.
    entering = 4 * 4 * 16 * 16 * 2
    more = eight.selection_peak - four.selection_peak
    assert 4 * entering <= more < 4 * 4 * entering
    assert eight.update_peak == four.update_peak


def test_only_packed_gradients_are_planned_for():
    sparse, full = held_of(MeshShape()), held_of(MeshShape(), method="full")
    assert sparse["gradients"] < full["gradients"] / 4


def test_gradients_wait_in_the_dtype_of_their_weights():
    plain, summed = (
        held_of(MeshShape(), method="sift", accumulate=n, dtype="bfloat16")
        for n in (1, 2)
    )
    assert plain["gradients"] == summed["gradients"] / 2


@pytest.mark.slow
def test_an_encoder_is_planned_for(tmp_path):
    model = read_model(str(write_model(tmp_path / "model")))
    plan = plan_of(MeshShape(fsdp=8), model=model, length=8, batch_size=8)
    assert plan.reserved > plan.state > 0


@pytest.mark.slow
def test_the_largest_batch_fits_and_more_would_not():
    base = find_target("cpu", 1)
    shape = MeshShape()
    options = {"length": 16, "shape": shape}
    model, settings = TINY, settings_of(**METHODS["lora"])
    plan = make_plan(model, settings, target=base, **options)
    room = plan.reserved + 3 * plan.temporaries
    chip = Chip("toy", room, 1e9, 1e9, 1e9)
    target = Target("toy", base.devices, 1, chip)
    plan = with_largest_batch(model, settings, plan, target=target, **options)
    assert plan.largest_batch > 4
    for size, fits in ((plan.largest_batch, True), (plan.largest_batch + 1, False)):
        other = dataclasses.replace(settings, batch_size=size)
        assert make_plan(model, other, target=target, **options).fits is fits


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_target("v9:4x4"), "a topology of v4, v5e, v5p, v6e"),
        (lambda: find_target("v5e"), "a topology of v4, v5e, v5p, v6e"),
        (
            lambda: find_target("gpu"),
            "must be a device of this machine, .* Plans for a GPU need one",
        ),
        (lambda: find_target("cpu", 99), "must have the 99 devices of the mesh"),
        (lambda: plan_of(length=4096), "`length` must be at least 1 and at most 32"),
        (lambda: plan_of(length=0), "`length` must be at least 1"),
        (lambda: plan_of(batch_size=3), "`batch_size` must be a multiple of 4"),
        (lambda: plan_of(where=("qwery",)), "`where` must match"),
    ],
)
def test_what_cannot_be_planned_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_without_the_compiler_the_state_is_exact_all_the_same(monkeypatch):
    from jax.experimental import topologies

    def absent(**options):
        raise RuntimeError("no libtpu")

    with monkeypatch.context() as patch:
        patch.setattr(topologies, "get_topology_desc", absent)
        patch.setattr(targets, "find_spec", lambda name: None)
        target = find_target("v5e:2x4", 8)
    plan = plan_of(target=target)
    assert plan.held == held_of()
    assert (plan.temporaries, plan.reserved, plan.fits) == (None, None, None)
    assert "pip install libtpu" in plan.notes[0]


@needs_compiler
@pytest.mark.parametrize("name", ["sift+ist", "lora"])
@pytest.mark.slow
def test_the_compiler_of_tpus_takes_every_kind_of_step(name):
    plan = plan_of(target=find_target("v5e:2x4", 8), **METHODS[name])
    assert plan.fits
    assert plan.seconds > 0
    assert plan.collectives["all-gather"].count > 0


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "length", "is_kernel"),
    [("bfloat16", 256, True), ("bfloat16", 128, False), ("float32", 256, False)],
)
def test_a_tpu_attends_to_long_rows_of_bfloat16_by_a_kernel(dtype, length, is_kernel):
    kinds = (LayerKind(rope_theta=1e4, sliding_window=64), LayerKind(rope_theta=1e4))
    config = dataclasses.replace(
        CONFIG, max_positions=256, kinds=kinds, layer_kinds=(0, 1, 0, 1)
    )
    target, settings = find_target("v5e:2x4", 8), settings_of(**SIFT, dtype=dtype)
    model = Model(CausalLM, LLAMA, config)
    run = abstract_run(model, settings, length, ALL, target.devices)
    lowered = run.runner.lower(run.state, run.batch, run.key, schedule=run.schedule)
    assert ("tpu_custom_call" in lowered.as_text()) == is_kernel
    if is_kernel:
        plans._program(lowered)


@needs_compiler
@pytest.mark.parametrize("density", [pytest.param(0.02, marks=pytest.mark.slow), 0.1])
@pytest.mark.slow
def test_a_tpu_keeps_no_second_copy_of_a_stack(density):
    update, held = update_of_stacks(density=density)
    one_stack = 16 * 1024 * 1024 * 2
    beside = update.memory_analysis().temp_size_in_bytes - held["gradients"]
    assert beside < one_stack


@needs_compiler
@pytest.mark.slow
def test_a_gradient_is_sent_once_and_only_to_where_its_weight_is():
    update, _ = update_of_stacks(MeshShape(fsdp=4), batch_size=4)
    sent = collectives_of(update.as_text())
    # 16 layers of seven matrices of 1024 x 1024 in bfloat16, but for padding.
    dense = 16 * 7 * 1024 * 1024 * 2
    assert dense <= sent["reduce-scatter"].bytes < 1.1 * dense
    # What is left are the loss and the norm.
    assert sent["all-reduce"].bytes < 100


@needs_compiler
@pytest.mark.slow
def test_rows_leave_the_stacks_after_the_gradients():
    layers = {"sampler": "ist", "active": 0.25, "recompute": "all"}
    update, held = update_of_stacks(**layers)
    peak = update.memory_analysis().peak_memory_in_bytes
    state = sum(held.values()) - held["gradients"] - held["batch"]
    # Masters and two moments of the active layers are three times their gradients.
    # Without the barrier before the update it is 2.23 times, with it 1.99.
    assert peak - state < 2.1 * held["gradients"]


@needs_compiler
def test_a_program_that_is_too_large_does_not_fit():
    config = dataclasses.replace(
        CONFIG, hidden_size=4096, num_layers=64, num_heads=32, num_kv_heads=32,
        head_size=128, intermediate_size=11008, max_positions=128,
    )  # fmt: skip
    model = Model(CausalLM, LLAMA, config)
    plan = plan_of(
        MeshShape(), find_target("v5e:2x2"), 128, model, batch_size=1, method="full"
    )
    assert plan.fits is False
    assert plan.reserved > CHIPS["v5e"].memory


@needs_compiler
def test_an_unknown_shape_of_a_known_chip_is_refused():
    with pytest.raises(InputError, match="must be a topology that v5e has"):
        find_target("v5e:3x5x7")


@needs_compiler
def test_devices_that_fill_no_box_are_refused():
    with pytest.raises(InputError, match="must have a box of the 3 devices"):
        find_target("v5p:2x2x1", 3)


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("sift", ()),
        ("sift+split", ("split",)),
        ("sift+ist+split+bfloat16", ("split", "bfloat16")),
        ("sift+lane+ist", ("lane",)),
    ],
)
def test_a_comparison_names_what_is_kept(word, kept):
    given = {"model": "m", "task": "causal", "output": "", "dtype": "bfloat16"}
    settings = _compared(word, given)
    assert choices_in(settings) == kept
    assert settings.split_masters == ("split" in kept)
    assert (settings.moment_dtype == "bfloat16") == ("bfloat16" in kept)
    assert (settings.granularity == "lane") == ("lane" in kept)


@pytest.mark.parametrize(("most", "norm"), [(1.0, "previous-norm"), (0, "global-norm")])
def test_an_update_in_the_backward_pass_is_compared_with_and_without_clipping(
    most, norm
):
    given = {"model": "m", "task": "causal", "output": "", "max_grad_norm": most}
    settings = _compared("sift+backward", given)
    assert choices_in(settings) == ("backward",)
    assert settings.clip_by == norm


def test_every_granularity_can_be_compared():
    found = {meant.get("granularity", "entry") for meant in CHOICES.values()}
    assert found == GRANULARITIES.keys()


def run(monkeypatch, capsys, *arguments):
    words = ["sparse-jax", "plan", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


HELD = dict.fromkeys(
    (
        "parameters", "added", "masters", "supports", "optimizer", "gradients", "batch",
    ),
    0,
)  # fmt: skip
SMALL = Plan(method="lora", trained=1, held=HELD, flops=1)
SENT = {"all-reduce": Traffic(bytes=8, count=1)}
CPU = Target("cpu", (), 1, None)
TPU = Target("v5e:2x2", (), 4, CHIPS["v5e"])
GPU = Target("gpu", (), 1, Chip("H100", 2.0**36, 1e15, 1e12, 1e11))
COMPILED = ["Temporaries, peak and reserved memory: as the compiler reports them."]
CYCLES = [
    "Time: the cycles that the compiler expects.",
    "Time of kernels: at the peak FLOP/s or the memory bandwidth.",
    "Time of gathers and scatters: the compiler's `optimal_seconds`.",
]
ON_TPU = "v5e: 15.75 GiB for programs, 197 TFLOP/s (bf16)."
ON_GPU = "H100: 64.00 GiB for programs, 1000 TFLOP/s (bf16)."


@pytest.mark.parametrize(
    ("target", "changes", "lines"),
    [
        (CPU, {}, []),
        (CPU, {"reserved": 9}, COMPILED),
        (CPU, {"method": "sift+row+ist"},
         ["Sampled layers: FLOPs and time are those of a mean update."]),
        (TPU, {"notes": ("odd",)}, [ON_TPU, "Note: odd."]),
        (TPU, {"seconds": 1.0}, [ON_TPU, *CYCLES]),
        (TPU, {"largest_batch": 7},
         [ON_TPU, "Largest batch: estimated from a program of twice the batch."]),
        (GPU, {"seconds": 1.0, "collectives": SENT},
         [ON_GPU, "Time: matrix products at 50% of the peak FLOP/s.",
          "Time of communication: all links at once, not overlapped."]),
    ],
)  # fmt: skip
def test_a_plan_says_in_short_lines_what_its_numbers_assume(
    target, changes, lines, capsys
):
    found = [dataclasses.replace(SMALL, **changes), SMALL]
    print_plans(found, target, MeshShape(), (1, 8))
    out = capsys.readouterr().out
    *_, below = out.partition("\u2518\n")
    assert below.splitlines() == lines


@pytest.mark.slow
def test_the_command_compares_methods_and_writes_what_it_found(
    monkeypatch, capsys, tmp_path
):
    folder = write_decoder(tmp_path / "model")
    # Weights are not needed.
    (folder / "model.safetensors").unlink()
    code, out, _ = run(
        monkeypatch, capsys, "--model", folder / "config.json",
        "--compare", "full,lora+ist", "--length", 16, "--batch-size", 8, "--rank", 2,
        "--mesh", "fsdp=8", "--json", tmp_path / "plan.json",
    )  # fmt: skip
    assert code == 0
    assert "8 x 16 tokens on cpu" in out
    assert "peak live memory" in out
    # How much memory the CPU has, the plan does not know.
    assert "largest batch" not in out
    told = json.loads((tmp_path / "plan.json").read_text())
    full, sparse = told["plans"]
    assert (full["method"], sparse["method"]) == ("full", "lora+ist")
    assert full["trained"] == sum(
        int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(TINY.abstract())
    )
    assert told["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert told["asked"]["rank"] == 2


def test_the_command_plans_the_run_of_a_file(monkeypatch, capsys, tmp_path):
    folder = write_decoder(tmp_path / "model")
    settings = Settings(
        model=str(folder), task="causal", output="run", data="texts.jsonl",
        method=LoRA(rank=2),
        sampler=Uniform(num_layers=CONFIG.num_layers, num_active=1),
        batch_size=2, max_length=8, dtype="bfloat16",
    )  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"settings": settings.record()}))
    found = tmp_path / "plan.json"
    words = ("--config", config, "--no-largest-batch", "--json", found)
    code, out, err = run(monkeypatch, capsys, *words, "--batch-size", 1)
    assert code == 0, err
    assert "1 x 8 tokens on cpu" in out
    (plan,) = json.loads(found.read_text())["plans"]
    assert plan["method"] == "lora+uniform"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--compare", "full,sieve"), "got 'sieve'"),
        (("--compare", "full,sift+lisa"), "got 'sift+lisa'"),
        (("--compare", "sift+lane+row"), "got 'sift+lane+row'"),
        (("--compare", "sift+int8+bfloat16"), "got 'sift+int8+bfloat16'"),
        (("--compare", "lora+ist+uniform"), "got 'lora+ist+uniform'"),
        (("--compare", "full,sift", "--ist"), "--compare must be all methods"),
        (("--compare", "full,sift", "--rank", 4), "--rank must be left out"),
        (("--method", "sieve"), "--method must be one of full"),
        (("--active", 0.25), "--active must be left out without a sampler"),
        (("--json", "nowhere/plan.json"), "--json must be a file in a folder that"),
        (("--target", "v7:2x2"), "--target must be cpu, gpu, or a topology of v4"),
        (("--target", "h100"), "got 'h100'. gpu is the GPU of this machine, and needs"),
        (("--mesh", "fsdp=3", "--length", 8), "--mesh must have axes that divide"),
    ],
)
def test_wrong_options_are_one_line(monkeypatch, capsys, tmp_path, options, message):
    folder = write_decoder(tmp_path / "model")
    code, out, err = run(monkeypatch, capsys, "--model", folder, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1

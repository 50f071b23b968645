"""The attention kernel of TPUs, run by the interpreter, mixes what XLA mixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sparse_jax.models.attend import Mask, Reach, attend
from sparse_jax.models.attend_tpu import attend_in_blocks
from sparse_jax.sharding.mesh import MeshShape, make_mesh

LENGTH, HEADS, GROUPS, WIDTH = 260, 4, 2, 16
# The first row is padding on the left, a sequence, and padding on the right; the second
# is packed.
SEGMENTS = np.zeros((2, LENGTH), np.int32) - 1
SEGMENTS[0, 7:250] = 1
SEGMENTS[1, :100], SEGMENTS[1, 100:] = 1, 2


def arrays(dtype):
    random = np.random.default_rng(0)
    draw = lambda heads: random.normal(size=(2, LENGTH, heads, WIDTH))
    return [jnp.asarray(draw(n), dtype) for n in (HEADS, GROUPS, GROUPS)]


def seen_by(reach):
    """Returns the mask that the segments and a reach stand for."""
    back = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = SEGMENTS[:, :, None] == SEGMENTS[:, None]
    seen &= (back <= (LENGTH if reach.back is None else reach.back))[None]
    return seen & (-back <= (LENGTH if reach.ahead is None else reach.ahead))


@pytest.mark.parametrize(
    ("reach", "cap"),
    [
        (Reach(ahead=0), None),
        (Reach(ahead=0), 0.5),
        (Reach(30, 0), None),
        (Reach(30, 30), None),
        (Reach(), None),
    ],
)
@pytest.mark.quick(1)
def test_the_kernel_mixes_what_xla_mixes(reach, cap):
    q, k, v = arrays(jnp.float32)
    is_token = (SEGMENTS > 0)[:, :, None, None]
    # With two reaches, the number says which one holds.
    reaches = (Reach(3, 3), reach) if cap is None else (reach,)
    rule = {"reaches": reaches, "scale": 0.3, "cap": cap}
    number, mask = (
        jnp.int32(len(reaches) - 1),
        Mask(jnp.asarray(seen_by(reach))[:, None]),
    )

    def by_kernel(q, k, v):
        options = {**rule, "interpret": True}
        return attend_in_blocks(q, k, v, jnp.asarray(SEGMENTS), number, **options)

    def by_xla(q, k, v):
        return attend(q, k, v, None, mask, 0.0, None, scale=0.3, cap=cap)

    def results(mix):
        total = lambda *args: jnp.sum(jnp.where(is_token, jnp.sin(mix(*args)), 0))
        grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
        return [np.where(is_token, mix(q, k, v), 0), *grads]

    for found, wanted in zip(results(by_kernel), results(by_xla), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "groups", "local"),
    [(4, 2, (1, 1)), (3, 2, (3, 1)), (4, 1, (1, 1)), (3, 1, (3, 1))],
)
def test_on_a_mesh_every_device_runs_the_kernel_for_its_own_heads(rows, groups, local):
    """What the axes do not divide is whole on every device, and never left to XLA."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    array = lambda heads: jax.ShapeDtypeStruct(
        (rows, LENGTH, heads, WIDTH), jnp.bfloat16
    )
    segments = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)

    def mix(q, k, v, segments):
        rule = {"reaches": (Reach(ahead=0),), "interpret": True}
        return attend_in_blocks(q, k, v, segments, jnp.int32(0), **rule)

    q, k = array(2 * groups), array(groups)
    with jax.set_mesh(mesh):
        found = jax.make_jaxpr(mix)(q, k, k, segments)
    (sharded,) = (one for one in found.eqns if one.primitive.name == "shard_map")
    shapes = [one.aval.shape for one in sharded.params["jaxpr"].invars]
    # Keys and values, of a block that is filled up.
    assert shapes.count((*local, 512, WIDTH)) >= 2


@pytest.mark.parametrize("reach", [Reach(ahead=0), Reach(30, 0), Reach()])
@pytest.mark.quick(1)
def test_queries_that_are_sharded_mix_what_all_of_them_mix(reach):
    q, k, v = arrays(jnp.float32)
    is_token = (SEGMENTS > 0)[:, :, None, None]
    options = {"reaches": (Reach(3, 3), reach), "interpret": True}

    def results():
        mix = lambda q, k, v: attend_in_blocks(
            q, k, v, jnp.asarray(SEGMENTS), jnp.int32(1), **options
        )
        total = lambda *args: jnp.sum(jnp.where(is_token, jnp.sin(mix(*args)), 0))
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    value, grads = results()
    with jax.set_mesh(make_mesh(MeshShape(tensor=2, sequence=4))):
        again, others = results()
    np.testing.assert_allclose(value, again, rtol=1e-5)
    for one, other in zip(grads, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)

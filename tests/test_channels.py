"""Chosen rows and columns of kernels have the dense gradient, which is never made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from test_compact import loss, make_batch, make_params, run_compact, run_optax
from test_sharding import on_mesh, on_one
from tiny_models import FAMILIES, jax_batch, padded_batch, tiny_config
from tiny_text import CONFIG, random_params

from sparse_jax import (
    Attachment,
    Blocks,
    Compact,
    Layerwise,
    Sparse,
    Static,
    sift,
)
from sparse_jax.compact.channels import channel_tap
from sparse_jax.compact.model_taps import TrainedValues, tap_leaves
from sparse_jax.models.causal_lm import CausalLM
from sparse_jax.models.config import ClassicConfig
from sparse_jax.models.families.bloom import BLOOM
from sparse_jax.models.families.gpt2 import GPT2
from sparse_jax.models.families.gptj import GPTJ
from sparse_jax.models.families.llama import LLAMA
from sparse_jax.models.functional import Model
from sparse_jax.models.heads import SequenceClassifier
from sparse_jax.models.modules import with_product
from sparse_jax.sharding.mesh import MeshShape
from sparse_jax.supports.channels import are_channels
from sparse_jax.supports.granularity import GRANULARITIES
from sparse_jax.supports.packing import pack
from sparse_jax.supports.roles import SPARSE, map_roles

KEY = jax.random.key(0)
KERNELS = "^layers/.*kernel$"
RUNS = {
    "row": "row",
    "column": "column",
    "4 rows": Blocks(rows=4, columns=None),
    "4 columns": Blocks(rows=None, columns=4),
}
every_run = pytest.mark.parametrize("granularity", RUNS.values(), ids=RUNS)
CHANNELS = pytest.mark.parametrize("granularity", ["row", "column"])


def classic(family, **changes):
    sizes = dict(vocab_size=50, hidden_size=32, num_layers=2, num_heads=4,
                 intermediate_size=48, max_positions=16)  # fmt: skip
    return Model(CausalLM, family, ClassicConfig(**sizes, **changes))


def encoder(name):
    return Model(SequenceClassifier, FAMILIES[name], tiny_config(name))


MODELS = {
    "llama": lambda: Model(CausalLM, LLAMA, CONFIG),
    "bert": lambda: encoder("bert"),
    "modernbert": lambda: encoder("modernbert"),
    "gpt2": lambda: classic(GPT2),
    "gptj": lambda: classic(GPTJ),
    "bloom": lambda: classic(BLOOM),
}


def chosen(roles, params, density):
    """Returns supports of channels that a seed draws."""
    random = np.random.default_rng(0)

    def draw(role, leaf):
        k = role.layout.size(density, role.shape)
        empty = role.layout.empty(leaf.shape, k, stacked=True)
        grid = role.layout._grid(role.shape)
        rows = [
            np.sort(random.permutation(max(grid))[: empty.shape[1]])
            for _ in range(len(leaf))
        ]
        return jnp.array(rows, jnp.int32)

    return map_roles(draw, roles, params, only=(SPARSE,))


def packed_total(method, model_loss, params, density=0.25):
    """Returns a loss of packed values, these, and the roles and supports."""
    roles = method.roles(params)
    support = chosen(roles, params, density)
    values = pack(roles, support, params)

    def total(values):
        trained = TrainedValues({}, values)
        tapped, attachment = tap_leaves(method, roles, params, support, trained)
        return model_loss(tapped, attachment)

    return total, values, roles, support


def assert_gradient_of_channels(method, model_loss, params):
    """Holds what is packed against the dense gradient."""
    total, values, roles, support = packed_total(method, model_loss, params)
    found = jax.jit(jax.grad(total))(values)
    dense = jax.jit(jax.grad(lambda params: model_loss(params, Attachment())))(params)
    expected = pack(roles, support, dense)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        scale = float(jnp.abs(other).max())
        assert scale > 1e-6
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("llama", "row"),
        ("llama", "column"),
        ("bert", "row"),
        ("bert", RUNS["4 rows"]),
        ("gpt2", RUNS["4 columns"]),
        *(pytest.param(name, kind, marks=pytest.mark.slow)
          for name in ("modernbert", "gpt2", "gptj", "bloom")
          for kind in ("row", "column")),
    ],
)  # fmt: skip
@pytest.mark.quick(1)
def test_the_gradient_of_channels_is_that_of_the_dense_one_there(name, granularity):
    model = MODELS[name]()
    params = random_params(model)
    batch = jax_batch(padded_batch("bert"))
    if model.head is not SequenceClassifier:
        batch.pop("token_type_ids")
        batch["input_ids"] %= model.config.vocab_size

    def model_loss(params, attachment):
        logits = model(params, batch, attachment=attachment, unroll=1)
        return jnp.sum(jnp.sin(logits.astype(jnp.float32)))

    method = Sparse(density=0.25, where=KERNELS, granularity=granularity)
    assert_gradient_of_channels(method, model_loss, params)


@CHANNELS
@pytest.mark.quick(1)
def test_both_tiers_train_the_same_channels(granularity):
    rules = {"density": 0.2, "granularity": granularity, "where": KERNELS}
    inner = optax.adam(1e-2, eps=1e-4)
    tuner = Compact(loss, Sparse(**rules), inner)
    state, losses = run_compact(tuner, make_params(), 4)
    tx = sift(inner, **rules, stacked="^layers/")
    params, opt, expected = run_optax(tx, make_params(), 4)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.support, opt.support)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, state.params, params)


@CHANNELS
@pytest.mark.parametrize(
    "recompute",
    [
        "none",
        *(pytest.param(word, marks=pytest.mark.slow) for word in ("frozen", "all")),
    ],
)
@pytest.mark.slow
def test_layers_in_slots_train_the_same_channels(granularity, recompute):
    rules = {"density": 0.2, "granularity": granularity, "where": KERNELS}
    tx, every = optax.sgd(0.1), Static.of(0, 1, 2, num_layers=3)
    method = Sparse(**rules)
    tuner = Layerwise(loss, method, tx, sampler=every, recompute=recompute)
    state, losses = run_compact(tuner, make_params(), 3)
    expected, expected_losses = run_compact(Compact(loss, method, tx), make_params(), 3)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, state.params, expected.params)


def equations(jaxpr):
    """Yields the operations of a program, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for param in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")
        ):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def products_of(granularity, density=0.25, size=6):
    """Returns the shapes of the products of a step's gradient, and its FLOPs."""
    method = Sparse(density=density, where=KERNELS, granularity=granularity)
    batch = make_batch(0, size)
    model_loss = lambda params, attachment: loss(params, batch, None, attachment)[0]
    total, values, *_ = packed_total(method, model_loss, make_params(), density)
    traced = jax.jit(jax.grad(total)).trace(values)
    shapes = {
        tuple(sorted(equation.outvars[0].aval.shape))
        for equation in equations(traced.jaxpr.jaxpr)
        if equation.primitive.name == "dot_general"
    }
    return shapes, traced


# The kernels of a model of 16 with an MLP of 32. No product of a forward pass or of the
# gradient of an input has such a shape.
DENSE = {(16, 16), (16, 32)}


@CHANNELS
def test_no_dense_gradient_of_a_kernel_is_ever_made(granularity):
    assert products_of("4x4")[0] >= DENSE
    assert not products_of(granularity)[0] & DENSE


def test_what_a_step_computes_falls_with_the_density():
    flops = lambda density: (
        products_of("row", density)[1].lower().compile().cost_analysis()["flops"]
    )
    entries = 16 * 16 * 4 + 2 * 16 * 32
    dense = 2 * 6 * 12 * entries  # of one layer, whose loop is counted once
    assert flops(0.75) - flops(0.25) == pytest.approx(dense / 2, rel=0.1)


class Twice(Sparse):
    """A method whose response uses the kernel beside the product, too."""

    def response(self, site, module, x, added, strength=1.0, *, key=None):
        y = super().response(site, module, x, added, strength, key=key)
        is_linear = isinstance(module, nnx.Linear)
        return y * jnp.mean(module.kernel[...] ** 2) + module(2 * x) if is_linear else y


class Plain(Sparse):
    """A method that hands on functions in place of modules."""

    def respond(self, site, module, x, layer, key):
        return super().respond(site, lambda x: module(x), x, layer, key)


@pytest.mark.parametrize("kind", [Twice, Plain])
@pytest.mark.quick(1)
def test_other_uses_of_a_kernel_count(kind):
    method = kind(density=0.25, where=KERNELS, granularity="row")
    batch = make_batch(0)

    def model_loss(params, attachment):
        respond = lambda *args: method.respond(*args)
        if attachment.response is Attachment().response:
            attachment = attachment._replace(response=respond)
        return loss(params, batch, None, attachment)[0]

    assert_gradient_of_channels(method, model_loss, make_params())


def two_uses(params, attachment):
    """Returns a loss of layers that hand on a function, or multiply by hand."""
    x = jnp.linspace(-1, 1, 5 * 8).reshape(5, 8)
    for i in range(2):
        layer, own = (
            jax.tree.map(lambda leaf, i=i: leaf[i], tree)
            for tree in (params["layers"], attachment.trained)
        )
        w = attachment.weights(layer, own)["up"]["kernel"]
        apply = lambda x, w=w: x @ w
        x = jnp.tanh(attachment.response("up", apply, x, own, None) + x @ w.T)
    return jnp.sum(x**3)


@CHANNELS
def test_a_model_of_plain_functions_has_its_gradients_packed(granularity):
    method = Sparse(density=0.25, granularity=granularity)
    kernel = jax.random.normal(KEY, (2, 8, 8))
    assert_gradient_of_channels(
        method, two_uses, {"layers": {"up": {"kernel": kernel}}}
    )


@CHANNELS
@pytest.mark.parametrize(
    "mesh",
    [
        MeshShape(data=2, fsdp=2, tensor=2),
        pytest.param(MeshShape(fsdp=8), marks=pytest.mark.slow),
        pytest.param(MeshShape(tensor=8), marks=pytest.mark.slow),
        pytest.param(MeshShape(data=8), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.quick(1)
def test_channels_on_a_mesh_have_the_numbers_of_one_device(mesh, granularity):
    assert_same_on(mesh, granularity)


@pytest.mark.slow
def test_channels_on_explicit_axes_have_the_numbers_of_one_device():
    assert_same_on(MeshShape(data=2, fsdp=2, tensor=2), "row", kind=AxisType.Explicit)


def assert_same_on(mesh, granularity, **options):
    where = "^layers/(attention/query|mlp/down)/kernel"
    method = Sparse(density=0.3, where=where, granularity=granularity)
    one, many = on_one(method, 5), on_mesh(method, 5, mesh, **options)
    np.testing.assert_allclose(one[0], many[0], rtol=1e-5)
    near = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(near, one[1].params, jax.tree.map(np.asarray, many[1].params))


def test_a_product_of_its_own_keeps_it():
    other = lambda *args, **options: jax.lax.dot_general(*args, **options) + 1
    module = nnx.Linear(2, 3, dot_general=other, rngs=nnx.Rngs(0))
    wrap = lambda product, *args, **options: product(*args, **options)
    assert with_product(module, wrap) is module
    function = lambda x: x
    assert with_product(function, wrap) is function


def test_bfloat16_channels_round_as_the_dense_gradient_does():
    layout, support = GRANULARITIES["row"], jnp.array([1, 3])
    x, w = (jax.random.normal(jax.random.key(i), (7, 7), jnp.bfloat16) for i in (1, 2))
    y = lambda w: jnp.sum((x @ w).astype(jnp.float32) ** 2)

    def tapped(packed):
        product = x @ jax.lax.stop_gradient(w)
        product = channel_tap(layout, product, x, packed, support)
        return jnp.sum(product.astype(jnp.float32) ** 2)

    packed = jax.grad(tapped)(jnp.zeros((2, 7), jnp.bfloat16))
    assert packed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(packed, jax.grad(y)(w)[support])


@pytest.mark.parametrize("word", ["entry", "lane", "4x4"])
def test_other_granularities_are_no_channels(word):
    assert not are_channels(GRANULARITIES[word], (128, 128))

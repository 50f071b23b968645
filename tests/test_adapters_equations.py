"""The equation of every method, on numbers that can be followed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.methods.bottlenecks import Parallel, Series
from sparse_jax.methods.ia3 import IA3
from sparse_jax.methods.lora import DoRA, LoRA
from sparse_jax.methods.prefix import Prefix
from sparse_jax.models.attachment import MEMORY, Memory
from sparse_jax.models.attend import Mask, attend, remember


def attend_to(q, seen, rate=0.0, key=None):
    return attend(q, seen.k, seen.v, seen.bias, seen.mask, rate, key)


class Linear:
    """A linear map as layers have it."""

    def __init__(self, kernel, bias=None):
        self.kernel, self.bias = jnp.array(kernel), bias

    def __call__(self, x):
        y = x @ self.kernel
        return y if self.bias is None else y + self.bias


# x @ W = [3, 8], and with the bias [4, 10].
X = jnp.array([[1.0, 2.0]])
MODULE = Linear([[3.0, 0.0], [0.0, 4.0]], jnp.array([[1.0, 2.0]]))
PAIR = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[2.0, -1.0]])}


def respond(method, arrays, strength=1.0, key=None):
    return method.response("up", MODULE, X, {"up": arrays}, strength, key=key)


def test_lora():
    # x A B = 3 [2, -1] = [6, -3].
    np.testing.assert_array_equal(respond(LoRA(rank=1, alpha=2), PAIR), [[16, 4]])
    np.testing.assert_array_equal(respond(LoRA(rank=1, alpha=2), PAIR, 0.5), [[10, 7]])


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 2.0),
        ({"alpha": 4}, 0.25),
        ({"alpha": 4, "rslora": True}, 1.0),
        ({"rslora": True}, 8.0),
    ],
)
def test_the_scale_of_lora(options, scale):
    assert LoRA(rank=16, **options).scale == scale


def test_dropout_of_lora_is_seen_by_the_product_alone():
    method = LoRA(rank=1, alpha=1, dropout=0.5)
    np.testing.assert_array_equal(respond(method, PAIR), [[10, 7]])
    seen = [respond(method, PAIR, key=jax.random.key(i)) for i in range(400)]
    # x becomes [0 or 2, 0 or 4], so x A is 0, 2, 4 or 6, and 3 on average.
    low = np.array(seen)[:, 0, 1]
    assert {*low.tolist()} == {10.0, 8.0, 6.0, 4.0}
    assert abs((10 - low).mean() - 3) < 4 * np.sqrt(5 / 400)
    again = respond(method, PAIR, key=jax.random.key(0))
    np.testing.assert_array_equal(again, seen[0])


def test_sites_and_layers_lose_other_entries():
    method = LoRA(rank=1, alpha=1, dropout=0.5)
    x, pair = jnp.ones((1, 64)), {"a": jnp.eye(64), "b": jnp.eye(64)}
    added = {"up": pair, "down": pair}
    see = lambda site, i: np.asarray(
        method.response(site, lambda x: 0 * x, x, added, key=jax.random.key(i))
    )
    assert (see("up", 0) != see("down", 0)).any()
    assert (see("up", 0) != see("up", 1)).any()


def test_dora():
    # W + A B = [[5, -1], [2, 3]] has columns of length sqrt(29) and sqrt(10).
    arrays = {**PAIR, "m": jnp.array([2.0, 3.0])}
    expected = [[2 * 9 / 29**0.5 + 1, 3 * 5 / 10**0.5 + 2]]
    y = respond(DoRA(rank=1, alpha=1), arrays)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    # Without the product the lengths are those of W, 3 and 4.
    y = respond(DoRA(rank=1, alpha=1), arrays, 0.0)
    np.testing.assert_allclose(y, [[2 * 3 / 3 + 1, 3 * 8 / 4 + 2]], rtol=1e-6)


def test_dora_starts_at_the_lengths_of_the_columns():
    params = {"layers": {"up": {"kernel": jnp.array([[[3.0, 0.0], [4.0, 0.0]]])}}}
    method = DoRA(rank=1, where="up")
    added = method.added(params, jax.random.key(0))
    np.testing.assert_allclose(added["up"]["m"], [[5, 0]], atol=1e-18)
    merged = method.merge(params, added)
    np.testing.assert_array_equal(
        merged["layers"]["up"]["kernel"], params["layers"]["up"]["kernel"]
    )


BRANCH = {
    "down": jnp.array([[1.0], [-1.0]]),
    "down_bias": jnp.array([2.0]),
    "up": jnp.array([[1.0, 3.0]]),
    "up_bias": jnp.array([0.5, 0.0]),
}


def test_a_parallel_adapter_sees_the_input():
    # x D + d = 1 - 2 + 2 = 1, relu gives 1, and U and u [1.5, 3].
    y = respond(Parallel(size=1, scale=2.0), BRANCH)
    np.testing.assert_array_equal(y, [[4 + 3, 10 + 6]])
    y = respond(Parallel(size=1, scale=2.0), BRANCH, 0.5)
    np.testing.assert_array_equal(y, [[4 + 1.5, 10 + 3]])


def test_a_series_adapter_sees_the_output():
    # y D + d = 4 - 10 + 2 = -4: relu gives 0, the square 16.
    np.testing.assert_array_equal(respond(Series(size=1), BRANCH), [[4.5, 10]])
    y = respond(Series(size=1, activation=jnp.square), BRANCH)
    np.testing.assert_array_equal(y, [[4 + 16.5, 10 + 48]])


def test_ia3_scales_outputs_or_inputs():
    factor = jnp.array([3.0, 0.5])
    np.testing.assert_array_equal(respond(IA3(), {"output": factor}), [[12, 5]])
    np.testing.assert_array_equal(respond(IA3(), {"input": factor}), [[10, 6]])
    y = respond(IA3(), {"output": factor}, 0.5)
    np.testing.assert_array_equal(y, [[8, 7.5]])


def dora_in_torch(x, w, bias, a, b, m, scale):
    """Returns the output by the formula of the paper, the norm taken as constant."""
    import torch

    direction = w + scale * (a @ b)
    norm = torch.linalg.vector_norm(direction, dim=0).detach()
    return x @ (m / norm * direction) + bias


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_dora_has_the_gradients_of_pytorch(strength):
    import torch

    random = np.random.default_rng(0)
    shapes = {"x": (5, 4), "w": (4, 3), "bias": (3,), "a": (4, 2), "b": (2, 3)}
    values = {name: random.normal(size=shape) for name, shape in shapes.items()}
    values["m"] = random.uniform(1, 2, 3)
    cotangent = random.normal(size=(5, 3))
    theirs = {name: torch.tensor(v, requires_grad=True) for name, v in values.items()}
    out = dora_in_torch(**theirs, scale=2.0 * strength)
    (out * torch.tensor(cotangent)).sum().backward()

    def ours(v):
        module = Linear(v["w"], v["bias"][None])
        arrays = {name: v[name] for name in ("a", "b", "m")}
        return DoRA(rank=2).response("up", module, v["x"], {"up": arrays}, strength)

    values = {name: jnp.asarray(v, jnp.float32) for name, v in values.items()}
    np.testing.assert_allclose(ours(values), out.detach(), rtol=0, atol=1e-5)
    grads = jax.grad(lambda v: jnp.sum(ours(v) * cotangent))(values)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, theirs[name].grad, rtol=0, atol=2e-5)


def test_a_prefix_joins_the_attention():
    x = jnp.zeros((1, 1, 2))
    arrays = {"keys": jnp.array([[1.0, 0.0]]), "values": jnp.array([[8.0, 0.0]])}
    added = {"attention/memory": arrays}
    k = v = jnp.array([[[[0.0, 0.0]]]])
    mask = Mask(jnp.ones((1, 1, 1, 1), bool))
    q = jnp.array([[[[2**0.5 * np.log(3.0), 0.0]]]])

    def mixed(strength):
        ask = (MEMORY, lambda x: None, x, added, strength)
        seen = remember(Prefix(length=1).response(*ask), k, v, mask)
        return attend_to(q, seen)[0, 0, 0]

    # The scores are log 3 and 0, the weights 3/4 and 1/4; a third of 3 is 1.
    np.testing.assert_allclose(mixed(1.0), [6, 0], rtol=1e-6)
    np.testing.assert_allclose(mixed(1 / 3), [4, 0], rtol=1e-6)
    np.testing.assert_array_equal(mixed(0.0), [0, 0])


def test_a_prefix_is_the_same_with_dropout_in_the_attention():
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    memory = Memory(draw(0, 3, 8), draw(1, 3, 8), jnp.log(jnp.float32(0.5)))
    k, v, q = (draw(i, 2, 5, 4, 2) for i in (2, 3, 4))
    seen = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    mask = Mask(seen[:, None, None])
    seen = remember(memory, k, v, mask)
    # So small a rate drops nothing of these few weights.
    dropped = attend_to(q, seen, 1e-9, jax.random.key(0))
    np.testing.assert_allclose(dropped, attend_to(q, seen), atol=1e-5)
    # A query does not see padding, with a memory or without.
    other = remember(memory, k.at[0, 3:].set(9.0), v.at[0, 3:].set(9.0), mask)
    np.testing.assert_array_equal(attend_to(q, other), attend_to(q, seen))

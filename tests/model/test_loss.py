import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer import trees
from jaxformer.config import MeshConfig, ModelConfig
from jaxformer.model import Transformer, loss
from jaxformer.model.loss import cross_entropy
from jaxformer.sharding import make_mesh

B, T, D, V = 4, 32, 8, 48
CONFIG = ModelConfig(d_model=D, num_heads=8, d_ff=8, encoder_layers=1, decoder_layers=1)
SMOOTHING = 0.1


def draw(rows=B, length=T, width=D, vocabulary=V, seed=0):
    """The output table of a model, x_BTD, targets_BT, weights_BT (a third of them 0)."""
    rng = np.random.default_rng(seed)
    table_VD = rng.standard_normal((vocabulary, width)).astype(np.float32)
    x_BTD = rng.standard_normal((rows, length, width)).astype(np.float32)
    targets_BT = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    weights_BT = (rng.uniform(size=(rows, length)) < 2 / 3).astype(np.float32)
    targets_BT[::2] = (x_BTD[::2] @ table_VD.T).argmax(-1)  # some right guesses
    return table_VD, x_BTD, targets_BT, weights_BT


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Batches as small as these would be one chunk."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", B * 8)


def model_with(table_VD):
    """A model whose (tied) output table is this one; the rest of it is never computed."""
    shapes = jax.eval_shape(lambda: Transformer(CONFIG, V, jax.random.key(0)))
    return trees.unflatten(shapes, trees.flatten(shapes) | {"embedding_VD": table_VD})


def sums(table_VD, x_BTD, targets_BT, weights_BT, smoothing=SMOOTHING):
    return cross_entropy(model_with(table_VD), x_BTD, targets_BT, weights_BT, smoothing)


def naive(table_VD, x_BTD, targets_BT, weights_BT, smoothing=SMOOTHING):
    """The smoothed loss with all logits in memory and the gradient left to JAX."""
    log_p_BTV = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x_BTD, table_VD))
    wanted_BTV = jax.nn.one_hot(targets_BT, table_VD.shape[0])
    wanted_BTV = (1 - smoothing) * wanted_BTV + smoothing / table_VD.shape[0]
    return -(weights_BT * (wanted_BTV * log_p_BTV).sum(-1)).sum()


def gradient(function, table_VD, x_BTD, *rest):
    """Gradients for table and x of 3 times the loss: the cotangent is not always one."""

    def scaled(table_VD, x_BTD):
        out = function(table_VD, x_BTD, *rest)
        return 3.0 * (out["loss"] if isinstance(out, dict) else out)

    return jax.jit(jax.grad(scaled, argnums=(0, 1)))(table_VD, x_BTD)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sums_are_those_of_float64(smoothing):
    table_VD, x_BTD, targets_BT, weights_BT = draw()
    got = jax.jit(sums, static_argnums=4)(table_VD, x_BTD, targets_BT, weights_BT, smoothing)
    logits = x_BTD.astype(np.float64).reshape(-1, D) @ table_VD.astype(np.float64).T
    wanted = reference.cross_entropy(logits, targets_BT.ravel(), weights_BT.ravel(), smoothing)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == jnp.float32
        assert got[name].shape == ()
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)
    assert 0 < wanted["correct"] < wanted["count"]


def test_gradient_is_that_of_the_naive_formula():
    inputs = draw()
    for got, wanted in zip(gradient(sums, *inputs), gradient(naive, *inputs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * abs(np.asarray(wanted)).max())


def test_positions_without_weight_have_no_say():
    table_VD, x_BTD, targets_BT, weights_BT = draw()
    blank = weights_BT == 0
    loud, other = np.where(blank[..., None], 1e3, x_BTD), np.where(blank, 0, targets_BT)
    run = jax.jit(jax.value_and_grad(lambda t, x, y: sums(t, x, y, weights_BT)["loss"], (0, 1)))
    before, (table_grad, x_grad) = run(table_VD, x_BTD, targets_BT)
    after, (other_table_grad, other_x_grad) = run(table_VD, loud.astype(np.float32), other)
    assert (np.asarray(x_grad)[blank] == 0).all()
    assert (np.asarray(x_grad)[~blank] != 0).all()
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(table_grad, other_table_grad)
    np.testing.assert_array_equal(x_grad, other_x_grad)


def test_the_size_of_chunks_decides_nothing(monkeypatch):
    inputs = draw()
    wanted = gradient(sums, *inputs), jax.jit(sums)(*inputs)
    for positions in (1, 16, T):
        monkeypatch.setattr(loss, "CHUNK_TOKENS", B * positions)
        fresh = lambda *inputs: sums(*inputs)  # noqa: E731 (JAX remembers what it has traced)
        assert f"length={T // positions}" in str(jax.make_jaxpr(fresh)(*inputs))
        got = gradient(fresh, *inputs), jax.jit(fresh)(*inputs)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * abs(np.asarray(b)).max())


@pytest.mark.parametrize("length", [1, 7, 31])
def test_lengths_that_chunks_do_not_divide(length):
    inputs = draw(length=length)
    got, wanted = gradient(sums, *inputs), gradient(naive, *inputs)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * abs(np.asarray(b)).max())


def test_bfloat16_is_near_float32():
    table_VD, x_BTD, *rest = draw()
    wanted = gradient(sums, table_VD, x_BTD, *rest)
    table_grad, x_grad = gradient(sums, table_VD, x_BTD.astype(jnp.bfloat16), *rest)
    assert (table_grad.dtype, x_grad.dtype) == (jnp.float32, jnp.bfloat16)
    for got, exact in zip((table_grad, x_grad), wanted, strict=True):
        error = abs(np.asarray(got, np.float64) - np.asarray(exact)).max()
        assert 0 < error < 0.02 * abs(np.asarray(exact)).max()


def arrays(text: str):
    """The element counts of all arrays in a compiled program."""
    return [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", text)]


def test_the_logits_of_a_batch_are_never_held():
    rows, length, width, vocabulary = B, 128, 8, 512
    table_VD, x_BTD, *rest = draw(rows, length, width, vocabulary)
    every_logit = rows * length * vocabulary

    def compiled(function):
        def scalar(table_VD, x_BTD):
            out = function(table_VD, x_BTD, *rest)
            return out["loss"] if isinstance(out, dict) else out

        return jax.jit(jax.grad(scalar, (0, 1))).lower(table_VD, x_BTD).compile()

    plain, ours = compiled(naive), compiled(sums)
    assert plain.memory_analysis().temp_size_in_bytes >= 4 * every_logit
    assert max(arrays(plain.as_text())) >= every_logit
    # Logits and gradients of a chunk, x and the table with their gradients: not more at a time.
    chunk = loss.CHUNK_TOKENS * vocabulary
    room = 4 * (3 * chunk + 2 * x_BTD.size + 2 * table_VD.size)
    assert ours.memory_analysis().temp_size_in_bytes < room < 4 * every_logit // 2
    assert max(arrays(ours.as_text())) <= chunk


@pytest.mark.parametrize("sizes", [(1, 1, 8, 1), (2, 2, 2, 1)], ids=str)
def test_a_split_vocabulary_is_never_brought_together(sizes):
    inputs = draw()
    wanted = jax.jit(jax.value_and_grad(lambda *a: sums(*a)["loss"], (0, 1)))(*inputs)
    mesh = make_mesh(MeshConfig(*sizes))
    rows = ("data", "fsdp")
    layouts = (P("tensor", "fsdp"), P(rows, None, None), P(rows, None), P(rows, None))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, NamedSharding(mesh, layout))
            for array, layout in zip(inputs, layouts, strict=True)
        ]
        step = jax.jit(jax.value_and_grad(lambda *a: sums(*a)["loss"], (0, 1)))
        compiled = step.lower(*placed).compile()
        got = compiled(*placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * abs(np.asarray(b)).max())
    # What is gathered is the table over fsdp (at most V / tensor rows), never a row of V scores.
    gathers = re.findall(r"= (\S+) all-gather(?:-start)?\(", compiled.as_text())
    assert (sizes[1] > 1) == bool(gathers)
    for shape in gathers:
        assert str(V) not in re.findall(r"\d+", shape.split("{")[0].split("[")[1]), shape

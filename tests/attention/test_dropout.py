import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.attention.dropout import dropout, keep, random_bits

KEY = jax.random.key(3)
RATE = 0.3


def murmur(word: int) -> int:
    """The 32-bit finaliser of MurmurHash3."""
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_bits_are_a_hash_of_key_and_coordinates(shape):
    first, last = (int(word) for word in jax.random.key_data(KEY))
    bits = np.asarray(random_bits(KEY, shape))
    for at in itertools.product(*map(range, shape)):
        outer = inner = 0
        for axis, i in enumerate(at):
            if axis < len(shape) - 2:
                outer = outer * shape[axis] + i
            else:
                inner = inner * shape[axis] + i
        assert bits[at] == murmur(murmur(murmur(outer ^ first) ^ last) ^ inner)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((8, 16, 4), P(("data", "tensor"), None, None)),
        ((8, 16, 4), P("data", None, "tensor")),
        ((4, 2, 8, 8), P("data", "tensor", None, None)),
        ((4, 2, 8, 8), P(None, None, "data", "tensor")),
    ],
)
def test_bits_do_not_depend_on_the_devices(shape, layout):
    x = jax.random.normal(jax.random.key(0), shape)
    alone = dropout(x, RATE, KEY)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, layout))
        value, pull = jax.vjp(lambda x: jax.jit(dropout, static_argnums=1)(x, RATE, KEY), spread)
        (gradient,) = pull(spread)
    for result in (value, gradient):
        assert len(result.sharding.device_set) == 8
        assert result.sharding.spec == layout
        np.testing.assert_array_equal(result, alone)


def sigmas(share: float, expected: float, count: int) -> float:
    return abs(share - expected) / (expected * (1 - expected) / count) ** 0.5


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
def test_the_right_share_goes_along_every_axis(rate):
    kept = np.asarray(keep(KEY, rate, (16, 8, 40, 25)))
    assert sigmas(kept.mean(), 1 - rate, kept.size) < 4
    for axis in range(kept.ndim):
        shares = np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1).mean(-1)
        for share in shares:
            assert sigmas(share, 1 - rate, kept.size // len(shares)) < 5


def test_the_mean_stays():
    x = jnp.ones((100, 1000))
    dropped = np.asarray(dropout(x, RATE, KEY))
    spread = (RATE / (1 - RATE) / x.size) ** 0.5
    assert abs(dropped.mean() - 1) < 4 * spread
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / (1 - RATE)], rtol=1e-6)


def test_keys_rows_and_neighbours_are_unrelated():
    """Independent masks agree in a share (1 - rate)^2 + rate^2 of their elements."""
    agreement = (1 - RATE) ** 2 + RATE**2
    masks = [np.asarray(keep(jax.random.fold_in(KEY, i), RATE, (4, 64, 64))) for i in range(3)]
    pairs = [
        (masks[0], masks[1]),
        (masks[1], masks[2]),
        (masks[0][0], masks[0][1]),
        (masks[0][1], masks[0][3]),
        (masks[0][:, 1:], masks[0][:, :-1]),
        (masks[0][:, :, 1:], masks[0][:, :, :-1]),
        (masks[0], masks[0].swapaxes(1, 2)),
    ]
    for a, b in pairs:
        assert sigmas((a == b).mean(), agreement, a.size) < 4


def test_the_gradient_passes_where_the_value_passed():
    x = jax.random.normal(jax.random.key(1), (4, 6, 8))
    c = jax.random.normal(jax.random.key(2), (4, 6, 8))
    kept = np.asarray(keep(KEY, RATE, x.shape))
    gradient = jax.grad(lambda x: (c * dropout(x, RATE, KEY)).sum())(x)
    np.testing.assert_allclose(gradient, np.where(kept, c / (1 - RATE), 0), rtol=1e-6)


def test_without_key_or_rate_nothing_happens():
    x = jnp.ones((2, 3))
    assert dropout(x, RATE, None) is x
    assert dropout(x, 0.0, KEY) is x

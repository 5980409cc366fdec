import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxformer.model.positions import rotary, rotate, sinusoidal


def test_sinusoidal_positions_are_the_papers():
    positions = jnp.asarray([[0, 1, 2, 500], [7, 0, 1023, 3]], jnp.int32)
    got = np.asarray(sinusoidal(positions, 16))
    wanted = [[reference.sinusoidal(int(p), 16) for p in row] for row in positions]
    assert got.dtype == np.float32
    # The phase of position 1023 is known to 1023 * 2^-24 radians.
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    np.testing.assert_allclose(got[0, :3], wanted[0][:3], atol=1e-6)


def turned(x_K, position):
    rotation = rotary(jnp.full((1, 1), position, jnp.int32), len(x_K))
    return np.asarray(rotate(jnp.asarray(x_K, jnp.float32)[None, None, None], rotation))[0, 0, 0]


@pytest.mark.parametrize("position", [0, 1, 40])
def test_rotation_turns_pairs_as_complex_numbers(position):
    x = np.random.default_rng(position).standard_normal(8)
    np.testing.assert_allclose(turned(x, position), reference.rotated(x, position), atol=1e-5)


def test_scores_depend_on_distance_only():
    q, k = np.random.default_rng(0).standard_normal((2, 8))
    near, far = turned(q, 12) @ turned(k, 5), turned(q, 107) @ turned(k, 100)
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert abs(near - turned(q, 12) @ turned(k, 6)) > 1e-2


def test_rotation_of_bfloat16_stays_bfloat16():
    x = jnp.ones((1, 2, 3, 8), jnp.bfloat16)
    assert rotate(x, rotary(jnp.zeros((1, 2), jnp.int32), 8)).dtype == jnp.bfloat16

"""How a model without recurrence learns who stands where."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

BASE = 10_000.0
"""The slowest wave is this many times longer than the fastest (both papers use it)."""


def angles(positions_BT: Array, size: int) -> Array:
    """position / BASE^(2i / size) for i < size / 2: float32 [B, T, size / 2], in radians."""
    frequencies = BASE ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    return positions_BT[..., None].astype(jnp.float32) * frequencies[None, None, :]


def sinusoidal(positions_BT: Array, d_model: int) -> Array:
    """Sines on even and cosines on odd features, float32 [B, T, D].

    Vaswani et al. (2017), section 3.5.
    """
    waves = angles(positions_BT, d_model)
    pairs = jnp.stack([jnp.sin(waves), jnp.cos(waves)], axis=-1)
    return pairs.reshape(*positions_BT.shape, d_model)


def rotary(positions_BT: Array, head_dim: int) -> tuple[Array, Array]:
    """Cosine and sine of the rotation of each pair of features: two float32 [B, T, K / 2]."""
    turns = angles(positions_BT, head_dim)
    return jnp.cos(turns), jnp.sin(turns)


def rotate(x_BTHK: Array, rotation: tuple[Array, Array]) -> Array:
    """Turns the feature pairs (i, i + K/2) of every head by the angle of their position.

    After this, q . k depends on the distance of their positions only. Su et al. (2021), section
    3.2; the pairing by halves, instead of neighbours, is a relabelling of features that keeps both
    halves contiguous.
    """
    cos_BT1k, sin_BT1k = (part[:, :, None, :].astype(x_BTHK.dtype) for part in rotation)
    left, right = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate(
        [left * cos_BT1k - right * sin_BT1k, right * cos_BT1k + left * sin_BT1k], axis=-1
    )

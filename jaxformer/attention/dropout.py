"""Dropout whose bits are a function of where an element stands, and of nothing else.

Each bit is a hash of (key, position in the global array). So the bits do not change with the
number of devices, with a kernel's block sizes, or with the order of evaluation, and the compiler
fuses the hash into its consumer: no random array is ever written to memory.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array


def mix(x: Array) -> Array:
    """Scrambles uint32 words so that neighbouring inputs give unrelated outputs.

    Two rounds of multiply and xor-shift, the finaliser of MurmurHash3 (A. Appleby, 2011).
    """
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def random_bits(key: Array, shape: tuple[int, ...], sharding=None) -> Array:
    """uint32 [*shape]; element (..., i, j) hashes the key with its own coordinates.

    The last two coordinates and the leading ones are hashed in turn, so that 32 bits address
    each part: an attention picture has (batch, head) and (query, key).
    """
    outer = _linear_index(shape, range(len(shape) - 2), sharding)
    inner = _linear_index(shape, range(max(len(shape) - 2, 0), len(shape)), sharding)
    return _hash(words_of(key), outer, inner)


def words_of(key: Array) -> tuple[Array, Array]:
    """The two uint32 words of a key that decide the bits."""
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    return words[0], words[-1]


def _hash(words: tuple[Array, Array], outer: Array, inner: Array) -> Array:
    return mix(mix(mix(outer ^ words[0]) ^ words[1]) ^ inner)


def _linear_index(shape: tuple[int, ...], axes: range, sharding) -> Array:
    index = jax.lax.full(shape, 0, jnp.uint32, sharding=sharding)
    for axis in axes:
        stride = math.prod(shape[a] for a in axes if a > axis) % 2**32
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
        index = index + along * jnp.uint32(stride)
    return index


def keep(key: Array, rate: float, shape: tuple[int, ...], sharding=None) -> Array:
    """bool [*shape]: which elements survive dropout of the given rate."""
    return random_bits(key, shape, sharding) >= _threshold(rate)


def keep_at(words: tuple[Array, Array], rate: float, outer: Array, inner: Array) -> Array:
    """What `keep` says at these places of a larger array, given as row-major indices.

    Args:
      words: `words_of` the key.
      rate: as in `keep`.
      outer: index over all axes but the last two; int32, broadcast against `inner`.
      inner: index over the last two axes.
    """
    bits = _hash(words, outer.astype(jnp.uint32), inner.astype(jnp.uint32))
    return bits >= _threshold(rate)


def _threshold(rate: float) -> Array:
    return jnp.uint32(min(round(rate * 2**32), 2**32 - 1))  # a rate just below 1 would overflow


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """x with a share `rate` of its elements zeroed and the rest scaled up; x itself without a key.

    Srivastava et al. (2014), in the inverted form: the expectation of every element is unchanged.
    """
    return x if key is None or rate == 0.0 else _drop(x, key, rate)


# The gradient hashes the bits again: cheaper than keeping a mask for every layer.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x, key, rate):
    sharding = jax.typeof(x).sharding
    kept = keep(key, rate, x.shape, None if sharding.mesh.empty else sharding)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


_drop.defvjp(
    lambda x, key, rate: (_drop(x, key, rate), key),
    lambda rate, key, gradient: (_drop(gradient, key, rate), None),
)

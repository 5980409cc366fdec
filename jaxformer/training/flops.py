"""How much arithmetic a step needs, and how fast this machine could do it."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from jaxformer.config import ModelConfig, head_dim, kv_heads

CPU_SIZE, ACCELERATOR_SIZE = 2048, 8192
"""Side of the square matrices whose product measures the peak."""


def step_flops(model: ModelConfig, vocab_size: int, rows: int, S: int, T: int) -> float:
    """Floating-point operations of the matrix products in one training step.

    Forward and backward: three products of the size of the forward one. Dense attention pictures
    count whole, padding counts, recomputation does not: this is the work that has to be done.
    """
    D, F, K = model.d_model, model.d_ff, head_dim(model)
    H, G = model.num_heads, kv_heads(model)
    query_output, key_value = 2 * D * H * K, 2 * D * G * K
    feed_forward = (3 if model.activation == "swiglu" else 2) * D * F
    encoder = S * (query_output + key_value + feed_forward) + 2 * S * S * H * K
    self_attention = T * (query_output + key_value) + 2 * T * T * H * K
    cross_attention = T * query_output + S * key_value + 2 * T * S * H * K
    decoder = self_attention + cross_attention + T * feed_forward
    forward = model.encoder_layers * encoder + model.decoder_layers * decoder + T * D * vocab_size
    return 2.0 * 3.0 * rows * forward


def matmul_peak(dtype: str) -> float:
    """The best rate of a large matrix product on all devices, in FLOP/s, measured here and now."""
    size = CPU_SIZE if jax.default_backend() == "cpu" else ACCELERATOR_SIZE
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # Virtual CPU devices share the cores that this product used.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return devices * 2 * size**3 / best

"""Drawn shapes and masks: every implementation against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from attention_cases import REFUSALS, error, small_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.attention import IMPLEMENTATIONS, Mask, attention

H, G, K = 2, 2, 8

# T, S, causal, window. Each is compiled once for each implementation; values and ids are drawn.
SHAPES = [(5, 9, False, None), (33, 17, False, 6), (20, 20, True, None)]


@functools.cache
def compiled(name: str, T: int, S: int, causal: bool, window: int | None):
    """Output and gradients of one row, cut into small blocks."""

    def both(q, k, v, out_grad, q_ids, kv_ids):
        mask = Mask(q_ids, kv_ids, causal=causal, window=window)
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, mask, implementation=name), q, k, v)
        return out, *pull(out_grad)

    q, k = (jax.ShapeDtypeStruct((1, n, H, K), jnp.float32) for n in (T, S))
    ids = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (T, S))
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, 16, 8)
        return jax.jit(both).lower(q, k, k, q, *ids).compile()


@st.composite
def calls(draw):
    """A shape, ids of queries and of keys in any order (0 is padding), and a seed."""
    T, S, *how = draw(st.sampled_from(SHAPES))
    ids = [draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for n in (T, S)]
    return (T, S, *how), *ids, draw(st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if "float32" not in REFUSALS[n]])
@settings(deadline=None, max_examples=30)
@given(call=calls())
def test_a_drawn_call_gives_what_float64_gives(name, call):
    (T, S, causal, window), q_ids, kv_ids, seed = call
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((1, n, H, K)).astype(np.float32) for n in (T, S, S, T)]
    ids = [np.asarray([x], np.int32) for x in (q_ids, kv_ids)]
    got = compiled(name, T, S, causal, window)(*arrays, *ids)
    q, k, v, out_grad = (x[0].astype(np.float64) for x in arrays)
    allowed = reference.allowed_pairs(T, S, ids[0][0], ids[1][0], causal, window)
    out = reference.attention(q, k, v, allowed)
    gradients = reference.attention_gradients(q, k, v, allowed, out_grad)[:3]
    floor = max(1.0, *(abs(x).max() for x in gradients)) / 3
    for x, wanted in zip(got, (out, *gradients), strict=True):
        assert error(x[0], wanted, floor) <= 4e-6

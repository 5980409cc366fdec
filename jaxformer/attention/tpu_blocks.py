"""One block of the TPU kernels: which there are, and what happens to the scores in it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxformer.attention.dropout import keep_at
from jaxformer.attention.extras import NOTHING


class Static(NamedTuple):
    """All that a kernel is compiled for."""

    causal: bool
    window: int | None
    rate: float
    segments: bool
    T: int
    S: int
    heads: int  # of queries, in the whole array
    keys: int  # length of the keys, in the whole array
    n: int  # queries of a block
    m: int  # keys of a block
    interpret: Any

    @property
    def blocks(self) -> tuple[int, int]:
        """I, J: blocks of queries and of keys."""
        return pl.cdiv(self.T, self.n), pl.cdiv(self.S, self.m)


def product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """The product of two matrices over an axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def places(i, j, static: Static) -> tuple[Array, Array]:
    """int32 [m, n]: the query and the key of each score of a block."""
    shape = (static.m, static.n)
    query_mn = i * static.n + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    key_mn = j * static.m + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return query_mn, key_mn


def masked(scores_mn, q_segments_1n, kv_segments_m1, i, j, static: Static) -> Array:
    """The scores where segments, order and window allow them, NOTHING elsewhere."""
    query_mn, key_mn = places(i, j, static)
    rules = []
    if static.segments:
        q_1n = q_segments_1n[...]
        rules.append((kv_segments_m1[...] == q_1n) & (q_1n != 0))
    elif static.S % static.m:
        rules.append(key_mn < static.S)
    if static.causal:
        rules.append(query_mn >= key_mn)
    if static.window is not None:
        rules.append(abs(query_mn - key_mn) < static.window)
    if not rules:
        return scores_mn
    return jnp.where(functools.reduce(jnp.logical_and, rules), scores_mn, NOTHING)


def dropped(x_mn, place_6, b, h, i, j, static: Static) -> Array:
    """Dropout with the bits that the whole picture [B, H, T, S] would have in this block.

    `place_6` holds the two words of the key, then the row, head, query and key that are first here.
    """
    if not static.rate:
        return x_mn
    first, second = (jax.lax.bitcast_convert_type(place_6[w], jnp.uint32) for w in range(2))
    outer = (place_6[2] + b) * static.heads + place_6[3] + h
    query_mn, key_mn = places(i, j, static)
    inner_mn = (place_6[4] + query_mn) * static.keys + place_6[5] + key_mn
    kept_mn = keep_at((first, second), static.rate, outer, inner_mn)
    return jnp.where(kept_mn, x_mn / (1 - static.rate), 0.0)


def bounds(b, i, first_BI, end_BI, static: Static):
    """The first block of keys that block i of the queries may see, and the one after the last."""
    n, m, (_, J) = static.n, static.m, static.blocks
    low: Any = 0
    high: Any = J
    if static.causal:
        high = jnp.minimum(high, over(i * n + n - 1, m) + 1)
    if static.window is not None:
        low = over(jnp.maximum(i * n - static.window + 1, 0), m)
        high = jnp.minimum(high, over(i * n + n + static.window - 2, m) + 1)
    if static.segments:
        low, high = jnp.maximum(low, first_BI[b, i]), jnp.minimum(high, end_BI[b, i])
    return low, high


def over(position, block: int):
    """The block of a position; `//` would also ask for signs, which Mosaic cannot do everywhere."""
    return jax.lax.div(position, jnp.int32(block))


def spans(q_segments_BT, kv_segments_BS, static: Static) -> tuple[Array, Array]:
    """int32 [B, I]: what the segments alone leave of the blocks of keys; first, and after last."""
    _, J = static.blocks
    q_BIn = pad(q_segments_BT, 1, static.n).reshape(q_segments_BT.shape[0], -1, static.n)
    kv_BJm = pad(kv_segments_BS, 1, static.m).reshape(kv_segments_BS.shape[0], -1, static.m)
    highest = jnp.iinfo(jnp.int32).max
    low_BI, low_BJ = (jnp.where(s > 0, s, highest).min(-1) for s in (q_BIn, kv_BJm))
    seen_BIJ = (low_BI[..., None] <= kv_BJm.max(-1)[:, None]) & (
        low_BJ[:, None] <= q_BIn.max(-1)[..., None]
    )
    blocks_11J = jnp.arange(J, dtype=jnp.int32)[None, None]
    first_BI = jnp.where(seen_BIJ, blocks_11J, J).min(-1)
    return first_BI, jnp.where(seen_BIJ, blocks_11J + 1, 0).max(-1)


def pad(x: Array, axis: int, block: int) -> Array:
    """Zeros behind an axis, to whole blocks."""
    short = -x.shape[axis] % block
    widths = [(0, short if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths) if short else x

"""One block of `blockwise`: how arrays are cut, which blocks there are, and the scores in one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.attention.dropout import keep_at
from jaxformer.attention.extras import NOTHING, Extras
from jaxformer.attention.mask import Mask

BLOCK_Q, BLOCK_K = 512, 512
"""Most positions of a block: products of smaller ones reach less of a CPU's peak."""

HEADS = 2
"""Heads of queries in a block: more would not fit the caches of a core."""


class Row(NamedTuple):
    """P heads of keys and values in one row of a batch, and the R heads of queries of each, cut.

    Queries are scaled already; segments are None where the mask has none.
    """

    b: Array
    g: Array  # the first of the heads of keys and values
    q_IPRnK: Array
    k_JPmK: Array
    v_JPmK: Array
    q_segments_In: Array | None
    kv_segments_Jm: Array | None
    kv_length: Array  # S before padding


def cut(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Mask) -> Row:
    """All rows of a batch, cut into blocks; every leaf has C = B G / P in front."""
    (B, T), (S, G) = q_BTHK.shape[:2], k_BSGK.shape[1:3]
    P = _heads(q_BTHK.shape[2], G)
    n, m = _size(T, BLOCK_Q), _size(S, BLOCK_K)
    scaled = q_BTHK * jnp.asarray(q_BTHK.shape[-1] ** -0.5, q_BTHK.dtype)
    keys, values = (_cut_heads(x, G, P, m).squeeze(3) for x in (k_BSGK, v_BSGK))
    q_segments, kv_segments = (
        None if x is None else jnp.repeat(_padded(x, size).reshape(B, -1, size), G // P, 0)
        for x, size in ((mask.q_segments_BT, n), (mask.kv_segments_BS, m))
    )
    b, g = jnp.repeat(jnp.arange(B), G // P), jnp.tile(jnp.arange(0, G, P), B)
    length = jnp.full(B * G // P, S)
    return Row(b, g, query_blocks(scaled, G), keys, values, q_segments, kv_segments, length)


def query_blocks(x_BTHK: Array, G: int) -> Array:
    """Blocks of queries, [C, I, P, R, n, K], with C = B G / P."""
    _, T, H, _ = x_BTHK.shape
    return _cut_heads(x_BTHK, G, _heads(H, G), _size(T, BLOCK_Q))


def _cut_heads(x_BTHK: Array, G: int, P: int, n: int) -> Array:
    B, _, H, K = x_BTHK.shape
    x_BInGPRK = _padded(x_BTHK, n).reshape(B, -1, n, G // P, P, H // G, K)
    x_BGIPRnK = jnp.transpose(x_BInGPRK, (0, 3, 1, 4, 5, 2, 6))
    return x_BGIPRnK.reshape(B * G // P, *x_BGIPRnK.shape[2:])


def joined(x_CIPRnK: Array, B: int, T: int) -> Array:
    """[B, T, H, K], out of blocks."""
    C, I, P, R, n, K = x_CIPRnK.shape
    x_BGIPRnK = x_CIPRnK.reshape(B, C // B, I, P, R, n, K)
    return jnp.transpose(x_BGIPRnK, (0, 2, 5, 1, 3, 4, 6)).reshape(B, I * n, -1, K)[:, :T]


def _heads(H: int, G: int) -> int:
    """Heads of keys and values at a time; those of queries that share one stay together."""
    return HEADS if H == G and G % HEADS == 0 else 1


def _size(length: int, most: int) -> int:
    """Of blocks that are alike, so that the last is not mostly padding."""
    each = -(-length // -(-length // most))
    return min(-(-each // 16) * 16, most, length)


def _padded(x: Array, block: int) -> Array:
    """Zeros behind the second axis, to whole blocks."""
    short = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, short), *((0, 0) for _ in x.shape[2:])]) if short else x


def spans(row: Row, mask: Mask, extras: Extras) -> tuple[Array, Array]:
    """For each block of queries the first block of keys it may see, and the one after the last."""
    I, J = row.q_IPRnK.shape[0], row.k_JPmK.shape[0]
    n, m = row.q_IPRnK.shape[-2], row.k_JPmK.shape[-2]
    seen_IJ = jnp.ones((I, J), bool)
    if row.q_segments_In is not None and row.kv_segments_Jm is not None:
        q_In, kv_Jm = row.q_segments_In, row.kv_segments_Jm
        highest = jnp.iinfo(jnp.int32).max
        low_I, low_J = (jnp.where(s > 0, s, highest).min(1) for s in (q_In, kv_Jm))
        seen_IJ = (low_I[:, None] <= kv_Jm.max(1)[None]) & (low_J[None] <= q_In.max(1)[:, None])
    _, _, query, key = extras.first
    start_I1, start_1J = (query + jnp.arange(I) * n)[:, None], (key + jnp.arange(J) * m)[None]
    if mask.causal:
        seen_IJ &= start_I1 + n - 1 >= start_1J
    if mask.window is not None:
        seen_IJ &= start_I1 - (start_1J + m - 1) < mask.window
        seen_IJ &= start_1J - (start_I1 + n - 1) < mask.window
    first_I = jnp.where(seen_IJ, jnp.arange(J)[None], J).min(1)
    end_I = jnp.where(seen_IJ, jnp.arange(J)[None] + 1, 0).max(1)
    return first_I.astype(jnp.int32), end_I.astype(jnp.int32)


def product(formula: str, a: Array, b: Array) -> Array:
    """An einsum that adds up in float32."""
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def scores(
    q_PRnK: Array, row: Row, i: Array, j: Array, mask: Mask, extras: Extras, bias_PRnS: Array | None
) -> tuple[Array, Array | None]:
    """Scores of one block of queries for one of keys; NOTHING where the mask forbids.

    Also the slope of the soft cap there, None without one.
    """
    scores_PRnm = product("prnk,pmk->prnm", q_PRnK, row.k_JPmK[j])
    P, R, n, m = scores_PRnm.shape
    slope_PRnm = None
    if extras.soft_cap is not None:
        part_PRnm = jnp.tanh(scores_PRnm / extras.soft_cap)
        scores_PRnm, slope_PRnm = extras.soft_cap * part_PRnm, 1 - jnp.square(part_PRnm)
    if bias_PRnS is not None:
        scores_PRnm += jax.lax.dynamic_slice_in_dim(bias_PRnS, j * m, m, 3)
    query_n1, key_1m = _places(i, j, n, m)
    _, _, first_query, first_key = extras.first
    distance_nm = (first_query + query_n1) - (first_key + key_1m)
    if extras.slopes_H is not None:
        slopes_PR = jax.lax.dynamic_slice_in_dim(extras.slopes_H.reshape(-1, R), row.g, P)
        scores_PRnm -= slopes_PR[..., None, None] * abs(distance_nm).astype(jnp.float32)[None, None]
    allowed_nm = key_1m < row.kv_length
    if row.q_segments_In is not None and row.kv_segments_Jm is not None:
        q_segments_n1 = row.q_segments_In[i][:, None]
        allowed_nm = (q_segments_n1 == row.kv_segments_Jm[j][None]) & (q_segments_n1 != 0)
    if mask.causal:
        allowed_nm &= distance_nm >= 0
    if mask.window is not None:
        allowed_nm &= abs(distance_nm) < mask.window
    return jnp.where(allowed_nm, scores_PRnm, NOTHING), slope_PRnm


def added_bias(bias_BHTS: Array | None, row: Row, i: Array) -> Array | None:
    """The bias of one block of queries, [P, R, n, J m]; None without one."""
    if bias_BHTS is None:
        return None
    (_, P, R, n, _), (J, _, m, _) = row.q_IPRnK.shape, row.k_JPmK.shape
    (rows, _, T, S) = bias_BHTS.shape
    queries_n = jnp.minimum(i * n + jnp.arange(n), T - 1)
    bias_HnS = bias_BHTS[row.b % rows, heads_of(row)[:, None], queries_n].astype(jnp.float32)
    bias_HnS = jnp.pad(bias_HnS, ((0, 0), (0, 0), (0, J * m - S)))
    return bias_HnS.reshape(P, R, n, J * m)


def heads_of(row: Row) -> Array:
    """The heads of queries in a row, [P R]."""
    _, P, R, _, _ = row.q_IPRnK.shape
    return row.g * R + jnp.arange(P * R)


def dropped(x_PRnm: Array, row: Row, i: Array, j: Array, extras: Extras) -> Array:
    """Dropout with the bits that the whole picture [B, H, T, S] would have in this block."""
    if extras.words_2 is None:
        return x_PRnm
    first_row, first_head, first_query, first_key = extras.first
    outer_H = (first_row + row.b) * extras.heads + first_head + heads_of(row)
    n, m = x_PRnm.shape[2:]
    query_n1, key_1m = _places(i, j, n, m)
    inner_nm = (first_query + query_n1) * extras.keys + (first_key + key_1m)
    words = (extras.words_2[0], extras.words_2[1])
    kept_Hnm = keep_at(words, extras.rate, outer_H[:, None, None], inner_nm[None])
    return jnp.where(kept_Hnm.reshape(x_PRnm.shape), x_PRnm / (1 - extras.rate), 0.0)


def _places(i: Array, j: Array, n: int, m: int) -> tuple[Array, Array]:
    """The queries [n, 1] and the keys [1, m] of a block, in the arrays of this call."""
    return (i * n + jnp.arange(n))[:, None], (j * m + jnp.arange(m))[None]

"""One block of `blockwise`: how arrays are cut, which blocks there are, and the scores in one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.attention.dropout import keep_at
from jaxformer.attention.extras import NOTHING, Extras
from jaxformer.attention.mask import Mask

BLOCK_Q, BLOCK_K = 256, 512
"""Positions of a block: the fastest of nine pairs at S 1,024 and 2,048 on a CPU of 2 cores."""


class Row(NamedTuple):
    """One row of a batch, cut: queries [I, G, R, n, K], keys and values [J, G, m, K].

    Queries are scaled already; segments are None where the mask has none.
    """

    b: Array
    q_IGRnK: Array
    k_JGmK: Array
    v_JGmK: Array
    q_segments_In: Array | None
    kv_segments_Jm: Array | None
    kv_length: Array  # S before padding


def cut(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Mask) -> Row:
    """All rows of a batch, cut into blocks; every leaf has the batch in front."""
    (B, T), (S, G) = q_BTHK.shape[:2], k_BSGK.shape[1:3]
    n, m = min(BLOCK_Q, T), min(BLOCK_K, S)
    scaled = q_BTHK * jnp.asarray(q_BTHK.shape[-1] ** -0.5, q_BTHK.dtype)
    keys, values = (
        jnp.moveaxis(_padded(x, m).reshape(B, -1, m, G, x.shape[-1]), 3, 2)
        for x in (k_BSGK, v_BSGK)
    )
    q_segments, kv_segments = mask.q_segments_BT, mask.kv_segments_BS
    return Row(
        jnp.arange(B),
        query_blocks(scaled, G),
        keys,
        values,
        None if q_segments is None else _padded(q_segments, n).reshape(B, -1, n),
        None if kv_segments is None else _padded(kv_segments, m).reshape(B, -1, m),
        jnp.full(B, S),
    )


def query_blocks(x_BTHK: Array, G: int) -> Array:
    """[B, I, G, R, n, K]."""
    B, T, H, K = x_BTHK.shape
    n = min(BLOCK_Q, T)
    x_BInGRK = _padded(x_BTHK, n).reshape(B, -1, n, G, H // G, K)
    return jnp.transpose(x_BInGRK, (0, 1, 3, 4, 2, 5))


def joined(x_BIGRnK: Array, T: int) -> Array:
    """[B, T, H, K], out of blocks."""
    B, I, G, R, n, K = x_BIGRnK.shape
    return jnp.transpose(x_BIGRnK, (0, 1, 4, 2, 3, 5)).reshape(B, I * n, G * R, K)[:, :T]


def _padded(x: Array, block: int) -> Array:
    """Zeros behind the second axis, to whole blocks."""
    short = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, short), *((0, 0) for _ in x.shape[2:])]) if short else x


def spans(row: Row, mask: Mask, extras: Extras) -> tuple[Array, Array]:
    """For each block of queries the first block of keys it may see, and the one after the last."""
    I, J = row.q_IGRnK.shape[0], row.k_JGmK.shape[0]
    n, m = row.q_IGRnK.shape[-2], row.k_JGmK.shape[-2]
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
    q_GRnK: Array, row: Row, i: Array, j: Array, mask: Mask, extras: Extras, bias_GRnS: Array | None
) -> tuple[Array, Array | None]:
    """Scores of one block of queries for one of keys; NOTHING where the mask forbids.

    Also the slope of the soft cap there, None without one.
    """
    scores_GRnm = product("grnk,gmk->grnm", q_GRnK, row.k_JGmK[j])
    G, R, n, m = scores_GRnm.shape
    slope_GRnm = None
    if extras.soft_cap is not None:
        part_GRnm = jnp.tanh(scores_GRnm / extras.soft_cap)
        scores_GRnm, slope_GRnm = extras.soft_cap * part_GRnm, 1 - jnp.square(part_GRnm)
    if bias_GRnS is not None:
        scores_GRnm += jax.lax.dynamic_slice_in_dim(bias_GRnS, j * m, m, 3)
    query_n1, key_1m = _places(i, j, n, m)
    _, _, first_query, first_key = extras.first
    distance_nm = (first_query + query_n1) - (first_key + key_1m)
    if extras.slopes_H is not None:
        slopes_GR11 = extras.slopes_H.reshape(G, R, 1, 1)
        scores_GRnm -= slopes_GR11 * abs(distance_nm).astype(jnp.float32)[None, None]
    allowed_nm = key_1m < row.kv_length
    if row.q_segments_In is not None and row.kv_segments_Jm is not None:
        q_segments_n1 = row.q_segments_In[i][:, None]
        allowed_nm = (q_segments_n1 == row.kv_segments_Jm[j][None]) & (q_segments_n1 != 0)
    if mask.causal:
        allowed_nm &= distance_nm >= 0
    if mask.window is not None:
        allowed_nm &= abs(distance_nm) < mask.window
    return jnp.where(allowed_nm, scores_GRnm, NOTHING), slope_GRnm


def added_bias(bias_BHTS: Array | None, row: Row, i: Array) -> Array | None:
    """The bias of one block of queries, [G, R, n, J m]; None without one."""
    if bias_BHTS is None:
        return None
    (_, G, R, n, _), (J, _, m, _) = row.q_IGRnK.shape, row.k_JGmK.shape
    (rows, _, T, S) = bias_BHTS.shape
    queries_n = jnp.minimum(i * n + jnp.arange(n), T - 1)
    bias_nHS = bias_BHTS[row.b % rows, :, queries_n].astype(jnp.float32)
    bias_nHS = jnp.pad(bias_nHS, ((0, 0), (0, 0), (0, J * m - S)))
    return bias_nHS.swapaxes(0, 1).reshape(G, R, n, J * m)


def dropped(x_GRnm: Array, row: Row, i: Array, j: Array, extras: Extras) -> Array:
    """Dropout with the bits that the whole picture [B, H, T, S] would have in this block."""
    if extras.words_2 is None:
        return x_GRnm
    G, R, n, m = x_GRnm.shape
    first_row, first_head, first_query, first_key = extras.first
    outer_H = (first_row + row.b) * extras.heads + first_head + jnp.arange(G * R)
    query_n1, key_1m = _places(i, j, n, m)
    inner_nm = (first_query + query_n1) * extras.keys + (first_key + key_1m)
    words = (extras.words_2[0], extras.words_2[1])
    kept_Hnm = keep_at(words, extras.rate, outer_H[:, None, None], inner_nm[None])
    return jnp.where(kept_Hnm.reshape(G, R, n, m), x_GRnm / (1 - extras.rate), 0.0)


def _places(i: Array, j: Array, n: int, m: int) -> tuple[Array, Array]:
    """The queries [n, 1] and the keys [1, m] of a block, in the arrays of this call."""
    return (i * n + jnp.arange(n))[:, None], (j * m + jnp.arange(m))[None]

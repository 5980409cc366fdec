"""Attention in blocks with an online softmax, in plain `lax`: memory grows with T + S, not T x S.

Dao et al. (2022), "FlashAttention", algorithms 1 and 4; the online softmax is that of Milakov &
Gimelshein (2018). One loop walks the rows of the batch, one the blocks of queries, one the blocks
of keys that mask and segments leave; what they rule out is never computed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.attention.dropout import keep_at, words_of
from jaxformer.attention.mask import Mask

BLOCK_Q, BLOCK_K = 256, 256
"""Positions of a block: a picture of all heads of it stays in the second-level cache."""

MASKED = -1e30


def blockwise(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: Mask,
    *,
    bias: Array | None = None,
    dropout: tuple[float, Array] | None = None,
) -> Array:
    """Attention of any length in memory linear in it, forward and backward."""
    if bias is not None:
        raise NotImplementedError("blockwise attention has no bias")
    rate, key = dropout if dropout is not None else (0.0, None)
    static = _Static(mask.causal, mask.window, rate)
    return _attend(q_BTHK, k_BSGK, v_BSGK, mask.q_segments_BT, mask.kv_segments_BS, key, static)


class _Static(NamedTuple):
    causal: bool
    window: int | None
    rate: float


class _Blocks(NamedTuple):
    """One row of a batch, cut: queries [I, G, R, n, K], keys and values [J, G, m, K]."""

    q_IGRnK: Array
    k_JGmK: Array
    v_JGmK: Array
    q_segments_In: Array
    kv_segments_Jm: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_BTHK, k_BSGK, v_BSGK, q_segments_BT, kv_segments_BS, key, static):
    return _forward(q_BTHK, k_BSGK, v_BSGK, q_segments_BT, kv_segments_BS, key, static)[0]


def _forward(q_BTHK, k_BSGK, v_BSGK, q_segments_BT, kv_segments_BS, key, static):
    B, T, H, _ = q_BTHK.shape
    S = k_BSGK.shape[1]

    def row(arguments):
        b, blocks = arguments
        first_I, end_I = _spans(blocks, static)

        def query_block(i):
            q_GRnK = _scaled(blocks.q_IGRnK[i])

            def key_block(j, carry):
                top_GRn, total_GRn, out_GRnK = carry
                scores_GRnm = _scores(q_GRnK, blocks, i, j, static)
                new_GRn = jnp.maximum(top_GRn, scores_GRnm.max(-1))
                exp_GRnm = jnp.exp(scores_GRnm - new_GRn[..., None])
                shrink_GRn = jnp.exp(top_GRn - new_GRn)
                total_GRn = total_GRn * shrink_GRn + exp_GRnm.sum(-1)
                kept_GRnm = _dropped(exp_GRnm, key, b, i, j, H, S, static.rate)
                more_GRnK = jnp.einsum(
                    "grnm,gmk->grnk",
                    kept_GRnm.astype(v_BSGK.dtype),
                    blocks.v_JGmK[j],
                    preferred_element_type=jnp.float32,
                )
                return new_GRn, total_GRn, out_GRnK * shrink_GRn[..., None] + more_GRnK

            shape = q_GRnK.shape
            # Against a floor above MASKED, a row with nothing to look at sums to zero.
            start = (
                jnp.full(shape[:-1], MASKED / 2),
                jnp.zeros(shape[:-1]),
                jnp.zeros(shape, jnp.float32),
            )
            top_GRn, total_GRn, out_GRnK = jax.lax.fori_loop(first_I[i], end_I[i], key_block, start)
            total_GRn = jnp.maximum(total_GRn, 1e-30)
            return (out_GRnK / total_GRn[..., None]).astype(v_BSGK.dtype), top_GRn + jnp.log(
                total_GRn
            )

        return jax.lax.map(query_block, jnp.arange(blocks.q_IGRnK.shape[0]))

    cut = _cut(q_BTHK, k_BSGK, v_BSGK, q_segments_BT, kv_segments_BS)
    out_BIGRnK, lse_BIGRn = jax.lax.map(row, (jnp.arange(B), cut))
    out_BTHK = _joined(out_BIGRnK, T)
    saved = (q_BTHK, k_BSGK, v_BSGK, q_segments_BT, kv_segments_BS, key, out_BTHK, lse_BIGRn)
    return out_BTHK, saved


def _backward(static, saved, out_grad_BTHK):
    q_BTHK, k_BSGK, v_BSGK, q_segments_BT, kv_segments_BS, key, out_BTHK, lse_BIGRn = saved
    B, T, H, K = q_BTHK.shape
    S = k_BSGK.shape[1]
    scale = K**-0.5
    # The inner product of each weight's gradient with the weights, without either of them.
    inner_BTH = (out_BTHK.astype(jnp.float32) * out_grad_BTHK.astype(jnp.float32)).sum(-1)
    cut = _cut(q_BTHK, k_BSGK, v_BSGK, q_segments_BT, kv_segments_BS)
    grads = _query_blocks(out_grad_BTHK.astype(v_BSGK.dtype), k_BSGK.shape[2])
    inner = _query_blocks(inner_BTH[..., None], k_BSGK.shape[2])[..., 0]

    def row(arguments):
        b, blocks, out_grad_IGRnK, inner_IGRn, lse_IGRn = arguments
        first_I, end_I = _spans(blocks, static)

        def query_block(carry, i):
            q_GRnK = _scaled(blocks.q_IGRnK[i])
            out_grad_GRnK = out_grad_IGRnK[i]

            def key_block(j, carry):
                q_grad_GRnK, k_grad_JGmK, v_grad_JGmK = carry
                scores_GRnm = _scores(q_GRnK, blocks, i, j, static)
                weights_GRnm = jnp.exp(scores_GRnm - lse_IGRn[i][..., None])
                kept_GRnm = _dropped(weights_GRnm, key, b, i, j, H, S, static.rate)
                kept_GRnm = kept_GRnm.astype(v_BSGK.dtype)
                v_grad_GmK = _product("grnm,grnk->gmk", kept_GRnm, out_grad_GRnK)
                weight_grad_GRnm = _product("grnk,gmk->grnm", out_grad_GRnK, blocks.v_JGmK[j])
                weight_grad_GRnm = _dropped(weight_grad_GRnm, key, b, i, j, H, S, static.rate)
                score_grad_GRnm = weights_GRnm * (weight_grad_GRnm - inner_IGRn[i][..., None])
                score_grad_GRnm = score_grad_GRnm.astype(q_BTHK.dtype)
                k_grad_GmK = _product("grnm,grnk->gmk", score_grad_GRnm, q_GRnK)
                q_grad_GRnK += _product("grnm,gmk->grnk", score_grad_GRnm, blocks.k_JGmK[j])
                return (
                    q_grad_GRnK,
                    k_grad_JGmK.at[j].add(k_grad_GmK),
                    v_grad_JGmK.at[j].add(v_grad_GmK),
                )

            start = (jnp.zeros(q_GRnK.shape, jnp.float32), *carry)
            q_grad_GRnK, *carry = jax.lax.fori_loop(first_I[i], end_I[i], key_block, start)
            return tuple(carry), (q_grad_GRnK * scale).astype(q_BTHK.dtype)

        zeros_JGmK = jnp.zeros(blocks.k_JGmK.shape, jnp.float32)
        (k_grad, v_grad), q_grad = jax.lax.scan(
            query_block, (zeros_JGmK, zeros_JGmK), jnp.arange(blocks.q_IGRnK.shape[0])
        )
        return q_grad, k_grad.astype(k_BSGK.dtype), v_grad.astype(v_BSGK.dtype)

    q_grad, k_grad, v_grad = jax.lax.map(row, (jnp.arange(B), cut, grads, inner, lse_BIGRn))
    k_grad, v_grad = (jnp.moveaxis(g, 2, 3) for g in (k_grad, v_grad))  # [B, J, m, G, K]
    k_grad, v_grad = (g.reshape(B, -1, *g.shape[3:])[:, :S] for g in (k_grad, v_grad))
    return _joined(q_grad, T), k_grad, v_grad, None, None, None


_attend.defvjp(_forward, _backward)


def _product(formula: str, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _scaled(q_GRnK: Array) -> Array:
    return q_GRnK * jnp.asarray(q_GRnK.shape[-1] ** -0.5, q_GRnK.dtype)


def _scores(q_GRnK: Array, blocks: _Blocks, i: Array, j: Array, static: _Static) -> Array:
    """Scores of one block of queries for one of keys; MASKED where the mask forbids."""
    scores_GRnm = _product("grnk,gmk->grnm", q_GRnK, blocks.k_JGmK[j])
    n, m = scores_GRnm.shape[-2:]
    q_segments_n1 = blocks.q_segments_In[i][:, None]
    allowed_nm = (q_segments_n1 == blocks.kv_segments_Jm[j][None]) & (q_segments_n1 != 0)
    distance_nm = (i * n + jnp.arange(n))[:, None] - (j * m + jnp.arange(m))[None]
    if static.causal:
        allowed_nm &= distance_nm >= 0
    if static.window is not None:
        allowed_nm &= abs(distance_nm) < static.window
    return jnp.where(allowed_nm, scores_GRnm, MASKED)


def _dropped(x_GRnm, key, b, i, j, H, S, rate):
    """Dropout with the bits that the whole picture [B, H, T, S] would have in this block."""
    if not rate:
        return x_GRnm
    G, R, n, m = x_GRnm.shape
    head_H = b * H + jnp.arange(H)
    place_nm = (i * n + jnp.arange(n))[:, None] * S + (j * m + jnp.arange(m))[None]
    kept_Hnm = keep_at(words_of(key), rate, head_H[:, None, None], place_nm[None])
    return jnp.where(kept_Hnm.reshape(G, R, n, m), x_GRnm / (1 - rate), 0.0)


def _spans(blocks: _Blocks, static: _Static) -> tuple[Array, Array]:
    """For each block of queries the first block of keys it may see, and the one after the last."""
    q_In, kv_Jm = blocks.q_segments_In, blocks.kv_segments_Jm
    (I, n), (J, m) = q_In.shape, kv_Jm.shape
    highest = jnp.iinfo(jnp.int32).max
    low_I, low_J = (jnp.where(s > 0, s, highest).min(1) for s in (q_In, kv_Jm))
    seen_IJ = (low_I[:, None] <= kv_Jm.max(1)[None]) & (low_J[None] <= q_In.max(1)[:, None])
    start_I1, start_1J = (jnp.arange(I) * n)[:, None], (jnp.arange(J) * m)[None]
    if static.causal:
        seen_IJ &= start_I1 + n - 1 >= start_1J
    if static.window is not None:
        seen_IJ &= start_I1 - (start_1J + m - 1) < static.window
        seen_IJ &= start_1J - (start_I1 + n - 1) < static.window
    first_I = jnp.where(seen_IJ, jnp.arange(J)[None], J).min(1)
    end_I = jnp.where(seen_IJ, jnp.arange(J)[None] + 1, 0).max(1)
    return first_I.astype(jnp.int32), end_I.astype(jnp.int32)


def _cut(q_BTHK, k_BSGK, v_BSGK, q_segments_BT, kv_segments_BS) -> _Blocks:
    B, T = q_BTHK.shape[:2]
    S, G = k_BSGK.shape[1:3]
    if q_segments_BT is None:
        q_segments_BT, kv_segments_BS = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    n, m = min(BLOCK_Q, T), min(BLOCK_K, S)
    keys, values = (
        jnp.moveaxis(_padded(x, m).reshape(B, -1, m, G, x.shape[-1]), 3, 2)
        for x in (k_BSGK, v_BSGK)
    )
    return _Blocks(
        _query_blocks(q_BTHK, G),
        keys,
        values,
        _padded(q_segments_BT, n).reshape(B, -1, n),
        _padded(kv_segments_BS, m).reshape(B, -1, m),
    )


def _query_blocks(x_BTHK: Array, G: int) -> Array:
    """[B, I, G, R, n, K]."""
    B, T, H, K = x_BTHK.shape
    n = min(BLOCK_Q, T)
    x_BInGRK = _padded(x_BTHK, n).reshape(B, -1, n, G, H // G, K)
    return jnp.transpose(x_BInGRK, (0, 1, 3, 4, 2, 5))


def _joined(x_BIGRnK: Array, T: int) -> Array:
    B, I, G, R, n, K = x_BIGRnK.shape
    return jnp.transpose(x_BIGRnK, (0, 1, 4, 2, 3, 5)).reshape(B, I * n, G * R, K)[:, :T]


def _padded(x: Array, block: int) -> Array:
    """Zeros behind the second axis, to whole blocks."""
    short = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, short), *((0, 0) for _ in x.shape[2:])]) if short else x

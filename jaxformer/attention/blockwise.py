"""Attention in blocks with an online softmax, in plain `lax`: memory grows with T + S, not T x S.

Dao et al. (2022), "FlashAttention", algorithms 1 and 4; the online softmax is that of Milakov &
Gimelshein (2018). One loop walks the rows of the batch, one the blocks of queries, one the blocks
of keys that mask and segments leave; what they rule out is never computed.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.attention.extras import NOTHING, Extras
from jaxformer.attention.lax_blocks import (
    Row,
    added_bias,
    cut,
    dropped,
    joined,
    product,
    query_blocks,
    scores,
    spans,
)
from jaxformer.attention.mask import Mask


def blockwise(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Mask, extras: Extras
) -> tuple[Array, Array]:
    """Attention of any length in memory linear in it, forward and backward.

    A bias is a T x S picture itself, and so is its gradient.
    """
    bias = extras.bias_BHTS
    return _attend(q_BTHK, k_BSGK, v_BSGK, bias, mask, dataclasses.replace(extras, bias_BHTS=None))


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass."""

    q_BTHK: Array
    k_BSGK: Array
    v_BSGK: Array
    bias_BHTS: Array | None
    mask: Mask
    extras: Extras
    out_BTHK: Array
    lse_BIGRn: Array


@jax.custom_vjp
def _attend(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras):
    return _forward(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras)[0]


def _forward(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras):
    T, dtype = q_BTHK.shape[1], v_BSGK.dtype
    rows = cut(q_BTHK, k_BSGK, v_BSGK, mask)

    def one_row(row: Row):
        first_I, end_I = spans(row, mask, extras)

        def query_block(i):
            q_GRnK = row.q_IGRnK[i]
            bias_GRnS = added_bias(bias_BHTS, row, i)

            def key_block(j, carry):
                top_GRn, total_GRn, out_GRnK = carry
                scores_GRnm, _ = scores(q_GRnK, row, i, j, mask, extras, bias_GRnS)
                new_GRn = jnp.maximum(top_GRn, scores_GRnm.max(-1))
                exp_GRnm = jnp.exp(scores_GRnm - new_GRn[..., None])
                shrink_GRn = jnp.exp(top_GRn - new_GRn)
                total_GRn = total_GRn * shrink_GRn + exp_GRnm.sum(-1)
                kept_GRnm = dropped(exp_GRnm, row, i, j, extras).astype(dtype)
                more_GRnK = product("grnm,gmk->grnk", kept_GRnm, row.v_JGmK[j])
                return new_GRn, total_GRn, out_GRnK * shrink_GRn[..., None] + more_GRnK

            shape = q_GRnK.shape
            # Against a floor above NOTHING, a row with nothing to look at sums to zero.
            top_GRn, zeros_GRn = jnp.full(shape[:-1], NOTHING / 2), jnp.zeros(shape[:-1])
            start = (top_GRn, zeros_GRn, jnp.zeros(shape, jnp.float32))
            top_GRn, total_GRn, out_GRnK = jax.lax.fori_loop(first_I[i], end_I[i], key_block, start)
            total_GRn = jnp.maximum(total_GRn, 1e-30)
            return (out_GRnK / total_GRn[..., None]).astype(dtype), top_GRn + jnp.log(total_GRn)

        return jax.lax.map(query_block, jnp.arange(row.q_IGRnK.shape[0]))

    out_BIGRnK, lse_BIGRn = jax.lax.map(one_row, rows)
    out_BTHK = joined(out_BIGRnK, T)
    lse_BHT = joined(lse_BIGRn[..., None], T)[..., 0].swapaxes(1, 2)
    # Saved is the half: there NOTHING less NOTHING would be a weight of 1.
    saved = _Saved(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras, out_BTHK, lse_BIGRn)
    return (out_BTHK, jnp.where(lse_BHT > NOTHING / 4, lse_BHT, NOTHING)), saved


def _backward(saved: _Saved, gradients):
    out_grad_BTHK, lse_grad_BHT = gradients
    q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras, out_BTHK, lse_BIGRn = saved
    (B, T, _, K), (S, G), dtype = q_BTHK.shape, k_BSGK.shape[1:3], v_BSGK.dtype
    # The inner product of each weight's gradient with the weights, without either of them; and the
    # gradient of log-sum-exp for a score is that score's weight.
    inner_BTH = (out_BTHK.astype(jnp.float32) * out_grad_BTHK.astype(jnp.float32)).sum(-1)
    inner_BTH -= lse_grad_BHT.swapaxes(1, 2)
    rows = cut(q_BTHK, k_BSGK, v_BSGK, mask)
    out_grads = query_blocks(out_grad_BTHK.astype(dtype), G)
    inners = query_blocks(inner_BTH[..., None], G)[..., 0]

    def one_row(bias_grad_BHTS, arguments):
        row, out_grad_IGRnK, inner_IGRn, lse_IGRn = arguments
        first_I, end_I = spans(row, mask, extras)

        def query_block(carry, i):
            q_GRnK, out_grad_GRnK = row.q_IGRnK[i], out_grad_IGRnK[i]
            bias_GRnS = added_bias(bias_BHTS, row, i)

            def key_block(j, carry):
                q_grad_GRnK, k_grad_JGmK, v_grad_JGmK, bias_grad_GRnS = carry
                scores_GRnm, slope_GRnm = scores(q_GRnK, row, i, j, mask, extras, bias_GRnS)
                weights_GRnm = jnp.exp(scores_GRnm - lse_IGRn[i][..., None])
                kept_GRnm = dropped(weights_GRnm, row, i, j, extras).astype(dtype)
                v_grad_GmK = product("grnm,grnk->gmk", kept_GRnm, out_grad_GRnK)
                weight_grad_GRnm = product("grnk,gmk->grnm", out_grad_GRnK, row.v_JGmK[j])
                weight_grad_GRnm = dropped(weight_grad_GRnm, row, i, j, extras)
                score_grad_GRnm = weights_GRnm * (weight_grad_GRnm - inner_IGRn[i][..., None])
                if bias_grad_GRnS is not None:
                    at = (0, 0, 0, j * score_grad_GRnm.shape[-1])
                    bias_grad_GRnS = jax.lax.dynamic_update_slice(
                        bias_grad_GRnS, score_grad_GRnm, at
                    )
                if slope_GRnm is not None:
                    score_grad_GRnm *= slope_GRnm
                score_grad_GRnm = score_grad_GRnm.astype(dtype)
                k_grad_GmK = product("grnm,grnk->gmk", score_grad_GRnm, q_GRnK)
                q_grad_GRnK += product("grnm,gmk->grnk", score_grad_GRnm, row.k_JGmK[j])
                k_grad_JGmK = k_grad_JGmK.at[j].add(k_grad_GmK)
                v_grad_JGmK = v_grad_JGmK.at[j].add(v_grad_GmK)
                return q_grad_GRnK, k_grad_JGmK, v_grad_JGmK, bias_grad_GRnS

            k_grad_JGmK, v_grad_JGmK, bias_grad_BHTS = carry
            bias_grad_GRnS = None if bias_GRnS is None else jnp.zeros_like(bias_GRnS)
            zeros_GRnK = jnp.zeros(q_GRnK.shape, jnp.float32)
            start = (zeros_GRnK, k_grad_JGmK, v_grad_JGmK, bias_grad_GRnS)
            q_grad_GRnK, k_grad_JGmK, v_grad_JGmK, bias_grad_GRnS = jax.lax.fori_loop(
                first_I[i], end_I[i], key_block, start
            )
            if bias_grad_GRnS is not None:
                bias_grad_BHTS = _with_block(bias_grad_BHTS, bias_grad_GRnS, row, i)
            q_grad_GRnK = (q_grad_GRnK * K**-0.5).astype(q_BTHK.dtype)
            return (k_grad_JGmK, v_grad_JGmK, bias_grad_BHTS), q_grad_GRnK

        zeros_JGmK = jnp.zeros(row.k_JGmK.shape, jnp.float32)
        start = (zeros_JGmK, zeros_JGmK, bias_grad_BHTS)
        (k_grad, v_grad, bias_grad_BHTS), q_grad = jax.lax.scan(
            query_block, start, jnp.arange(row.q_IGRnK.shape[0])
        )
        return bias_grad_BHTS, (q_grad, k_grad.astype(k_BSGK.dtype), v_grad.astype(dtype))

    start = None if bias_BHTS is None else jnp.zeros(bias_BHTS.shape, jnp.float32)
    bias_grad_BHTS, (q_grad, k_grad, v_grad) = jax.lax.scan(
        one_row, start, (rows, out_grads, inners, lse_BIGRn)
    )
    k_grad, v_grad = (jnp.moveaxis(g, 2, 3) for g in (k_grad, v_grad))  # [B, J, m, G, K]
    k_grad, v_grad = (g.reshape(B, -1, *g.shape[3:])[:, :S] for g in (k_grad, v_grad))
    if bias_BHTS is None or bias_grad_BHTS is None:
        bias_grad = None
    else:
        bias_grad = bias_grad_BHTS.astype(bias_BHTS.dtype)
    return joined(q_grad, T), k_grad, v_grad, bias_grad, None, None


def _with_block(bias_grad_BHTS, bias_grad_GRnS, row: Row, i):
    """The gradient of the bias with that of one block of queries added."""
    rows, S = bias_grad_BHTS.shape[0], bias_grad_BHTS.shape[3]
    G, R, n, _ = bias_grad_GRnS.shape
    queries_n = i * n + jnp.arange(n)  # those behind T are dropped by the scatter
    more_HnS = bias_grad_GRnS.reshape(G * R, n, -1)[:, :, :S]
    return bias_grad_BHTS.at[row.b % rows, :, queries_n].add(more_HnS.swapaxes(0, 1), mode="drop")


_attend.defvjp(_forward, _backward)

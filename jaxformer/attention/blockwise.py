"""Attention in blocks with an online softmax, in plain `lax`: memory grows with T + S, not T x S.

Dao et al. (2022), "FlashAttention", algorithms 1 and 4; the online softmax is that of Milakov &
Gimelshein (2018). One loop walks the rows of the batch and a few heads at a time, one the blocks of
queries, one the blocks of keys that mask and segments leave; what they rule out is never computed.
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
    heads_of,
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
    lse_CIPRn: Array


@jax.custom_vjp
def _attend(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras):
    return _forward(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras)[0]


def _forward(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras):
    (B, T), dtype = q_BTHK.shape[:2], v_BSGK.dtype
    rows = cut(q_BTHK, k_BSGK, v_BSGK, mask)

    def one_row(row: Row):
        first_I, end_I = spans(row, mask, extras)

        def query_block(i):
            q_PRnK = row.q_IPRnK[i]
            bias_PRnS = added_bias(bias_BHTS, row, i)

            def key_block(j, carry):
                top_PRn, total_PRn, out_PRnK = carry
                scores_PRnm, _ = scores(q_PRnK, row, i, j, mask, extras, bias_PRnS)
                new_PRn = jnp.maximum(top_PRn, scores_PRnm.max(-1))
                exp_PRnm = jnp.exp(scores_PRnm - new_PRn[..., None])
                shrink_PRn = jnp.exp(top_PRn - new_PRn)
                total_PRn = total_PRn * shrink_PRn + exp_PRnm.sum(-1)
                kept_PRnm = dropped(exp_PRnm, row, i, j, extras).astype(dtype)
                more_PRnK = product("prnm,pmk->prnk", kept_PRnm, row.v_JPmK[j])
                return new_PRn, total_PRn, out_PRnK * shrink_PRn[..., None] + more_PRnK

            shape = q_PRnK.shape
            # Against a floor above NOTHING, a row with nothing to look at sums to zero.
            top_PRn, zeros_PRn = jnp.full(shape[:-1], NOTHING / 2), jnp.zeros(shape[:-1])
            start = (top_PRn, zeros_PRn, jnp.zeros(shape, jnp.float32))
            top_PRn, total_PRn, out_PRnK = jax.lax.fori_loop(first_I[i], end_I[i], key_block, start)
            total_PRn = jnp.maximum(total_PRn, 1e-30)
            return (out_PRnK / total_PRn[..., None]).astype(dtype), top_PRn + jnp.log(total_PRn)

        return jax.lax.map(query_block, jnp.arange(row.q_IPRnK.shape[0]))

    out_CIPRnK, lse_CIPRn = jax.lax.map(one_row, rows)
    out_BTHK = joined(out_CIPRnK, B, T)
    lse_BHT = joined(lse_CIPRn[..., None], B, T)[..., 0].swapaxes(1, 2)
    # Saved is the half: there NOTHING less NOTHING would be a weight of 1.
    saved = _Saved(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras, out_BTHK, lse_CIPRn)
    return (out_BTHK, jnp.where(lse_BHT > NOTHING / 4, lse_BHT, NOTHING)), saved


def _backward(saved: _Saved, gradients):
    out_grad_BTHK, lse_grad_BHT = gradients
    q_BTHK, k_BSGK, v_BSGK, bias_BHTS, mask, extras, out_BTHK, lse_CIPRn = saved
    (B, T, _, K), (S, G), dtype = q_BTHK.shape, k_BSGK.shape[1:3], v_BSGK.dtype
    # The inner product of each weight's gradient with the weights, without either of them; and the
    # gradient of log-sum-exp for a score is that score's weight.
    inner_BTH = (out_BTHK.astype(jnp.float32) * out_grad_BTHK.astype(jnp.float32)).sum(-1)
    inner_BTH -= lse_grad_BHT.swapaxes(1, 2)
    rows = cut(q_BTHK, k_BSGK, v_BSGK, mask)
    out_grads = query_blocks(out_grad_BTHK.astype(dtype), G)
    inners = query_blocks(inner_BTH[..., None], G)[..., 0]

    def one_row(bias_grad_BHTS, arguments):
        row, out_grad_IPRnK, inner_IPRn, lse_IPRn = arguments
        first_I, end_I = spans(row, mask, extras)

        def query_block(carry, i):
            q_PRnK, out_grad_PRnK = row.q_IPRnK[i], out_grad_IPRnK[i]
            # XLA:CPU takes 2.6 times as long for a product over the first axis of weights [n, m]
            # from the right as for one from the left, where these are turned once.
            q_PKRn, out_grad_PKRn = jax.lax.optimization_barrier(
                tuple(jnp.moveaxis(x, -1, 1) for x in (q_PRnK, out_grad_PRnK))
            )
            bias_PRnS = added_bias(bias_BHTS, row, i)

            def key_block(j, carry):
                q_grad_PRnK, k_grad_JPKm, v_grad_JPKm, bias_grad_PRnS = carry
                scores_PRnm, slope_PRnm = scores(q_PRnK, row, i, j, mask, extras, bias_PRnS)
                weights_PRnm = jnp.exp(scores_PRnm - lse_IPRn[i][..., None])
                kept_PRnm = dropped(weights_PRnm, row, i, j, extras).astype(dtype)
                v_grad_PKm = product("pkrn,prnm->pkm", out_grad_PKRn, kept_PRnm)
                weight_grad_PRnm = product("prnk,pmk->prnm", out_grad_PRnK, row.v_JPmK[j])
                weight_grad_PRnm = dropped(weight_grad_PRnm, row, i, j, extras)
                score_grad_PRnm = weights_PRnm * (weight_grad_PRnm - inner_IPRn[i][..., None])
                if bias_grad_PRnS is not None:
                    at = (0, 0, 0, j * score_grad_PRnm.shape[-1])
                    bias_grad_PRnS = jax.lax.dynamic_update_slice(
                        bias_grad_PRnS, score_grad_PRnm, at
                    )
                if slope_PRnm is not None:
                    score_grad_PRnm *= slope_PRnm
                score_grad_PRnm = score_grad_PRnm.astype(dtype)
                k_grad_PKm = product("pkrn,prnm->pkm", q_PKRn, score_grad_PRnm)
                q_grad_PRnK += product("prnm,pmk->prnk", score_grad_PRnm, row.k_JPmK[j])
                k_grad_JPKm = k_grad_JPKm.at[j].add(k_grad_PKm)
                v_grad_JPKm = v_grad_JPKm.at[j].add(v_grad_PKm)
                return q_grad_PRnK, k_grad_JPKm, v_grad_JPKm, bias_grad_PRnS

            k_grad_JPKm, v_grad_JPKm, bias_grad_BHTS = carry
            bias_grad_PRnS = None if bias_PRnS is None else jnp.zeros_like(bias_PRnS)
            zeros_PRnK = jnp.zeros(q_PRnK.shape, jnp.float32)
            start = (zeros_PRnK, k_grad_JPKm, v_grad_JPKm, bias_grad_PRnS)
            q_grad_PRnK, k_grad_JPKm, v_grad_JPKm, bias_grad_PRnS = jax.lax.fori_loop(
                first_I[i], end_I[i], key_block, start
            )
            if bias_grad_PRnS is not None:
                bias_grad_BHTS = _with_block(bias_grad_BHTS, bias_grad_PRnS, row, i)
            q_grad_PRnK = (q_grad_PRnK * K**-0.5).astype(q_BTHK.dtype)
            return (k_grad_JPKm, v_grad_JPKm, bias_grad_BHTS), q_grad_PRnK

        zeros_JPKm = jnp.zeros(row.k_JPmK.swapaxes(2, 3).shape, jnp.float32)
        start = (zeros_JPKm, zeros_JPKm, bias_grad_BHTS)
        (k_grad, v_grad, bias_grad_BHTS), q_grad = jax.lax.scan(
            query_block, start, jnp.arange(row.q_IPRnK.shape[0])
        )
        return bias_grad_BHTS, (q_grad, k_grad.astype(k_BSGK.dtype), v_grad.astype(dtype))

    start = None if bias_BHTS is None else jnp.zeros(bias_BHTS.shape, jnp.float32)
    bias_grad_BHTS, (q_grad, k_grad, v_grad) = jax.lax.scan(
        one_row, start, (rows, out_grads, inners, lse_CIPRn)
    )
    # From [C, J, P, K, m].
    k_grad, v_grad = (joined(jnp.swapaxes(g, 3, 4)[:, :, :, None], B, S) for g in (k_grad, v_grad))
    if bias_BHTS is None or bias_grad_BHTS is None:
        bias_grad = None
    else:
        bias_grad = bias_grad_BHTS.astype(bias_BHTS.dtype)
    return joined(q_grad, B, T), k_grad, v_grad, bias_grad, None, None


def _with_block(bias_grad_BHTS, bias_grad_PRnS, row: Row, i):
    """The gradient of the bias with that of one block of queries added."""
    rows, S = bias_grad_BHTS.shape[0], bias_grad_BHTS.shape[3]
    P, R, n, _ = bias_grad_PRnS.shape
    queries_n = i * n + jnp.arange(n)  # those behind T are dropped by the scatter
    more_HnS = bias_grad_PRnS.reshape(P * R, n, -1)[:, :, :S]
    at = row.b % rows, heads_of(row)[:, None], queries_n
    return bias_grad_BHTS.at[at].add(more_HnS, mode="drop")


_attend.defvjp(_forward, _backward)

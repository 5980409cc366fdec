"""Flash attention for TPU in Pallas.

Dao et al. (2022), "FlashAttention". Scores are kept transposed, [keys, queries]: the running
maximum and sum of a query then lie along lanes, so that reducing over keys adds vector registers to
each other, and spreading a statistic over keys repeats a sublane. The backward pass is one kernel:
the gradient of the queries of one head stays in VMEM while the blocks of keys go by.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.attention.extras import NOTHING, Extras
from jaxformer.attention.mask import Mask
from jaxformer.attention.platform import platform
from jaxformer.attention.tpu_blocks import (
    Static,
    bounds,
    dropped,
    masked,
    over,
    pad,
    product,
    spans,
)

BLOCK_Q, BLOCK_K = 512, 512
LANES = 128
INTERPRET: Any = True
"""How the kernels run where there is no TPU; `pltpu.InterpretParams` looks for races."""


def pallas_tpu(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Mask, extras: Extras
) -> tuple[Array, Array]:
    """Attention of any length and head size; on other machines than a TPU it is interpreted."""
    extras.refuse("pallas_tpu", "a bias", "ALiBi", "a soft cap")
    if extras.shifted and (mask.causal or mask.window is not None):
        raise NotImplementedError("pallas_tpu attention counts places from the start of the rows")
    (B, T), S = q_BTHK.shape[:2], k_BSGK.shape[1]
    static = Static(
        mask.causal,
        mask.window,
        extras.rate,
        mask.q_segments_BT is not None,
        T,
        S,
        extras.heads,
        extras.keys,
        min(BLOCK_Q, pl.cdiv(T, LANES) * LANES),
        min(BLOCK_K, pl.cdiv(S, LANES) * LANES),
        platform() != "tpu" and INTERPRET,
    )
    q_segments_BT, kv_segments_BS = mask.q_segments_BT, mask.kv_segments_BS
    if q_segments_BT is None or kv_segments_BS is None:
        q_segments_BT, kv_segments_BS = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    words_2 = jnp.zeros(2, jnp.uint32) if extras.words_2 is None else extras.words_2
    place_6 = jnp.concatenate([jax.lax.bitcast_convert_type(words_2, jnp.int32), extras.first])
    q_BHTK, k_BGSK, v_BGSK = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    scaled = q_BHTK * jnp.asarray(q_BHTK.shape[-1] ** -0.5, q_BHTK.dtype)
    out_BHTK, lse_BHT = _attend(
        scaled, k_BGSK, v_BGSK, q_segments_BT, kv_segments_BS, place_6, static
    )
    return jnp.swapaxes(out_BHTK, 1, 2), lse_BHT


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_BHTK, k_BGSK, v_BGSK, q_segments_BT, kv_segments_BS, place_6, static):
    return _forward(q_BHTK, k_BGSK, v_BGSK, q_segments_BT, kv_segments_BS, place_6, static)[0]


def _forward(q_BHTK, k_BGSK, v_BGSK, q_segments_BT, kv_segments_BS, place_6, static: Static):
    """The output and what the backward pass needs; log-sum-exp float32 [B, H, 1, T]."""
    B, H, T, K = q_BHTK.shape
    R = H // k_BGSK.shape[1]
    n, m, (I, J) = static.n, static.m, static.blocks
    segment_spans = spans(q_segments_BT, kv_segments_BS, static)

    def keys(b, h, i, j, first, end, place_6):
        """The block to hold; blocks that are not computed are not fetched either."""
        low, high = bounds(b, i, first, end, static)
        held = jnp.minimum(jnp.maximum(j, low), jnp.maximum(high - 1, 0))
        return b, over(h, R), held, 0

    def across(b, h, i, j, *scalars):
        b, g, j, _ = keys(b, h, i, j, *scalars)
        return b, g, 0, j

    rows = [
        pl.BlockSpec((None, None, n, K), lambda b, h, i, j, *_: (b, h, i, 0)),
        pl.BlockSpec((None, None, m, K), keys),
        pl.BlockSpec((None, None, K, m), across),
        pl.BlockSpec((None, 1, n), lambda b, h, i, j, *_: (b, 0, i)),
        pl.BlockSpec((None, m, 1), lambda *a: (a[0], keys(*a)[2], 0)),
    ]
    out_BHTK, lse_BH1T = pl.pallas_call(
        functools.partial(_forward_kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, I, J),
            in_specs=rows,
            out_specs=[
                pl.BlockSpec((None, None, n, K), lambda b, h, i, j, *_: (b, h, i, 0)),
                pl.BlockSpec((None, None, 1, n), lambda b, h, i, j, *_: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, n), jnp.float32),
                pltpu.VMEM((1, n), jnp.float32),
                pltpu.VMEM((K, n), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, I * n, K), v_BGSK.dtype),
            jax.ShapeDtypeStruct((B, H, 1, I * n), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=static.interpret,
        name="flash_attention",
    )(
        *segment_spans,
        place_6,
        pad(q_BHTK, 2, n),
        pad(k_BGSK, 2, m),
        jnp.swapaxes(pad(v_BGSK, 2, m), 2, 3),
        pad(q_segments_BT, 1, n)[:, None],
        pad(kv_segments_BS, 1, m)[..., None],
    )
    out_BHTK = out_BHTK[:, :, :T]
    saved = (q_BHTK, k_BGSK, v_BGSK, q_segments_BT, kv_segments_BS, place_6, out_BHTK, lse_BH1T)
    lse_BHT = lse_BH1T[:, :, 0, :T]
    # The backward pass keeps the half: there NOTHING less NOTHING would be a weight of 1.
    return (out_BHTK, jnp.where(lse_BHT > NOTHING / 4, lse_BHT, NOTHING)), saved


def _forward_kernel(
    first_BI,
    end_BI,
    place_6,
    q_nK,
    k_mK,
    v_Km,
    q_segments_1n,
    kv_segments_m1,
    out_nK,
    lse_1n,
    top_1n,
    total_1n,
    out_Kn,
    *,
    static,
):
    b, h, i, j = (pl.program_id(axis) for axis in range(4))

    @pl.when(j == 0)
    def _():
        # Against a floor above NOTHING, a query with nothing to look at sums to zero.
        top_1n[...] = jnp.full(top_1n.shape, NOTHING / 2, jnp.float32)
        total_1n[...] = jnp.zeros(total_1n.shape, jnp.float32)
        out_Kn[...] = jnp.zeros(out_Kn.shape, jnp.float32)

    low, high = bounds(b, i, first_BI, end_BI, static)

    @pl.when((low <= j) & (j < high))
    def _():
        scores_mn = product(k_mK[...], q_nK[...], 1, 1)
        scores_mn = masked(scores_mn, q_segments_1n, kv_segments_m1, i, j, static)
        before_1n = top_1n[...]
        now_1n = jnp.maximum(before_1n, scores_mn.max(0, keepdims=True))
        exp_mn = jnp.exp(scores_mn - now_1n)
        shrink_1n = jnp.exp(before_1n - now_1n)
        top_1n[...] = now_1n
        total_1n[...] = total_1n[...] * shrink_1n + exp_mn.sum(0, keepdims=True)
        kept_mn = dropped(exp_mn, place_6, b, h, i, j, static)
        more_Kn = product(v_Km[...], kept_mn.astype(v_Km.dtype), 1, 0)
        out_Kn[...] = out_Kn[...] * shrink_1n + more_Kn

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        whole_1n = jnp.maximum(total_1n[...], 1e-30)
        out_nK[...] = (out_Kn[...] / whole_1n).T.astype(out_nK.dtype)
        lse_1n[...] = top_1n[...] + jnp.log(whole_1n)


def _backward(static: Static, saved, gradients):
    q_BHTK, k_BGSK, v_BGSK, q_segments_BT, kv_segments_BS, place_6, out_BHTK, lse_BH1T = saved
    out_grad_BHTK, lse_grad_BHT = gradients
    B, H, T, K = q_BHTK.shape
    S, G = k_BGSK.shape[2], k_BGSK.shape[1]
    R = H // G
    n, m, (I, J) = static.n, static.m, static.blocks
    inner_BHT = (out_BHTK.astype(jnp.float32) * out_grad_BHTK.astype(jnp.float32)).sum(-1)
    inner_BHT -= lse_grad_BHT  # the gradient of log-sum-exp for a score is that score's weight
    segment_spans = spans(q_segments_BT, kv_segments_BS, static)

    def query(j, i):
        """The block to hold: before the first that sees these keys, that one already."""
        return jnp.minimum(jnp.maximum(i, over(j * m, n)), I - 1) if static.causal else i

    q_rows = pl.BlockSpec((None, None, n, K), lambda b, h, j, i, *_: (b, h, query(j, i), 0))
    k_rows = pl.BlockSpec((None, None, m, K), lambda b, h, j, i, *_: (b, over(h, R), j, 0))
    across = pl.BlockSpec((None, None, 1, n), lambda b, h, j, i, *_: (b, h, 0, query(j, i)))
    q_segments = pl.BlockSpec((None, 1, n), lambda b, h, j, i, *_: (b, 0, query(j, i)))
    kv_segments = pl.BlockSpec((None, m, 1), lambda b, h, j, i, *_: (b, j, 0))
    kv_grads = pl.BlockSpec((None, None, m, K), lambda b, h, j, i, *_: (b, h, j, 0))
    # Written in the pass of the last keys; until then one block is held.
    q_grads = pl.BlockSpec(
        (None, None, n, K), lambda b, h, j, i, *_: (b, h, jnp.where(j == J - 1, i, 0), 0)
    )
    q_grad, k_grad, v_grad = pl.pallas_call(
        functools.partial(_backward_kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, J, I),
            in_specs=[
                *(q_rows, k_rows, k_rows, q_segments, kv_segments),
                *(q_rows, across, across),
            ],
            out_specs=[q_grads, kv_grads, kv_grads],
            scratch_shapes=[
                pltpu.VMEM((I, n, K), jnp.float32),
                pltpu.VMEM((m, K), jnp.float32),
                pltpu.VMEM((m, K), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, I * n, K), q_BHTK.dtype),
            jax.ShapeDtypeStruct((B, H, J * m, K), jnp.float32 if R > 1 else k_BGSK.dtype),
            jax.ShapeDtypeStruct((B, H, J * m, K), jnp.float32 if R > 1 else v_BGSK.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=static.interpret,
        name="flash_attention_backward",
    )(
        *segment_spans,
        place_6,
        pad(q_BHTK, 2, n),
        pad(k_BGSK, 2, m),
        pad(v_BGSK, 2, m),
        pad(q_segments_BT, 1, n)[:, None],
        pad(kv_segments_BS, 1, m)[..., None],
        pad(out_grad_BHTK.astype(v_BGSK.dtype), 2, n),
        lse_BH1T,
        pad(inner_BHT, 2, n)[:, :, None],
    )
    k_grad, v_grad = (
        g[:, :, :S].reshape(B, G, R, S, K).sum(2).astype(x.dtype)
        for g, x in ((k_grad, k_BGSK), (v_grad, v_BGSK))
    )
    return q_grad[:, :, :T], k_grad, v_grad, None, None, None


def _backward_kernel(
    first_BI,
    end_BI,
    place_6,
    q_nK,
    k_mK,
    v_mK,
    q_segments_1n,
    kv_segments_m1,
    out_grad_nK,
    lse_1n,
    inner_1n,
    q_grad_nK,
    k_grad_mK,
    v_grad_mK,
    q_sum_InK,
    k_sum_mK,
    v_sum_mK,
    *,
    static,
):
    b, h, j, i = (pl.program_id(axis) for axis in range(4))

    @pl.when(j == 0)
    def _():
        q_sum_InK[i] = jnp.zeros(q_sum_InK.shape[1:], jnp.float32)

    @pl.when(i == 0)
    def _():
        k_sum_mK[...] = jnp.zeros(k_sum_mK.shape, jnp.float32)
        v_sum_mK[...] = jnp.zeros(v_sum_mK.shape, jnp.float32)

    low, high = bounds(b, i, first_BI, end_BI, static)

    @pl.when((low <= j) & (j < high))
    def _():
        scores_mn = product(k_mK[...], q_nK[...], 1, 1)
        scores_mn = masked(scores_mn, q_segments_1n, kv_segments_m1, i, j, static)
        weights_mn = jnp.exp(scores_mn - lse_1n[...])
        kept_mn = dropped(weights_mn, place_6, b, h, i, j, static)
        v_sum_mK[...] += product(kept_mn.astype(v_mK.dtype), out_grad_nK[...], 1, 0)
        weight_grad_mn = product(v_mK[...], out_grad_nK[...], 1, 1)
        weight_grad_mn = dropped(weight_grad_mn, place_6, b, h, i, j, static)
        score_grad_mn = weights_mn * (weight_grad_mn - inner_1n[...])
        score_grad_mn = score_grad_mn.astype(q_nK.dtype)
        k_sum_mK[...] += product(score_grad_mn, q_nK[...], 1, 0)
        q_sum_InK[i] += product(score_grad_mn, k_mK[...], 0, 0)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        k_grad_mK[...] = k_sum_mK[...].astype(k_grad_mK.dtype)
        v_grad_mK[...] = v_sum_mK[...].astype(v_grad_mK.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        q_grad_nK[...] = q_sum_InK[i].astype(q_grad_nK.dtype)


_attend.defvjp(_forward, _backward)

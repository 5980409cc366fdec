"""The backward pass of flash attention on Hopper GPUs: one kernel holds queries, one holds keys.

Dao et al. (2022), "FlashAttention", algorithm 4. Weights are computed again from the log-sum-exp.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer.attention.gpu_blocks import (
    HELD,
    ROWS,
    SLOTS,
    WORKERS,
    Places,
    Static,
    add_product,
    along,
    bounds,
    fetch,
    fetch_keys,
    hold,
    kept,
    kernel,
    key_slots,
    marked,
    masked,
    matrices,
    outer,
    reach,
    release,
    score_gradient,
    slot_of,
    spans,
    vector,
    vectors,
    zeros,
)

BLOCK_K = 128
"""Keys of a block that streams by a block of queries."""
BLOCK_Q = {32: 128, 64: 128, 128: 64}
"""By head size: queries of a block that streams by a block of keys."""


def query_gradients(
    q_BTHK, k_BSGK, v_BSGK, out_grad_BTHK, lse_BHT, inner_BHT, places, static: Static
) -> Array:
    """The gradient of the queries; of padded arrays, `inner` is out times its gradient summed."""
    (B, T, H, K), dtype = q_BTHK.shape, q_BTHK.dtype
    (q_grad_BTHK,) = kernel(
        _queries_kernel,
        (H, T // HELD, B),
        [jax.ShapeDtypeStruct(q_BTHK.shape, dtype)],
        [
            *[matrices(WORKERS, ROWS, K, dtype)] * 2,
            *[vectors(WORKERS, ROWS)] * 2,
            vectors(WORKERS, ROWS, jnp.int32),
            *key_slots(K, dtype, BLOCK_K, static),
            plgpu.Barrier(num_arrivals=4 + static.segments, num_barriers=WORKERS),
        ],
        static,
    )(
        q_BTHK, k_BSGK, v_BSGK, out_grad_BTHK, lse_BHT, inner_BHT, *places,
        spans(places[0], places[1], BLOCK_K, static),
    )  # fmt: skip
    return q_grad_BTHK


def _queries_kernel(
    q_BTHK, k_BSGK, v_BSGK, out_grad_BTHK, lse_BHT, inner_BHT, q_ids_BT, kv_ids_BS,
    words_2, origin_4, span_2BI, q_grad_BTHK,
    q_wnK, out_grad_wnK, lse_wn, inner_wn, ids_wn, k_slots, v_slots, ids_slots,
    k_ready, v_ready, k_free, v_free, ready,
    *, static,
):  # fmt: skip
    h, i, b, w = (jax.lax.axis_index(name) for name in ("head", "block", "row", "warpgroup"))
    i = q_BTHK.shape[1] // HELD - 1 - i  # the last queries see most: they begin first
    block = k_slots.shape[1]
    span = (span_2BI[0, b, i], span_2BI[1, b, i]) if static.segments else None
    low, high = bounds(i * HELD, HELD, block, *reach(static), span, k_BSGK.shape[1] // block)

    @pl.when(w == WORKERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        g = jax.lax.div(h, jnp.int32(q_BTHK.shape[2] // k_BSGK.shape[2]))
        fetch_keys(
            low, high, (k_BSGK.at[b, :, g], v_BSGK.at[b, :, g], kv_ids_BS.at[b]),
            (k_slots, v_slots, ids_slots), (k_ready, v_ready), (k_free, v_free), static,
        )  # fmt: skip

    @pl.when(w < WORKERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first = i * HELD + w * ROWS
        queries = pl.ds(first, ROWS)
        copies = [
            (q_BTHK.at[b, queries, h], q_wnK),
            (out_grad_BTHK.at[b, queries, h], out_grad_wnK),
            (lse_BHT.at[b, h, queries], lse_wn),
            (inner_BHT.at[b, h, queries], inner_wn),
        ]
        hold(copies, (q_ids_BT.at[b, queries], ids_wn), w, ready, static)
        lse_n, inner_n = (vector(x.at[w][...], 0, static) for x in (lse_wn, inner_wn))
        q_ids_n = vector(ids_wn.at[w][...], 0, static) if static.segments else None

        def add_block(j, q_grad_nK):
            slot = slot_of(j - low)
            places = Places(first, j * block, 0)
            plgpu.barrier_wait(k_ready.at[slot])
            scores_nm = outer(q_wnK.at[w], k_slots.at[slot], static)
            ids = (q_ids_n, vector(ids_slots.at[slot][...], 1, static)) if static.segments else None
            scores_nm = masked(scores_nm, places, ids, static)
            weights_nm = jnp.exp2(scores_nm * static.scale - along(lse_n, 0, scores_nm.shape))
            marked_nm = marked(weights_nm, places, b, h, words_2, origin_4, static)
            plgpu.barrier_wait(v_ready.at[slot])
            grad_nm = outer(out_grad_wnK.at[w], v_slots.at[slot], static)
            release(v_free.at[slot], static)
            inner_nm = along(inner_n, 0, grad_nm.shape)
            grad_nm = score_gradient(marked_nm, grad_nm, inner_nm, static)
            q_grad_nK = add_product(q_grad_nK, grad_nm, k_slots.at[slot], static)
            release(k_free.at[slot], static)
            return q_grad_nK

        q_grad_nK = jax.lax.fori_loop(low, high, add_block, zeros(q_wnK.shape[1:], static))
        q_wnK.at[w][...] = (q_grad_nK * static.root).astype(q_wnK.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_wnK.at[w], q_grad_BTHK.at[b, queries, h])
        plgpu.wait_smem_to_gmem(0)


def key_gradients(
    q_BTHK, k_BSGK, v_BSGK, out_grad_BTHK, lse_BHT, inner_BHT, places, static: Static
) -> tuple[Array, Array]:
    """The gradients of keys and values."""
    (B, S, G, K), dtype = k_BSGK.shape, k_BSGK.dtype
    block = ROWS if static.rate else BLOCK_Q[K]  # bits of dropout need registers too
    k_grad_BSGK, v_grad_BSGK = kernel(
        _keys_kernel,
        (G, S // HELD, B),
        [jax.ShapeDtypeStruct(k_BSGK.shape, dtype)] * 2,
        [
            *[matrices(WORKERS, ROWS, K, dtype)] * 2,
            vectors(WORKERS, ROWS, jnp.int32),
            *[matrices(SLOTS, block, K, dtype)] * 2,
            *[vectors(SLOTS, block)] * 2,
            vectors(SLOTS, block, jnp.int32),
            plgpu.Barrier(num_arrivals=2 + static.segments, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            *[plgpu.Barrier(num_arrivals=WORKERS, num_barriers=SLOTS)] * 2,
            plgpu.Barrier(num_arrivals=2 + static.segments, num_barriers=WORKERS),
        ],
        static,
    )(
        q_BTHK, k_BSGK, v_BSGK, out_grad_BTHK, lse_BHT, inner_BHT, *places,
        spans(places[1], places[0], block, static),
    )  # fmt: skip
    return k_grad_BSGK, v_grad_BSGK


def _keys_kernel(
    q_BTHK, k_BSGK, v_BSGK, out_grad_BTHK, lse_BHT, inner_BHT, q_ids_BT, kv_ids_BS,
    words_2, origin_4, span_2BJ, k_grad_BSGK, v_grad_BSGK,
    k_wmK, v_wmK, ids_wm, q_slots, out_grad_slots, lse_slots, inner_slots, ids_slots,
    q_ready, grad_ready, q_free, grad_free, ready,
    *, static,
):  # fmt: skip
    g, j, b, w = (jax.lax.axis_index(name) for name in ("head", "block", "row", "warpgroup"))
    R = q_BTHK.shape[2] // k_BSGK.shape[2]
    block = q_slots.shape[1]
    span = (span_2BJ[0, b, j], span_2BJ[1, b, j]) if static.segments else None
    back, ahead = reach(static)
    low, high = bounds(j * HELD, HELD, block, ahead, back, span, q_BTHK.shape[1] // block)
    many = jnp.maximum(high - low, 0)

    def head_and_block(step):
        """Of the queries that a step takes: one head after the other."""
        r = jax.lax.div(step, many) if R > 1 else 0
        return g * R + r, low + step - r * many

    @pl.when(w == WORKERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, R * many)
        def _(step):
            h, i = head_and_block(step)
            queries = pl.ds(i * block, block)
            q_copies = [
                (q_BTHK.at[b, queries, h], q_slots, q_ready),
                (lse_BHT.at[b, h, queries], lse_slots, q_ready),
            ]
            if static.segments:
                q_copies.append((q_ids_BT.at[b, queries], ids_slots, q_ready))
            grad_copies = [
                (out_grad_BTHK.at[b, queries, h], out_grad_slots, grad_ready),
                (inner_BHT.at[b, h, queries], inner_slots, grad_ready),
            ]
            fetch(step, [(q_free, q_copies), (grad_free, grad_copies)])

    @pl.when(w < WORKERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first = j * HELD + w * ROWS
        keys = pl.ds(first, ROWS)
        copies = [(k_BSGK.at[b, keys, g], k_wmK), (v_BSGK.at[b, keys, g], v_wmK)]
        hold(copies, (kv_ids_BS.at[b, keys], ids_wm), w, ready, static)
        kv_ids_m = vector(ids_wm.at[w][...], 0, static) if static.segments else None

        def add_block(step, sums):
            k_grad_mK, v_grad_mK = sums
            slot = slot_of(step)
            h, i = head_and_block(step)
            places = Places(i * block, first, 1)
            plgpu.barrier_wait(q_ready.at[slot])
            scores_mn = outer(k_wmK.at[w], q_slots.at[slot], static)
            lse_n = vector(lse_slots.at[slot][...], 1, static)
            ids = None
            if static.segments:
                ids = (vector(ids_slots.at[slot][...], 1, static), kv_ids_m)
            scores_mn = masked(scores_mn, places, ids, static)
            weights_mn = jnp.exp2(scores_mn * static.scale - along(lse_n, 1, scores_mn.shape))
            marked_mn = marked(weights_mn, places, b, h, words_2, origin_4, static)
            plgpu.barrier_wait(grad_ready.at[slot])
            kept_mn = kept(marked_mn, static)
            v_grad_mK = add_product(v_grad_mK, kept_mn, out_grad_slots.at[slot], static)
            grad_mn = outer(v_wmK.at[w], out_grad_slots.at[slot], static)
            inner_n = vector(inner_slots.at[slot][...], 1, static)
            release(grad_free.at[slot], static)
            inner_mn = along(inner_n, 1, grad_mn.shape)
            grad_mn = score_gradient(marked_mn, grad_mn, inner_mn, static)
            k_grad_mK = add_product(k_grad_mK, grad_mn, q_slots.at[slot], static)
            release(q_free.at[slot], static)
            return k_grad_mK, v_grad_mK

        start = (zeros(k_wmK.shape[1:], static), zeros(v_wmK.shape[1:], static))
        k_grad_mK, v_grad_mK = jax.lax.fori_loop(0, R * many, add_block, start)
        k_wmK.at[w][...] = (k_grad_mK * static.root).astype(k_wmK.dtype)
        v_wmK.at[w][...] = (v_grad_mK / (1 - static.rate)).astype(v_wmK.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_wmK.at[w], k_grad_BSGK.at[b, keys, g])
        plgpu.copy_smem_to_gmem(v_wmK.at[w], v_grad_BSGK.at[b, keys, g])
        plgpu.wait_smem_to_gmem(0)

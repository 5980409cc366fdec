"""Flash attention for Hopper GPUs in Pallas (Mosaic GPU).

Dao et al. (2022), "FlashAttention"; Shah et al. (2024), "FlashAttention-3". Of the three warpgroups
of a thread block one only fetches: the copy engine (TMA) fills slots in shared memory, and barriers
say which are ready and which are free again. The other two each hold 64 rows and multiply on the
tensor cores (wgmma): scores stay in registers and are a factor of the next product from there.

The backward pass is two kernels, one that holds queries and one that holds keys. One kernel would
do with five products instead of seven, but it would add up the gradient of the queries in an order
that changes from run to run.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer.attention.extras import NOTHING, Extras
from jaxformer.attention.gpu_backward import key_gradients, query_gradients
from jaxformer.attention.gpu_blocks import (
    HELD,
    ROWS,
    WORKERS,
    Places,
    Static,
    add_product,
    along,
    bounds,
    fetch_keys,
    hold,
    kept,
    kernel,
    key_slots,
    marked,
    masked,
    matrices,
    outer,
    pad,
    reach,
    release,
    slot_of,
    spans,
    vector,
    vectors,
    zeros,
)
from jaxformer.attention.mask import Mask
from jaxformer.attention.platform import device_kind, platform

BLOCK = 128
"""Keys of a block that streams by a block of queries."""
SIZES = (32, 64, 128)
"""Of heads; others are padded to the next one."""
BLIND = -1e20
"""What the backward pass gets as log-sum-exp of a query that sees nothing: low for a score, and yet
so far above a masked one that the weight is zero."""
HOPPER = re.compile(r"\bG?H(100|20|200|800)\b")
"""In the names of GPUs that have wgmma."""
LOG2_E = math.log2(math.e)
INTERPRET: Any = getattr(plgpu, "InterpretGPUParams", lambda: None)()
"""How the kernels run where there is no GPU; None where this JAX cannot."""


def pallas_gpu(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Mask, extras: Extras
) -> tuple[Array, Array]:
    """Attention of any length in bfloat16; on other machines than a GPU it is interpreted.

    Raises:
      NotImplementedError: a bias, ALiBi, a soft cap; another type than bfloat16; heads larger than
        128; neither a Hopper GPU nor a JAX that interprets GPU kernels.
    """
    (B, T), S, K = q_BTHK.shape[:2], k_BSGK.shape[1], q_BTHK.shape[-1]
    _refuse(q_BTHK, k_BSGK, v_BSGK, mask, extras)
    segments = mask.q_segments_BT is not None
    static = Static(
        causal=mask.causal,
        window=mask.window,
        rate=extras.rate,
        segments=segments,
        T=T,
        S=S,
        scale=LOG2_E * K**-0.5,
        root=K**-0.5,
        heads=extras.heads,
        keys=extras.keys,
        interpret=False if platform() in ("gpu", "cuda") else INTERPRET,
    )
    nobody = jnp.zeros((B, HELD), jnp.int32)
    q_segments_BT = nobody if mask.q_segments_BT is None else mask.q_segments_BT
    kv_segments_BS = nobody if mask.kv_segments_BS is None else mask.kv_segments_BS
    words_2 = jnp.zeros(2, jnp.uint32) if extras.words_2 is None else extras.words_2
    size = min(size for size in SIZES if size >= K)
    q_BTHK, k_BSGK, v_BSGK = (pad(pad(x, 1, HELD), 3, size) for x in (q_BTHK, k_BSGK, v_BSGK))
    q_segments_BT, kv_segments_BS = (pad(x, 1, HELD) for x in (q_segments_BT, kv_segments_BS))
    places = (q_segments_BT, kv_segments_BS, words_2, extras.first)
    out_BTHK, lse_BHT = _attend(q_BTHK, k_BSGK, v_BSGK, places, static)
    return out_BTHK[:, :T, :, :K], lse_BHT[:, :, :T]


def _refuse(q_BTHK, k_BSGK, v_BSGK, mask: Mask, extras: Extras) -> None:
    extras.refuse("pallas_gpu", "a bias", "ALiBi", "a soft cap")
    if extras.shifted and (mask.causal or mask.window is not None):
        raise NotImplementedError("pallas_gpu attention counts places from the start of the rows")
    for x in (q_BTHK, k_BSGK, v_BSGK):
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(
                f"pallas_gpu attention has no {x.dtype}: tensor cores would round it; use bfloat16"
            )
    if q_BTHK.shape[-1] > SIZES[-1]:
        raise NotImplementedError(
            f"pallas_gpu attention has no heads of {q_BTHK.shape[-1]}: beyond {SIZES[-1]} "
            "the sums of the backward pass do not fit into registers"
        )
    if platform() in ("gpu", "cuda"):
        if not HOPPER.search(device_kind()):
            raise NotImplementedError(
                "pallas_gpu attention needs the wgmma of a Hopper GPU (H100, H200), "
                f"not {device_kind()}"
            )
    elif INTERPRET is None:
        raise NotImplementedError(
            "pallas_gpu attention needs a GPU, or JAX 0.12 to be interpreted without one, "
            f"not {jax.__version__}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BTHK, k_BSGK, v_BSGK, places, static):
    return _forward(q_BTHK, k_BSGK, v_BSGK, places, static)[0]


def _forward(q_BTHK, k_BSGK, v_BSGK, places, static: Static):
    """The output, log-sum-exp [B, H, T], and what the backward pass needs; of padded arrays."""
    (B, T, H, K), dtype = q_BTHK.shape, q_BTHK.dtype
    out_BTHK, lse_BHT = kernel(
        _forward_kernel,
        (H, T // HELD, B),
        [jax.ShapeDtypeStruct(q_BTHK.shape, dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
        [
            matrices(WORKERS, ROWS, K, dtype),
            vectors(WORKERS, ROWS),
            vectors(WORKERS, ROWS, jnp.int32),
            *key_slots(K, dtype, BLOCK, static),
            plgpu.Barrier(num_arrivals=1 + static.segments, num_barriers=WORKERS),
        ],
        static,
    )(q_BTHK, k_BSGK, v_BSGK, *places, spans(places[0], places[1], BLOCK, static))
    saved = (q_BTHK, k_BSGK, v_BSGK, places, out_BTHK, lse_BHT)
    # The backward pass keeps the other: there NOTHING less NOTHING would be a weight of 1.
    return (out_BTHK, jnp.where(lse_BHT > BLIND / 2, lse_BHT / LOG2_E, NOTHING)), saved


def _forward_kernel(
    q_BTHK, k_BSGK, v_BSGK, q_ids_BT, kv_ids_BS, words_2, origin_4, span_2BI, out_BTHK, lse_BHT,
    held_wnK, lse_wn, ids_wn, k_slots, v_slots, ids_slots, k_ready, v_ready, k_free, v_free, ready,
    *, static,
):  # fmt: skip
    h, i, b, w = (jax.lax.axis_index(name) for name in ("head", "block", "row", "warpgroup"))
    i = q_BTHK.shape[1] // HELD - 1 - i  # the last queries see most: they begin first
    span = (span_2BI[0, b, i], span_2BI[1, b, i]) if static.segments else None
    J = k_BSGK.shape[1] // BLOCK
    low, high = bounds(i * HELD, HELD, BLOCK, *reach(static), span, J)

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
        hold(
            [(q_BTHK.at[b, queries, h], held_wnK)],
            (q_ids_BT.at[b, queries], ids_wn),
            w,
            ready,
            static,
        )
        q_ids_n = vector(ids_wn.at[w][...], 0, static) if static.segments else None

        def block(j, carry):
            top_n, total_n, out_nK = carry
            slot = slot_of(j - low)
            places = Places(first, j * BLOCK, 0)
            plgpu.barrier_wait(k_ready.at[slot])
            scores_nm = outer(held_wnK.at[w], k_slots.at[slot], static)
            ids = (q_ids_n, vector(ids_slots.at[slot][...], 1, static)) if static.segments else None
            release(k_free.at[slot], static)
            scores_nm = masked(scores_nm, places, ids, static)
            now_n = jnp.maximum(top_n, scores_nm.max(1) * static.scale)
            shrink_n = jnp.exp2(top_n - now_n)
            exp_nm = jnp.exp2(scores_nm * static.scale - along(now_n, 0, scores_nm.shape))
            total_n = total_n * shrink_n + exp_nm.sum(1)
            out_nK = out_nK * along(shrink_n, 0, out_nK.shape)
            kept_nm = kept(marked(exp_nm, places, b, h, words_2, origin_4, static), static)
            plgpu.barrier_wait(v_ready.at[slot])
            out_nK = add_product(out_nK, kept_nm, v_slots.at[slot], static)
            release(v_free.at[slot], static)
            return now_n, total_n, out_nK

        top_n = vector(jnp.full((ROWS,), BLIND, jnp.float32), 0, static)
        total_n = vector(jnp.zeros((ROWS,), jnp.float32), 0, static)
        start = (top_n, total_n, zeros(held_wnK.shape[1:], static))
        top_n, total_n, out_nK = jax.lax.fori_loop(low, high, block, start)
        whole_n = jnp.maximum(total_n, 1e-30)
        out_nK = out_nK / along(whole_n * (1 - static.rate), 0, out_nK.shape)
        held_wnK.at[w][...] = out_nK.astype(held_wnK.dtype)
        lse_wn.at[w][...] = top_n + jnp.log(whole_n) * LOG2_E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(held_wnK.at[w], out_BTHK.at[b, queries, h])
        plgpu.copy_smem_to_gmem(lse_wn.at[w], lse_BHT.at[b, h, queries])
        plgpu.wait_smem_to_gmem(0)


def _backward(static: Static, saved, gradients):
    q_BTHK, k_BSGK, v_BSGK, places, out_BTHK, lse_BHT = saved
    out_grad_BTHK, lse_grad_BHT = gradients
    inner_BTH = (out_BTHK.astype(jnp.float32) * out_grad_BTHK.astype(jnp.float32)).sum(-1)
    # The gradient of a log-sum-exp for a score is that score's weight.
    inner_BHT = inner_BTH.swapaxes(1, 2) - lse_grad_BHT
    arrays = (q_BTHK, k_BSGK, v_BSGK, out_grad_BTHK, lse_BHT, inner_BHT)
    q_grad_BTHK = query_gradients(*arrays, places, static)
    return q_grad_BTHK, *key_gradients(*arrays, places, static), None


_attend.defvjp(_forward, _backward)

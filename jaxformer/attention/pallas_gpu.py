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
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer.attention.extras import NOTHING, Extras
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
    kept,
    masked,
    matrices,
    outer,
    pad,
    reach,
    slot_of,
    spans,
    vector,
    vectors,
    zeros,
)
from jaxformer.attention.mask import Mask
from jaxformer.attention.platform import platform

BLOCK = 128
"""Keys of a block that streams by a block of queries."""
BLOCK_BACK = {32: 128, 64: 128, 128: 64}
"""By head size: queries of a block that streams by a block of keys."""
BLIND = -1e20
"""What the backward pass gets as log-sum-exp of a query that sees nothing: low for a score, and yet
so far above a masked one that the weight is zero."""
LOG2_E = math.log2(math.e)
INTERPRET: Any = getattr(plgpu, "InterpretGPUParams", lambda: None)()
"""How the kernels run where there is no GPU; None where this JAX cannot."""


def pallas_gpu(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Mask, extras: Extras
) -> tuple[Array, Array]:
    """Attention of any length in bfloat16; on other machines than a GPU it is interpreted.

    Raises:
      NotImplementedError: a bias, ALiBi, a soft cap; another type than bfloat16; heads larger than
        128; neither a GPU nor a JAX that interprets GPU kernels.
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
        heads=extras.heads,
        keys=extras.keys,
        interpret=False if platform() in ("gpu", "cuda") else INTERPRET,
    )
    nobody = jnp.zeros((B, HELD), jnp.int32)
    q_segments_BT = mask.q_segments_BT if segments else nobody
    kv_segments_BS = mask.kv_segments_BS if segments else nobody
    words_2 = jnp.zeros(2, jnp.uint32) if extras.words_2 is None else extras.words_2
    size = min(size for size in BLOCK_BACK if size >= K)
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
    if q_BTHK.shape[-1] > max(BLOCK_BACK):
        raise NotImplementedError(
            f"pallas_gpu attention has no heads of {q_BTHK.shape[-1]}: beyond {max(BLOCK_BACK)} "
            "the sums of the backward pass do not fit into registers"
        )
    if platform() not in ("gpu", "cuda") and INTERPRET is None:
        raise NotImplementedError(
            f"pallas_gpu attention needs a GPU, or JAX 0.12 to be interpreted, not {jax.__version__}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BTHK, k_BSGK, v_BSGK, places, static):
    return _forward(q_BTHK, k_BSGK, v_BSGK, places, static)[0]


def _forward(q_BTHK, k_BSGK, v_BSGK, places, static: Static):
    """The output, log-sum-exp [B, H, T], and what the backward pass needs; of padded arrays."""
    (B, T, H, K), dtype = q_BTHK.shape, q_BTHK.dtype
    out_BTHK, lse_BHT = _kernel(
        _forward_kernel,
        (H, T // HELD, B),
        [jax.ShapeDtypeStruct(q_BTHK.shape, dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
        [
            matrices(WORKERS, ROWS, K, dtype),
            vectors(WORKERS, ROWS),
            vectors(WORKERS, ROWS, jnp.int32),
            *_key_slots(K, dtype, static),
            plgpu.Barrier(num_arrivals=1 + static.segments, num_barriers=WORKERS),
        ],
        static,
    )(q_BTHK, k_BSGK, v_BSGK, *places, _spans(*places[:2], BLOCK, static))
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

        @pl.loop(0, high - low)
        def _(step):
            keys = pl.ds((low + step) * BLOCK, BLOCK)
            k_copies = [(k_BSGK.at[b, keys, g], k_slots, k_ready)]
            if static.segments:
                k_copies.append((kv_ids_BS.at[b, keys], ids_slots, k_ready))
            v_copies = [(v_BSGK.at[b, keys, g], v_slots, v_ready)]
            fetch(step, [(k_free, k_copies), (v_free, v_copies)])

    @pl.when(w < WORKERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first = i * HELD + w * ROWS
        queries = pl.ds(first, ROWS)
        plgpu.copy_gmem_to_smem(q_BTHK.at[b, queries, h], held_wnK.at[w], ready.at[w])
        if static.segments:
            plgpu.copy_gmem_to_smem(q_ids_BT.at[b, queries], ids_wn.at[w], ready.at[w])
        plgpu.barrier_wait(ready.at[w])
        q_ids_n = vector(ids_wn.at[w][...], 0, static) if static.segments else None

        def block(j, carry):
            top_n, total_n, out_nK = carry
            slot = slot_of(j - low)
            places = Places(first, j * BLOCK, 0)
            plgpu.barrier_wait(k_ready.at[slot])
            scores_nm = outer(held_wnK.at[w], k_slots.at[slot], static)
            ids = (q_ids_n, vector(ids_slots.at[slot][...], 1, static)) if static.segments else None
            plgpu.barrier_arrive(k_free.at[slot])
            scores_nm = masked(scores_nm, places, ids, static)
            now_n = jnp.maximum(top_n, scores_nm.max(1) * static.scale)
            shrink_n = jnp.exp2(top_n - now_n)
            exp_nm = jnp.exp2(scores_nm * static.scale - along(now_n, 0, scores_nm.shape))
            total_n = total_n * shrink_n + exp_nm.sum(1)
            out_nK = out_nK * along(shrink_n, 0, out_nK.shape)
            kept_nm = kept(exp_nm, places, b, h, words_2, origin_4, static)
            plgpu.barrier_wait(v_ready.at[slot])
            out_nK = add_product(out_nK, kept_nm, v_slots.at[slot], static)
            plgpu.barrier_arrive(v_free.at[slot])
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


def _kernel(body, grid, out_type, scratch, static: Static):
    """A kernel for each (head, block that is held, row of the batch)."""
    return plgpu.kernel(
        functools.partial(body, static=static),
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "block", "row"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": static.interpret} if static.interpret else {}),
        kernel_name=body.__name__.strip("_"),
    )


def _key_slots(K: int, dtype, static: Static):
    """Slots of keys, values and segments of keys; their barriers."""
    return [
        matrices(SLOTS, BLOCK, K, dtype),
        matrices(SLOTS, BLOCK, K, dtype),
        vectors(SLOTS, BLOCK, jnp.int32),
        plgpu.Barrier(num_arrivals=1 + static.segments, num_barriers=SLOTS),
        plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=WORKERS, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=WORKERS, num_barriers=SLOTS),
    ]


def _spans(ids_BT, others_BS, block: int, static: Static) -> Array:
    """What segments leave of the blocks of the others; nothing to read without segments."""
    return spans(ids_BT, others_BS, HELD, block) if static.segments else jnp.zeros((2, 1, 1), jnp.int32)


_attend.defvjp(_forward, lambda static, saved, gradients: None)

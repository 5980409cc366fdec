"""Flash attention for TPU in Pallas: the call, and the forward kernel.

Dao et al. (2022), "FlashAttention". Scores are kept transposed, [keys, queries]: the running
maximum and sum of a query then lie along lanes, so that reducing over keys adds vector registers to
each other, and spreading a statistic over keys repeats a sublane. Scores are exponents of 2, since
that is what the hardware raises; the factor log2(e) / sqrt(K) is on the queries.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.attention import tpu_table
from jaxformer.attention.extras import NOTHING, Extras
from jaxformer.attention.mask import Mask
from jaxformer.attention.platform import device_kind, platform
from jaxformer.attention.tpu_backward import backward
from jaxformer.attention.tpu_blocks import (
    LOG2_E,
    Plan,
    flat,
    key_span,
    over,
    pad,
    plan_of,
    segment_arrays,
    unflat,
)
from jaxformer.attention.tpu_scores import (
    Refs,
    Tile,
    ahead,
    column,
    dropped,
    each,
    each_keys,
    finished,
    head,
    kept,
    one_ahead,
    part,
    pieces,
    product,
    shift_of,
    within,
)

INTERPRET: Any = True
"""How the kernels run where there is no TPU; `pltpu.InterpretParams` looks for races."""


def pallas_tpu(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Mask, extras: Extras
) -> tuple[Array, Array]:
    """Attention of any head size; on other machines than a TPU it is interpreted.

    Memory is linear in the length. A bias is a T x S picture itself, and its gradient B of them.

    Raises:
      NotImplementedError: rows of more queries than the backward pass can keep in VMEM: 40,960 in
        bfloat16 with heads of 128. The number of keys is not bounded.
    """
    interpret = platform() != "tpu" and INTERPRET
    sizes = tpu_table.tiles(
        device_kind(), segments=mask.q_segments_BT is not None, bias=extras.bias_BHTS is not None
    )
    plans = tuple(plan_of(q_BTHK, k_BSGK, mask, extras, tiles, interpret) for tiles in sizes)
    held = plans[1].held(q_BTHK.dtype.itemsize)
    if held > tpu_table.LONGEST:
        raise NotImplementedError(
            f"pallas_tpu attention keeps the queries of a head in VMEM, where {q_BTHK.shape[1]:,} "
            f"take {held / 2**20:.0f} MiB of {tpu_table.LONGEST / 2**20:.0f}"
        )
    scalars = {}
    if extras.rate or extras.shifted or extras.slopes_H is not None:
        words_2 = jnp.zeros(2, jnp.uint32) if extras.words_2 is None else extras.words_2
        words_2 = jax.lax.bitcast_convert_type(words_2, jnp.int32)
        scalars["place_6"] = jnp.concatenate([words_2, extras.first])
    if extras.slopes_H is not None:
        scalars["slopes_H"] = extras.slopes_H
    segments = mask.q_segments_BT, mask.kv_segments_BS
    return _attend(q_BTHK, k_BSGK, v_BSGK, extras.bias_BHTS, segments, scalars, plans)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, segments, scalars, plans):
    out_BTHK, lse_BHT = _run(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, segments, scalars, plans[0])
    return out_BTHK, _said(lse_BHT)


def _forward(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, segments, scalars, plans):
    """The output and the log-sum-exp, and what the backward pass needs."""
    primals = q_BTHK, k_BSGK, v_BSGK, bias_BHTS, segments, scalars
    q_BTHK, k_BSGK, v_BSGK, bias_BHTS, segments, scalars = jax.tree.map(
        lambda primal: primal.value, primals
    )
    out_BTHK, lse_BHT = _run(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, segments, scalars, plans[0])
    saved = q_BTHK, k_BSGK, v_BSGK, bias_BHTS, segments, scalars, out_BTHK, lse_BHT
    return (out_BTHK, _said(lse_BHT)), saved


def _said(lse_BHT: Array) -> Array:
    """NOTHING for what the kernel leaves at the half of it.

    The backward pass keeps the half: there NOTHING less NOTHING would be a weight of 1.
    """
    return jnp.where(lse_BHT > NOTHING / 4, lse_BHT, NOTHING)


def _backward(plans, saved, gradients):
    return (*backward(saved, gradients, plans[1]), None, None)


# Symbolic zeros: the log-sum-exp mostly has no gradient, and then none is read.
_attend.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(q_BTHK, k_BSGK, v_BSGK, bias_BHTS, segments, scalars, plan: Plan) -> tuple[Array, Array]:
    (B, T, H, _), P, W = q_BTHK.shape, plan.packed, plan.width
    (I, J), (Tp, Sp) = plan.blocks, plan.padded
    N, M, X, U = plan.n * plan.q_tiles, plan.m * plan.k_tiles, plan.q_tiles, plan.k_units

    def held(i, j):
        """The block of keys to hold; what is not computed is not fetched either."""
        if J == 1 or plan.shifted:
            return j
        low, _ = key_span(i * X, plan, 0)
        _, high = key_span(i * X + X - 1, plan, 0)
        return jnp.clip(j, over(low, U), over(jnp.maximum(high - 1, 0), U))

    def keys(b, g, i, j, *_):
        return b, held(i, j), over(g, plan.shared)

    q_rows = pl.BlockSpec((None, N, W), lambda b, g, i, j, *_: (b, i, g))
    k_rows = pl.BlockSpec((None, M, W), keys)
    specs = {"q": q_rows, "k": k_rows, "v": k_rows}
    arrays = {"q": flat(q_BTHK, Tp, plan), "k": flat(k_BSGK, Sp, plan), "v": flat(v_BSGK, Sp, plan)}
    if plan.segments:
        more, spans = segment_arrays(segments, plan)
        arrays, scalars = arrays | more, scalars | spans
        specs["q_segments"] = pl.BlockSpec(
            (None, X, 1, plan.n), lambda b, g, i, j, *_: (b, i, 0, 0)
        )
        specs["kv_segments"] = pl.BlockSpec(
            (None, U, 1, plan.m), lambda b, g, i, j, *_: (b, held(i, j), 0, 0)
        )
    if plan.bias:
        rows = bias_BHTS.shape[0]
        arrays["bias"] = pad(pad(bias_BHTS, 2, Tp), 3, Sp)
        specs["bias"] = pl.BlockSpec(
            (None, P, N, M), lambda b, g, i, j, *_: (b if rows > 1 else 0, g, i, held(i, j))
        )
    out_BTD, lse_BH1T = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H // P, I, J),
            in_specs=[specs],
            out_specs=[
                q_rows,
                pl.BlockSpec((None, P, 1, N), lambda b, g, i, j, *_: (b, g, 0, i)),
            ],
            scratch_shapes=[
                {
                    "q": pltpu.VMEM((X, P, plan.n, plan.group), q_BTHK.dtype),
                    "top": pltpu.VMEM((X, P, plan.n), jnp.float32),
                    "total": pltpu.VMEM((X, P, plan.n), jnp.float32),
                    "out": pltpu.VMEM((X, W, plan.n), jnp.float32),
                }
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, Tp, H * plan.K), v_BSGK.dtype),
            jax.ShapeDtypeStruct((B, H, 1, Tp), jnp.float32),
        ],
        compiler_params=plan.parameters("parallel", "arbitrary"),
        interpret=plan.interpret,
        name="flash_attention",
    )(scalars, arrays)
    return unflat(out_BTD, T, plan), lse_BH1T[:, :, 0, :T]


def _kernel(scalars: Refs, refs: Refs, out_NW, lse_P1N, sums: Refs, *, plan: Plan):
    b, g, i_block, j_block = (pl.program_id(axis) for axis in range(4))
    shift = shift_of(scalars, plan)
    top, total, out = sums["top"], sums["total"], sums["out"]

    def queries(x, _):
        i = i_block * plan.q_tiles + x
        rows = within(x, slice(0, plan.n), plan.n, plan.n)

        @pl.when(j_block == 0)
        def begin():
            # Against a floor above NOTHING, a query with nothing to look at sums to zero.
            top[x] = jnp.full(top.shape[1:], NOTHING / 2, jnp.float32)
            total[x] = jnp.zeros(total.shape[1:], jnp.float32)
            out[x] = jnp.zeros(out.shape[1:], jnp.float32)
            for p in range(plan.packed):
                sums["q"][x, p] = head(refs["q"][rows, plan.lanes(p)], p, plan, plan.factor)

        def tile(j, y, masked: bool):
            here = Tile(b, g, i, j, ahead(i, j, shift, plan, masked))
            if plan.segments:
                keys_m1 = column(refs["kv_segments"][y])
                here = here._replace(q_segments_1n=refs["q_segments"][x], kv_segments_m1=keys_m1)
            _look(here, x, y, scalars, refs, sums, plan)

        each_keys(b, i, shift, scalars, j_block, plan, tile)

        @pl.when(j_block == plan.blocks[1] - 1)
        def finish():
            sums_Pn = jnp.maximum(total[x], 1e-30)
            lse_Pn = (top[x] + jnp.log2(sums_Pn)) / LOG2_E
            for p in range(plan.packed):
                own = plan.own(p)
                out[x, own] = out[x, own] / sums_Pn[p : p + 1]
                lse_P1N[p, :, rows] = lse_Pn[p : p + 1]
            out_NW[rows] = out[x].T.astype(out_NW.dtype)

    each(plan.q_tiles, queries)


def _look(tile: Tile, x, y, scalars: Refs, refs: Refs, sums: Refs, plan: Plan) -> None:
    """The online softmax: one tile of keys is added to what its queries have seen so far."""
    top, total, out = sums["top"], sums["total"], sums["out"]

    def scores(piece) -> Array:
        k_mL = refs["k"][within(y, piece.keys, plan.unit, plan.piece_m), plan.lanes(piece.p)]
        return product(k_mL, sums["q"][x, piece.p, piece.queries], 1, 1)

    for piece, scores_mn in one_ahead(pieces(plan, tile.ahead), scores):
        p, columns = slice(piece.p, piece.p + 1), piece.queries
        own = plan.own(piece.p)
        scores_mn, _ = finished(scores_mn, tile, piece, plan, scalars, refs.get("bias"), x, y)
        before_1n = top[x, p, columns]
        now_1n = jnp.maximum(before_1n, scores_mn.max(0, keepdims=True))
        exp_mn = jnp.exp2(scores_mn - now_1n)
        shrink_1n = jnp.exp2(before_1n - now_1n)
        top[x, p, columns] = now_1n
        total[x, p, columns] = total[x, p, columns] * shrink_1n + exp_mn.sum(0, keepdims=True)
        exp_mn = dropped(exp_mn, kept(exp_mn.shape, tile, piece, plan, scalars), plan)
        v_mL = refs["v"][within(y, piece.keys, plan.unit, plan.piece_m), plan.lanes(piece.p)]
        more_Kn = part(product(v_mL, exp_mn.astype(v_mL.dtype), 0, 0), piece.p, plan)
        out[x, own, columns] = out[x, own, columns] * shrink_1n + more_Kn

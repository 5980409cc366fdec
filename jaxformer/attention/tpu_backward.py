"""The backward pass of flash attention for TPU: one kernel for all gradients.

Dao et al. (2022), "FlashAttention", algorithm 4, with scores transposed as in the forward pass.
Blocks of keys go by; the gradient of the queries of a head stays in VMEM meanwhile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.attention.tpu_blocks import (
    LOG2_E,
    Plan,
    flat,
    over,
    pad,
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
    each_queries,
    finished,
    head,
    kept,
    of_block,
    one_ahead,
    part,
    pieces,
    product,
    shift_of,
    within,
)


def backward(saved, gradients, plan: Plan) -> tuple[Array, Array, Array, Array | None]:
    """The gradients for queries, keys, values and bias."""
    q_BTHK, k_BSGK, v_BSGK, bias_BHTS, segments, scalars, out_BTHK, lse_BHT = saved
    out_grad_BTHK, lse_grad_BHT = gradients
    if isinstance(out_grad_BTHK, SymbolicZero):
        out_grad_BTHK = jnp.zeros(out_grad_BTHK.shape, out_grad_BTHK.dtype)
    (B, T, H, _), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    P, W, (I, J), (Tp, Sp) = plan.packed, plan.width, plan.blocks, plan.padded
    N, M, X, U = plan.n * plan.q_tiles, plan.m * plan.k_tiles, plan.q_tiles, plan.k_units

    def statistic(x_BHT):
        """[B, H, 1, T]"""
        return pad(x_BHT, 2, Tp)[:, :, None]

    # Queries are copied in the pass of the first keys, and their gradient goes out in that of the
    # last; in between one block is held.
    def first_pass(j, i):
        return jnp.where(j == 0, i, I - 1)

    def last_pass(j, i):
        return jnp.where(j == J - 1, i, 0)

    q_rows = pl.BlockSpec((None, N, W), lambda b, g, j, i, *_: (b, first_pass(j, i), g))
    k_rows = pl.BlockSpec((None, M, W), lambda b, g, j, i, *_: (b, j, over(g, plan.shared)))
    k_grads = pl.BlockSpec((None, M, W), lambda b, g, j, i, *_: (b, j, g))
    across = pl.BlockSpec((None, P, 1, N), lambda b, g, j, i, *_: (b, g, 0, i))
    specs = {"q": q_rows, "k": k_rows, "v": k_rows, "out": q_rows, "out_grad": q_rows}
    specs["lse"] = across
    arrays = {
        "q": flat(q_BTHK, Tp, plan),
        "k": flat(k_BSGK, Sp, plan),
        "v": flat(v_BSGK, Sp, plan),
        "out_grad": flat(out_grad_BTHK.astype(v_BSGK.dtype), Tp, plan),
        "out": flat(out_BTHK, Tp, plan),
        "lse": statistic(lse_BHT),
    }
    if not isinstance(lse_grad_BHT, SymbolicZero):
        specs["lse_grad"], arrays["lse_grad"] = across, statistic(lse_grad_BHT)
    if plan.segments:
        more, spans = segment_arrays(segments, plan)
        arrays, scalars = arrays | more, scalars | spans
        specs["q_segments"] = pl.BlockSpec(
            (None, X, 1, plan.n), lambda b, g, j, i, *_: (b, i, 0, 0)
        )
        specs["kv_segments"] = pl.BlockSpec(
            (None, U, 1, plan.m), lambda b, g, j, i, *_: (b, j, 0, 0)
        )
    shared = plan.shared > 1
    out_specs = {
        "q": pl.BlockSpec((None, N, W), lambda b, g, j, i, *_: (b, last_pass(j, i), g)),
        "k": k_grads,
        "v": k_grads,
    }
    out_shape = {
        "q": jax.ShapeDtypeStruct((B, Tp, H * plan.K), q_BTHK.dtype),
        "k": jax.ShapeDtypeStruct((B, Sp, H * plan.K), jnp.float32 if shared else k_BSGK.dtype),
        "v": jax.ShapeDtypeStruct((B, Sp, H * plan.K), jnp.float32 if shared else v_BSGK.dtype),
    }
    if plan.bias:
        rows = bias_BHTS.shape[0]
        arrays["bias"] = pad(pad(bias_BHTS, 2, Tp), 3, Sp)
        specs["bias"] = pl.BlockSpec(
            (None, P, N, M), lambda b, g, j, i, *_: (b if rows > 1 else 0, g, i, j)
        )
        out_specs["bias"] = pl.BlockSpec((None, P, N, M), lambda b, g, j, i, *_: (b, g, i, j))
        out_shape["bias"] = jax.ShapeDtypeStruct((B, H, Tp, Sp), jnp.float32)
    grads = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H // P, J, I),
            in_specs=[specs],
            out_specs=out_specs,
            scratch_shapes=[
                {
                    "q": pltpu.VMEM((I * X, P, plan.n, plan.group), q_BTHK.dtype),
                    "out_grad": pltpu.VMEM((I * X, P, plan.n, plan.group), v_BSGK.dtype),
                    "inner": pltpu.VMEM((I * X, P, plan.n), jnp.float32),
                    "q_sum": pltpu.VMEM((I * X, W, plan.n), jnp.float32),
                    "k_sum": pltpu.VMEM((M, W), jnp.float32),
                    "v_sum": pltpu.VMEM((M, W), jnp.float32),
                }
            ],
        ),
        out_shape=out_shape,
        compiler_params=plan.parameters("arbitrary", "arbitrary"),
        interpret=plan.interpret,
        name="flash_attention_backward",
    )(scalars, arrays)
    bias_grad = None
    if plan.bias:
        bias_grad = grads["bias"][:, :, :T, :S]
        bias_grad = (bias_grad if rows > 1 else bias_grad.sum(0, keepdims=True)).astype(
            bias_BHTS.dtype
        )
    k_grad, v_grad = (
        unflat(grads[name], S, plan).reshape(B, S, G, H // G, -1).sum(3).astype(x.dtype)
        if shared
        else unflat(grads[name], S, plan)
        for name, x in (("k", k_BSGK), ("v", v_BSGK))
    )
    return unflat(grads["q"], T, plan), k_grad, v_grad, bias_grad


def _kernel(scalars: Refs, refs: Refs, grads: Refs, sums: Refs, *, plan: Plan):
    b, g, j_block, i_block = (pl.program_id(axis) for axis in range(4))
    shift = shift_of(scalars, plan)
    first = i_block * plan.q_tiles

    @pl.when(j_block == 0)
    def _():
        def copy(x, _):
            rows = within(x, slice(0, plan.n), plan.n, plan.n)
            sums["q_sum"][first + x] = jnp.zeros(sums["q_sum"].shape[1:], jnp.float32)
            out_nW, out_grad_nW = refs["out"][rows], refs["out_grad"][rows]
            inner_Wn = (out_nW.astype(jnp.float32) * out_grad_nW.astype(jnp.float32)).T
            for p in range(plan.packed):
                row, own, lanes = slice(p, p + 1), plan.own(p), plan.lanes(p)
                sums["q"][first + x, p] = head(refs["q"][rows, lanes], p, plan, plan.factor)
                sums["out_grad"][first + x, p] = head(out_grad_nW[:, lanes], p, plan)
                inner_1n = inner_Wn[own].sum(0, keepdims=True)
                if "lse_grad" in refs:
                    # The gradient of log-sum-exp for a score is that score's weight.
                    inner_1n = inner_1n - refs["lse_grad"][p, :, rows]
                sums["inner"][first + x, row] = inner_1n

        each(plan.q_tiles, copy)

    @pl.when(i_block == 0)
    def _():
        for name in ("k_sum", "v_sum"):
            sums[name][...] = jnp.zeros(sums[name].shape, jnp.float32)

    if plan.bias:
        grads["bias"][...] = jnp.zeros(grads["bias"].shape, jnp.float32)

    def look(i, x, j, y, masked: bool):
        tile = Tile(b, g, i, j, ahead(i, j, shift, plan, masked))
        if plan.segments:
            keys_m1 = column(refs["kv_segments"][y])
            tile = tile._replace(q_segments_1n=refs["q_segments"][x], kv_segments_m1=keys_m1)
        _look(tile, x, y, scalars, refs, grads, sums, plan)

    # The sums of a tile of keys may begin anywhere, those of queries lie along lanes and may not.
    if plan.scattered:

        def queries(x, _):
            i = first + x
            each_keys(b, i, shift, scalars, j_block, plan, lambda *keys: look(i, x, *keys))

        each(plan.q_tiles, queries)
    else:

        def keys(y, _):
            j = j_block * plan.k_tiles + y
            each_queries(j, shift, i_block, plan, lambda i, x, masked: look(i, x, j, y, masked))

        each(plan.k_tiles, keys)

    @pl.when(i_block == plan.blocks[0] - 1)
    def _():
        # `plan.factor` is on the copy of the queries already.
        k_grad = sums["k_sum"][...] * (plan.scale / plan.factor)
        grads["k"][...] = k_grad.astype(grads["k"].dtype)
        grads["v"][...] = sums["v_sum"][...].astype(grads["v"].dtype)

    @pl.when(j_block == plan.blocks[1] - 1)
    def _():
        def write(x, _):
            rows = within(x, slice(0, plan.n), plan.n, plan.n)
            q_grad = sums["q_sum"][first + x].T * plan.scale
            grads["q"][rows] = q_grad.astype(grads["q"].dtype)

        each(plan.q_tiles, write)


def _look(tile: Tile, x, y, scalars: Refs, refs: Refs, grads: Refs, sums: Refs, plan: Plan) -> None:
    """What the pairs of one tile add to all gradients."""

    def products(piece) -> tuple[Array, Array]:
        here = within(y, piece.keys, plan.unit, plan.piece_m), plan.lanes(piece.p)
        q_nL, out_grad_nL = (
            sums[name][tile.i, piece.p, piece.queries] for name in ("q", "out_grad")
        )
        return product(refs["k"][here], q_nL, 1, 1), product(refs["v"][here], out_grad_nL, 1, 1)

    for piece, (scores_mn, weight_grad_mn) in one_ahead(pieces(plan, tile.ahead), products):
        p, columns = slice(piece.p, piece.p + 1), piece.queries
        here = within(y, piece.keys, plan.unit, plan.piece_m), plan.lanes(piece.p)
        scores_mn, slope_mn = finished(
            scores_mn, tile, piece, plan, scalars, refs.get("bias"), x, y
        )
        lse_1n = refs["lse"][piece.p, :, within(x, columns, plan.n, plan.piece_n)]
        weights_mn = jnp.exp2(scores_mn - lse_1n * LOG2_E)
        kept_mn = kept(weights_mn.shape, tile, piece, plan, scalars)
        weight_grad_mn = dropped(weight_grad_mn, kept_mn, plan)
        score_grad_mn = weights_mn * (weight_grad_mn - sums["inner"][tile.i, p, columns])
        if plan.bias:
            grads["bias"][(piece.p, *of_block(x, y, piece, plan))] = score_grad_mn.T
        if slope_mn is not None:
            score_grad_mn = score_grad_mn * slope_mn
        q_nL = sums["q"][tile.i, piece.p, columns]
        out_grad_nL = sums["out_grad"][tile.i, piece.p, columns]
        used_mn = dropped(weights_mn, kept_mn, plan).astype(out_grad_nL.dtype)
        score_grad_mn = score_grad_mn.astype(q_nL.dtype)
        # Of lanes that heads share, the others' are zeros here.
        sums["v_sum"][here] += product(used_mn, out_grad_nL, 1, 0)
        sums["k_sum"][here] += product(score_grad_mn, q_nL, 1, 0)
        more_Kn = part(product(refs["k"][here], score_grad_mn, 0, 0), piece.p, plan)
        sums["q_sum"][tile.i, plan.own(piece.p), columns] += more_Kn

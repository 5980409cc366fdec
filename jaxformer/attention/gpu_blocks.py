"""One block of the GPU kernels: which there are, how they arrive, and what happens to the scores.

A matrix in registers is spread over the 128 threads of a warpgroup as wgmma leaves it; a vector
along one of its axes (statistics of queries, segments of keys) is spread to match.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer.attention.dropout import keep_at
from jaxformer.attention.extras import NOTHING

ROWS = 64
"""Rows of one wgmma instruction: queries (or keys) that a warpgroup holds."""
WORKERS = 2
"""Warpgroups that compute; one more fetches for them."""
SLOTS = 2
"""Blocks that stream by: one is used while the next is fetched."""
HELD = ROWS * WORKERS
"""Queries (or keys) that stay with a thread block while keys (or queries) stream by."""


class Static(NamedTuple):
    """All that a kernel is compiled for."""

    causal: bool
    window: int | None
    rate: float
    segments: bool
    T: int
    S: int
    scale: float  # of the scores, for powers of two
    root: float  # of the scores, for powers of e
    heads: int  # of queries, in the whole array
    keys: int  # length of the keys, in the whole array
    interpret: Any


def laid_out(x: Array, layout: Any, static: Static) -> Array:
    """x, spread over the threads in this way; an interpreter has no threads to spread it over."""
    return x if static.interpret else plgpu.layout_cast(x, layout)


def zeros(shape: tuple[int, int], static: Static) -> Array:
    """A matrix of float32 zeros."""
    return laid_out(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA, static)


def vector(x: Array, axis: int, static: Static) -> Array:
    """A vector along an axis of a matrix."""
    return laid_out(x, plgpu.Layout.WGMMA.reduce(1 - axis), static)


def along(x: Array, axis: int, shape: tuple[int, ...]) -> Array:
    """A vector as a matrix that is constant along the other axis."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def outer(a_ref, b_ref, static: Static) -> Array:
    """a b^T in float32, both in shared memory."""
    if static.interpret:
        return jnp.dot(a_ref[...], b_ref[...].T, preferred_element_type=jnp.float32)

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, a_ref, plgpu.transpose_ref(b_ref, (1, 0)))
        return sum_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))


def add_product(total: Array, a: Array, b_ref, static: Static) -> Array:
    """total + a b in float32, a in registers and b in shared memory."""
    a = a.astype(b_ref.dtype)
    if static.interpret:  # interpreters read both factors from shared memory
        return total + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda total_ref: plgpu.wgmma(total_ref, a, b_ref))(plgpu.ACC.init(total))


def release(free, static: Static) -> None:
    """Says that a slot may be filled again.

    wgmma reads it as the copy engine writes it; reads of the interpreter need a fence between.
    """
    if static.interpret:
        plgpu.commit_smem()
    plgpu.barrier_arrive(free)


def slot_of(step):
    """The slot in which what belongs to a step arrives."""
    return jax.lax.rem(step, jnp.int32(SLOTS))


def fetch(step, groups: list[tuple[Any, list[tuple]]]) -> None:
    """Fills the slot of a step. A group is the barrier that says its part of the slot is free, and
    copies (from, to the slots, barriers that say they are ready)."""
    slot = slot_of(step)
    for free, copies in groups:

        @pl.when(step >= SLOTS)
        def _(free=free):
            plgpu.barrier_wait(free.at[slot])

        for source, slots, ready in copies:
            plgpu.copy_gmem_to_smem(source, slots.at[slot], ready.at[slot])


def fetch_keys(low, high, sources, slots, ready, free, static: Static) -> None:
    """Fetches blocks of keys, values and segments of keys, from `low` to before `high`."""
    (k_SK, v_SK, ids_S), (k_slots, v_slots, ids_slots) = sources, slots
    block = k_slots.shape[1]

    @pl.loop(0, high - low)
    def _(step):
        keys = pl.ds((low + step) * block, block)
        k_copies = [(k_SK.at[keys], k_slots, ready[0])]
        if static.segments:
            k_copies.append((ids_S.at[keys], ids_slots, ready[0]))
        fetch(step, [(free[0], k_copies), (free[1], [(v_SK.at[keys], v_slots, ready[1])])])


def hold(copies: list[tuple[Any, Any]], segments: tuple, w, ready, static: Static) -> None:
    """Copies (from, to the parts of warpgroups) for this warpgroup, and waits for them."""
    for source, parts in [*copies, segments] if static.segments else copies:
        plgpu.copy_gmem_to_smem(source, parts.at[w], ready.at[w])
    plgpu.barrier_wait(ready.at[w])


def kernel(body, grid, out_type, scratch, static: Static):
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
        kernel_name="flash_attention" + body.__name__.removesuffix("_kernel"),
        **({"interpret": static.interpret} if static.interpret else {}),
    )


def key_slots(K: int, dtype, block: int, static: Static) -> list:
    """Slots of keys, values and segments of keys; ready (keys, values) and free (the same)."""
    return [
        matrices(SLOTS, block, K, dtype),
        matrices(SLOTS, block, K, dtype),
        vectors(SLOTS, block, jnp.int32),
        plgpu.Barrier(num_arrivals=1 + static.segments, num_barriers=SLOTS),
        plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=WORKERS, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=WORKERS, num_barriers=SLOTS),
    ]


def matrices(count: int, rows: int, K: int, dtype):
    """Shared memory for `count` matrices [rows, K], swizzled as wgmma reads them."""
    swizzle = plgpu.find_swizzle(K * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM((count, rows, K), dtype, transforms=transforms)


def vectors(count: int, rows: int, dtype=jnp.float32):
    """Shared memory for `count` vectors."""
    return plgpu.SMEM((count, rows), dtype)


class Places(NamedTuple):
    """Where a matrix of scores stands in the picture of all queries and keys."""

    query: Array  # the first
    key: Array
    query_axis: int  # of the matrix: 0 for [queries, keys], 1 for [keys, queries]

    def grid(self, shape: tuple[int, ...], static: Static) -> tuple[Array, Array]:
        """The query and the key of each score, int32."""

        def numbers(first, axis):
            one = vector(jax.lax.iota(jnp.int32, shape[axis]), axis, static)
            return first + along(one, axis, shape)

        return numbers(self.query, self.query_axis), numbers(self.key, 1 - self.query_axis)


def masked(scores: Array, places: Places, segments: tuple | None, static: Static) -> Array:
    """The scores where segments, order and window allow them, NOTHING elsewhere.

    A block that lies inside all of them is left as it is.
    """
    shape, query_axis = scores.shape, places.query_axis
    keys = shape[1 - query_axis]

    def mask(scores):
        query, key = places.grid(shape, static)
        rules = []
        if segments is not None:
            q, kv = (
                along(ids, axis, shape)
                for ids, axis in zip(segments, (query_axis, 1 - query_axis), strict=True)
            )
            rules += [q == kv, q != 0]
        elif static.S % HELD:
            rules.append(key < static.S)
        back, ahead = reach(static)
        if back is not None and ahead is not None:
            # As an unsigned number what is negative is large: one comparison for both sides.
            behind = (query - key + ahead).astype(jnp.uint32)
            rules.append(behind <= jnp.uint32(back + ahead))
        elif static.causal:
            rules.append(query >= key)
        if not rules:
            return scores
        allowed = functools.reduce(jnp.logical_and, rules)
        return jnp.where(allowed, scores, jnp.float32(NOTHING))

    if static.segments or static.window is not None:
        return mask(scores)
    if not static.causal and not static.S % HELD:
        return scores
    cut = places.key + keys > static.S
    if static.causal:
        cut |= places.key + (keys - 1) > places.query
    return jax.lax.cond(cut, mask, lambda scores: scores, scores)


def marked(weights: Array, places: Places, b, h, words_ref, origin_ref, static: Static) -> Array:
    """Weights, which are not negative, with a minus where dropout zeroes them.

    The bits are those of the whole picture [B, H, T, S]. A sign needs no register of its own.
    """
    if not static.rate:
        return weights
    outer = (origin_ref[0] + b) * static.heads + origin_ref[1] + h
    query, key = places.grid(weights.shape, static)
    inner = (origin_ref[2] + query) * static.keys + origin_ref[3] + key
    keep = keep_at((words_ref[0], words_ref[1]), static.rate, outer, inner)
    return jnp.where(keep, weights, -weights)


def kept(marked: Array, static: Static) -> Array:
    """What dropout leaves of marked weights, not scaled up."""
    return jnp.maximum(marked, 0) if static.rate else marked


def score_gradient(marked: Array, grad: Array, inner: Array, static: Static) -> Array:
    """The gradient of the scores, from that of the weights after dropout.

    `inner` is the sum over a query's weights of weight times gradient.
    """
    if not static.rate:
        return marked * (grad - inner)
    grad = jnp.where(marked > 0, grad * (1 / (1 - static.rate)), jnp.float32(0))
    return jnp.abs(marked) * (grad - inner)


def bounds(first, size: int, block: int, back: int | None, ahead: int | None, span, count: int):
    """The blocks that `size` places from `first` on may see, as (first, after the last).

    They see `back` places before them and `ahead` after them (None: all); `span` is what segments
    leave, or None.
    """
    low, high = jnp.int32(0), jnp.int32(count)
    if back is not None:
        low = jax.lax.div(jnp.maximum(first - back, 0), jnp.int32(block))
    if ahead is not None:
        last = jax.lax.div(first + (size - 1 + ahead), jnp.int32(block))
        high = jnp.minimum(high, last + 1)
    if span is not None:
        low, high = jnp.maximum(low, span[0]), jnp.minimum(high, span[1])
    return low, high


def reach(static: Static) -> tuple[int | None, int | None]:
    """How far a query sees back and ahead; a key is seen from as far ahead and back."""
    far = None if static.window is None else static.window - 1
    return far, 0 if static.causal else far


def spans(ids_BT: Array, others_BS: Array, block: int, static: Static) -> Array:
    """int32 [2, B, I]: which blocks of the others share a segment with the places that are held.

    The first, and after the last; without segments there is nothing to read.
    """
    if not static.segments:
        return jnp.zeros((2, 1, 1), jnp.int32)
    ids_BIn, others_BJm = (
        pad(x, 1, n).reshape(x.shape[0], -1, n) for x, n in ((ids_BT, HELD), (others_BS, block))
    )
    J = others_BJm.shape[1]
    highest = jnp.iinfo(jnp.int32).max
    low_BI, low_BJ = (jnp.where(s > 0, s, highest).min(-1) for s in (ids_BIn, others_BJm))
    seen_BIJ = (low_BI[..., None] <= others_BJm.max(-1)[:, None]) & (
        low_BJ[:, None] <= ids_BIn.max(-1)[..., None]
    )
    blocks_11J = jnp.arange(J, dtype=jnp.int32)[None, None]
    first_BI = jnp.where(seen_BIJ, blocks_11J, J).min(-1)
    return jnp.stack([first_BI, jnp.where(seen_BIJ, blocks_11J + 1, 0).max(-1)])


def pad(x: Array, axis: int, block: int) -> Array:
    """Zeros behind an axis, to whole blocks."""
    short = -x.shape[axis] % block
    widths = [(0, short if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths) if short else x

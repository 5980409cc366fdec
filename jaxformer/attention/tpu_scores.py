"""What happens to the scores of one piece in the TPU kernels: soft cap, bias, ALiBi, mask, dropout.

Pieces are transposed, [keys, queries], and scores are exponents of 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxformer.attention.dropout import keep_at
from jaxformer.attention.extras import NOTHING
from jaxformer.attention.tpu_blocks import (
    LOG2_E,
    Plan,
    key_span,
    over,
    query_span,
    whole_keys,
    whole_queries,
)

Refs = dict[str, Any]


class Piece(NamedTuple):
    """Part of a tile: one of its heads, some of its queries and of its keys."""

    p: int
    queries: slice
    keys: slice


class Tile(NamedTuple):
    """Where a tile stands, and what masks it."""

    b: Any  # row of the batch
    g: Any  # block of heads
    i: Any  # tile of queries
    j: Any  # unit of keys with which it begins
    ahead: Any  # how far its first query stands behind its first key; None: nothing is masked
    q_segments_1n: Array | None = None
    kv_segments_m1: Array | None = None


def product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """The product of two matrices over an axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def head(x_nL: Array, p: int, plan: Plan, factor: float = 1.0) -> Array:
    """One head of the lanes that it shares, times a factor, with zeros in the lanes of the others.

    The matrix unit sums over 128 lanes anyway: so these heads need not be taken apart.
    """
    if factor != 1.0:
        x_nL = (x_nL.astype(jnp.float32) * factor).astype(x_nL.dtype)
    if plan.side == 1:
        return x_nL
    first = p % plan.side * plan.K
    lane_nL = jax.lax.broadcasted_iota(jnp.int32, x_nL.shape, 1)
    own_nL = (lane_nL >= first) & (lane_nL < first + plan.K)
    return jnp.where(own_nL, x_nL, jnp.zeros((), x_nL.dtype))


def part(x_Ln: Array, p: int, plan: Plan) -> Array:
    """The rows of one head among those that share its lanes."""
    first = p % plan.side * plan.K
    return x_Ln[first : first + plan.K] if plan.side > 1 else x_Ln


def pieces(plan: Plan, ahead) -> list[Piece]:
    """Those that a tile computes; on the diagonal, those that lie above it are left out."""
    return [
        Piece(p, queries, keys)
        for queries in _slices(plan.n, plan.piece_n)
        for keys in _slices(plan.m, plan.piece_m)
        for p in range(plan.packed)
        if not isinstance(ahead, int) or keys.start < ahead + queries.stop
    ]


def _slices(length: int, piece: int) -> list[slice]:
    return [slice(a, min(a + piece, length)) for a in range(0, length, piece)]


def one_ahead(todo: list[Piece], compute: Callable[[Piece], Any]) -> Iterator[tuple[Piece, Any]]:
    """Each piece with what is computed for it, the next one's before this one is used.

    So the matrix unit has work while the vector unit makes weights out of scores.
    """
    following = compute(todo[0])
    for x, piece in enumerate(todo):
        ready = following
        if x + 1 < len(todo):
            following = compute(todo[x + 1])
        yield piece, ready


def shift_of(scalars: Refs, plan: Plan):
    """By how many places the first query stands behind the first key."""
    if not plan.shifted:
        return 0
    place = scalars["place_6"]
    return place[4] - place[5]


def ahead(i, j, shift, plan: Plan, masked: bool):
    """`Tile.ahead` of tile i of the queries and the keys from unit j on."""
    if not masked:
        return None
    return 0 if plan.aligned else i * plan.n + shift - j * plan.unit


Body = Callable[[Any, Any, bool], None]
"""What is done with a tile: its place in the array and in its block; whether a mask cuts it."""


def each_keys(b, i, shift, scalars: Refs, j_block, plan: Plan, body: Body) -> None:
    """Calls the body for the tiles of a block of keys that tile i of the queries looks at.

    The places are those of the units with which the tiles begin.
    """
    count = plan.k_units
    first = j_block * count
    low, high = key_span(i, plan, shift)
    if not plan.scattered:
        return _each((low, high), whole_keys(i, plan, shift), first, count, plan, body)
    if plan.segments:
        low, high = jnp.maximum(low, scalars["low"][b, i]), jnp.minimum(high, scalars["high"][b, i])
    low, high = jnp.maximum(low, first), jnp.minimum(high, first + count)
    tiles = over(jnp.maximum(high - low, 0) + plan.units - 1, plan.units)
    # Where tiles would reach beyond the block they begin earlier: the mask hides the rest.
    low = jnp.minimum(low, first + count - tiles * plan.units)

    def tile(t, _):
        j = low + t * plan.units
        body(j, j - first, True)

    jax.lax.fori_loop(0, tiles, tile, None)


def each(count: int, body: Callable[[Any, None], None]) -> None:
    """Calls the body for so many tiles; one has no loop around it."""
    if count == 1:
        body(0, None)
    else:
        jax.lax.fori_loop(0, count, body, None)


def each_queries(j, shift, i_block, plan: Plan, body: Body) -> None:
    """Calls the body for the tiles of a block of queries that look at tile j of the keys."""
    span, whole = query_span(j, plan, shift), whole_queries(j, plan, shift)
    _each(span, whole, i_block * plan.q_tiles, plan.q_tiles, plan, body)


def _each(span, whole, first, count: int, plan: Plan, body: Body) -> None:
    """For the tiles of `span` that are among `count` from `first` on; unmasked those in `whole`."""
    low, high = jnp.maximum(span[0], first), jnp.minimum(span[1], first + count)

    def loop(low, high, masked: bool):
        jax.lax.fori_loop(low, high, lambda x, _: body(x, x - first, masked), None)

    if not (plan.causal or plan.window is not None or plan.ragged):
        return loop(low, high, False)
    whole_low = jnp.clip(whole[0], low, jnp.maximum(low, high))
    whole_high = jnp.clip(whole[1], whole_low, jnp.maximum(whole_low, high))
    loop(low, whole_low, True)
    loop(whole_low, whole_high, False)
    loop(whole_high, high, True)


def finished(
    x_mn: Array, tile: Tile, piece: Piece, plan: Plan, scalars: Refs, bias, x, y
) -> tuple[Array, Array | None]:
    """Scores as exponents of 2, NOTHING where the mask forbids; and the slope of the soft cap.

    x, y: the tile and the unit of the block of the bias.
    """
    slope_mn = None
    if plan.soft_cap is not None:
        x_mn = jnp.tanh(x_mn)
        slope_mn = 1 - x_mn * x_mn
        x_mn = x_mn * (plan.soft_cap * LOG2_E)
    if bias is not None:
        bias_nm = bias[(piece.p, *of_block(x, y, piece, plan))]
        x_mn = x_mn + bias_nm.astype(jnp.float32).T * LOG2_E
    if plan.alibi:
        place = scalars["place_6"]
        shift = place[4] - place[5] + tile.i * plan.n - tile.j * plan.unit
        away_mn = abs(_distances(x_mn.shape, piece, shift)).astype(jnp.float32)
        x_mn = x_mn - away_mn * (scalars["slopes_H"][tile.g * plan.packed + piece.p] * LOG2_E)
    allowed_mn = _allowed(x_mn.shape, tile, piece, plan)
    return (x_mn if allowed_mn is None else jnp.where(allowed_mn, x_mn, NOTHING)), slope_mn


def of_block(x, y, piece: Piece, plan: Plan) -> tuple:
    """The queries and the keys of a piece in a block: of its tile x, and from its unit y on."""
    queries, keys = piece.queries, piece.keys
    return (
        within(x, queries, plan.n, plan.piece_n),
        within(y, keys, plan.unit, plan.piece_m),
    )


def within(x, part: slice, tile: int, piece: int):
    """A part, from tile (or unit) x of a block on, as part of the block."""
    start = pl.multiple_of(x * tile + part.start, math.gcd(tile, piece))
    return pl.ds(start, part.stop - part.start)


def _distances(shape, piece: Piece, ahead) -> Array:
    """By how many places each query stands behind each key."""
    behind = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - jax.lax.broadcasted_iota(
        jnp.int32, shape, 0
    )
    return behind + (ahead + piece.queries.start - piece.keys.start)


def _allowed(shape, tile: Tile, piece: Piece, plan: Plan) -> Array | None:
    """Who may see whom in a piece; None where all may."""
    if tile.ahead is None:
        return None
    rules = []
    if tile.q_segments_1n is not None and tile.kv_segments_m1 is not None:
        q_1n = tile.q_segments_1n[:, piece.queries]
        rules.append((tile.kv_segments_m1[piece.keys] == q_1n) & (q_1n != 0))
    if plan.ragged:
        key_mn = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        rules.append(key_mn < plan.S - tile.j * plan.unit - piece.keys.start)
    below = isinstance(tile.ahead, int) and piece.keys.stop - 1 <= tile.ahead + piece.queries.start
    if plan.causal and not below:
        rules.append(_distances(shape, piece, tile.ahead) >= 0)
    if plan.window is not None:
        rules.append(abs(_distances(shape, piece, tile.ahead)) < plan.window)
    return functools.reduce(jnp.logical_and, rules) if rules else None


def kept(shape, tile: Tile, piece: Piece, plan: Plan, scalars: Refs) -> Array | None:
    """Which weights dropout keeps: by the bits of the whole picture [B, H, T, S].

    `place_6` holds the two words of the key, then the row, head, query and key that are first here.
    """
    if not plan.rate:
        return None
    place = scalars["place_6"]
    words = tuple(jax.lax.bitcast_convert_type(place[w], jnp.uint32) for w in range(2))
    outer = (place[2] + tile.b) * plan.heads + place[3] + tile.g * plan.packed + piece.p
    query_mn = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + (
        tile.i * plan.n + piece.queries.start
    )
    key_mn = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (tile.j * plan.unit + piece.keys.start)
    inner_mn = (place[4] + query_mn) * plan.keys + (place[5] + key_mn)
    return keep_at((words[0], words[1]), plan.rate, outer, inner_mn)


def dropped(x_mn: Array, kept_mn: Array | None, plan: Plan) -> Array:
    """Dropout: what is kept is scaled up."""
    # A product with 0: libtpu aborts on a matrix product whose operand was selected by a mask.
    return x_mn if kept_mn is None else x_mn * jnp.where(kept_mn, 1 / (1 - plan.rate), 0.0)


def column(row_1m: Array) -> Array:
    """[m, 1] of [1, m]."""
    return jnp.broadcast_to(row_1m, (8, row_1m.shape[1])).T[:, :1]

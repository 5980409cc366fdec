"""How the TPU kernels cut their work: arrays into blocks, blocks into tiles, tiles into pieces.

A block is what a step of the grid brings into VMEM. A tile is what a mask rules out or lets pass.
A piece is what the unrolled code of a tile computes at once.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.attention.extras import Extras
from jaxformer.attention.mask import Mask
from jaxformer.attention.tpu_table import HELD, LANES, VMEM, WIDEST, Tiles

LOG2_E = math.log2(math.e)

Order = Literal["parallel", "arbitrary"]


class Plan(NamedTuple):
    """All that a kernel is compiled for."""

    causal: bool
    window: int | None
    segments: bool
    bias: bool
    alibi: bool
    soft_cap: float | None
    rate: float
    shifted: bool  # rows of queries and of keys may begin at different places
    T: int
    S: int
    heads: int  # of queries, in the whole array
    keys: int  # length of the keys, in the whole array
    shared: int  # heads of queries to one of keys
    scale: float
    true_K: int  # size of a head; below it is padded
    K: int
    packed: int  # P: heads of a block
    side: int  # heads that share 128 lanes; of them products are taken together
    n: int  # queries of a tile
    m: int  # keys of a tile
    piece_n: int  # queries of a piece
    piece_m: int  # keys of a piece
    q_tiles: int  # tiles of queries in a block
    k_tiles: int  # tiles of keys in a block
    unit: int  # keys; a tile begins at any multiple of it
    interpret: Any

    @property
    def units(self) -> int:
        """Of a tile of keys."""
        return self.m // self.unit

    @property
    def scattered(self) -> bool:
        """Whether a tile of keys begins where a tile of queries has something to look at."""
        return self.segments or self.units > 1

    @property
    def k_units(self) -> int:
        """U: of a block of keys."""
        return self.k_tiles * self.units

    @property
    def width(self) -> int:
        """W: lanes of a block."""
        return self.packed * self.K

    @property
    def group(self) -> int:
        """L: lanes of the heads that share them."""
        return self.side * self.K

    def lanes(self, p: int) -> slice:
        """Those of a block that head p shares with others."""
        return slice(p // self.side * self.group, (p // self.side + 1) * self.group)

    def own(self, p: int) -> slice:
        """Those of a block that are head p's alone."""
        return slice(p * self.K, (p + 1) * self.K)

    @property
    def blocks(self) -> tuple[int, int]:
        """I, J: blocks of queries and of keys."""
        return pl.cdiv(self.T, self.n * self.q_tiles), pl.cdiv(self.S, self.m * self.k_tiles)

    @property
    def padded(self) -> tuple[int, int]:
        """T and S in whole blocks."""
        I, J = self.blocks
        return I * self.n * self.q_tiles, J * self.m * self.k_tiles

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of queries and of keys, padding included."""
        (I, J) = self.blocks
        return I * self.q_tiles, J * self.k_tiles

    @property
    def ragged(self) -> bool:
        """Whether a query could look at the padding behind the keys."""
        hidden = self.causal and not self.shifted and self.T <= self.S
        return self.padded[1] != self.S and not (self.segments or hidden)

    @property
    def aligned(self) -> bool:
        """Whether the tiles that the mask cuts through are those on the diagonal."""
        other = self.window is not None or self.segments or self.ragged or self.shifted
        return self.causal and self.n == self.m and not other

    def held(self, itemsize: int) -> int:
        """Bytes that the backward pass keeps in VMEM: queries, gradients of the output and its own.

        As many for each query, however long the row; `itemsize` is that of an element.
        """
        return self.padded[0] * (2 * self.packed * self.group * itemsize + 4 * self.width)

    @property
    def factor(self) -> float:
        """On queries: it makes scores exponents of 2, or arguments of the soft cap."""
        return self.scale * (LOG2_E if self.soft_cap is None else 1 / self.soft_cap)

    def parameters(self, *order: Order) -> pltpu.CompilerParams:
        """How the grid may be walked: rows and heads in any order, then as given."""
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *order), vmem_limit_bytes=VMEM
        )


def plan_of(
    q_BTHK: Array, k_BSGK: Array, mask: Mask, extras: Extras, tiles: Tiles, interpret: Any
) -> Plan:
    """What to compile for a call."""
    (_, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    beside = LANES // K if K < LANES and LANES % K == 0 else 1
    side = beside if G == H and H % beside == 0 else 1
    packed = side
    lanes, size = _up(K, LANES), q_BTHK.dtype.itemsize
    held = max(T, 1) * lanes * (2 * size + 4)  # as in `Plan.held`
    most = min(tiles.heads, HELD // held, WIDEST // (lanes * size))
    while G == H and H % (2 * packed) == 0 and 2 * packed <= most:
        packed *= 2
    n, q_tiles = _cut(T, tiles.n, tiles.q_block)
    m, k_tiles = _cut(S, tiles.m, tiles.k_block)
    unit = tiles.unit if tiles.unit and m % tiles.unit == 0 else m
    return Plan(
        causal=mask.causal,
        window=mask.window,
        segments=mask.q_segments_BT is not None,
        bias=extras.bias_BHTS is not None,
        alibi=extras.slopes_H is not None,
        soft_cap=extras.soft_cap,
        rate=extras.rate,
        shifted=extras.shifted,
        T=T,
        S=S,
        heads=extras.heads,
        keys=extras.keys,
        shared=H // G,
        scale=K**-0.5,
        true_K=K,
        K=K if side > 1 else _up(K, LANES),
        packed=packed,
        side=side,
        n=n,
        m=m,
        piece_n=min(tiles.piece_n, n),
        piece_m=min(tiles.piece_m, m),
        q_tiles=q_tiles,
        k_tiles=k_tiles,
        unit=unit,
        interpret=interpret,
    )


def _cut(length: int, tile: int, block: int) -> tuple[int, int]:
    """The size of a tile, and the tiles of a block: as few as the bounds allow, equally long."""
    tile = _up(pl.cdiv(length, pl.cdiv(length, tile)), min(tile, LANES))
    tiles = pl.cdiv(length, tile)
    return tile, pl.cdiv(tiles, pl.cdiv(tiles, max(block // tile, 1)))


def _up(length: int, unit: int) -> int:
    return pl.cdiv(length, unit) * unit


def pad(x: Array, axis: int, length: int) -> Array:
    """Zeros behind an axis, up to a length."""
    short = length - x.shape[axis]
    widths = [(0, short if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths) if short else x


def flat(x_BTHK: Array, length: int, plan: Plan) -> Array:
    """[B, length, H K]: heads side by side, as a projection leaves them in memory."""
    x_BTHK = pad(pad(x_BTHK, 3, plan.K), 1, length)
    return x_BTHK.reshape(*x_BTHK.shape[:2], -1)


def unflat(x_BTD: Array, length: int, plan: Plan) -> Array:
    """The inverse of `flat`."""
    x_BTHK = x_BTD.reshape(*x_BTD.shape[:2], -1, plan.K)
    return x_BTHK[:, :length, :, : plan.true_K]


def over(position, block: int):
    """The block of a position.

    A shift where possible: the compiler's static profile takes quotients of scalars for 0.
    """
    if block & (block - 1) == 0:
        return jnp.right_shift(position, jnp.int32(block.bit_length() - 1))
    return jax.lax.div(position, jnp.int32(block))


def key_span(i, plan: Plan, shift):
    """What tile i of the queries may see: the first unit of keys, and the one after the last.

    `shift` is by how many places the first query stands behind the first key.
    """
    first = i * plan.n + shift
    reach = (plan.window or 1) - 1
    low, high = jnp.int32(0), jnp.int32(pl.cdiv(plan.S, plan.m) * plan.units)
    if plan.window is not None:
        low = _over(first - reach, plan.unit)
    if plan.causal or plan.window is not None:
        last = first + plan.n - 1 + (0 if plan.causal else reach)
        high = jnp.minimum(high, _over(last + plan.unit, plan.unit))
    return low, high


def query_span(j, plan: Plan, shift):
    """The first tile of queries that may see tile j of the keys, and the one after the last."""
    first = j * plan.m - shift
    reach = (plan.window or 1) - 1
    low, high = jnp.int32(0), jnp.int32(pl.cdiv(plan.T, plan.n))
    if plan.causal or plan.window is not None:
        low = _over(first - (0 if plan.causal else reach), plan.n)
    if plan.window is not None:
        high = jnp.minimum(high, _over(first + plan.m - 1 + reach + plan.n, plan.n))
    return low, high


def whole_keys(i, plan: Plan, shift):
    """What tile i of the queries sees as a whole, where tiles are units, as in `key_span`."""
    first = i * plan.n + shift
    low, high = jnp.int32(0), jnp.int32(plan.S // plan.m if plan.ragged else plan.tiles[1])
    if plan.causal:
        high = jnp.minimum(high, _over(first + 1, plan.unit))
    if plan.window is not None:
        high = jnp.minimum(high, _over(first + plan.window, plan.unit))
        low = _over(first + plan.n - 1 - plan.window + plan.m, plan.unit)
    return low, high


def whole_queries(j, plan: Plan, shift):
    """The first tile of queries that sees tile j of the keys as a whole, and after the last."""
    first = j * plan.m - shift
    low, high = jnp.int32(0), jnp.int32(plan.tiles[0])
    if plan.ragged:
        high = jnp.where((j + 1) * plan.m <= plan.S, high, 0)
    if plan.causal:
        low = _over(first + plan.m + plan.n - 2, plan.n)
    if plan.window is not None:
        low = jnp.maximum(low, _over(first + plan.m - plan.window + plan.n - 1, plan.n))
        high = jnp.minimum(high, _over(first + plan.window, plan.n))
    return low, high


def _over(position, block: int):
    return over(jnp.maximum(position, 0), block)


def segment_arrays(segments, plan: Plan) -> tuple[dict[str, Array], dict[str, Array]]:
    """What the kernels need of segments: arrays by tile, and scalars: the span of each tile.

    q_segments [B, tiles, 1, n]; kv_segments [B, units, 1, m], for a tile from each unit on; low and
    high int32 [B, tiles]: the first unit of keys that segments leave, and the one after the last.
    Segments of a tile are taken for a range of ids; in rows packed in order they are one.
    """
    q_BT, kv_BS = (pad(x, 1, length) for x, length in zip(segments, plan.padded, strict=True))
    highest = jnp.iinfo(jnp.int32).max

    def ids(x_BT, tile):
        """The lowest and the highest of each tile."""
        x_BIn = x_BT.reshape(len(x_BT), -1, tile)
        return jnp.where(x_BIn > 0, x_BIn, highest).min(-1), x_BIn.max(-1)

    (low_BI, high_BI), (low_BU, high_BU) = ids(q_BT, plan.n), ids(kv_BS, plan.unit)
    seen_BIU = (low_BI[..., None] <= high_BU[:, None]) & (low_BU[:, None] <= high_BI[..., None])
    U = seen_BIU.shape[-1]
    units_11U = jnp.arange(U, dtype=jnp.int32)[None, None]
    ahead_BS = pad(kv_BS, 1, kv_BS.shape[1] + plan.m)
    parts = [
        tiled(ahead_BS[:, u * plan.unit :][:, : kv_BS.shape[1]], plan.m) for u in range(plan.units)
    ]
    arrays = {
        "q_segments": tiled(q_BT, plan.n),
        "kv_segments": jnp.stack(parts, 2).reshape(len(kv_BS), U, 1, plan.m),
    }
    return arrays, {
        "low": jnp.where(seen_BIU, units_11U, U).min(-1),
        "high": jnp.where(seen_BIU, units_11U + 1, 0).max(-1),
    }


def tiled(x_BT: Array, tile: int) -> Array:
    """[..., tiles, 1, tile]: one row of lanes to a tile."""
    return x_BT.reshape(*x_BT.shape[:-1], -1, 1, tile)

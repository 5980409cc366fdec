"""Sizes for the TPU kernels, by generation: found with the compiler's static profile."""

from __future__ import annotations

from typing import NamedTuple

LANES = 128
"""Lanes of a vector register: the unit of heads, of tiles, and of the matrix unit."""


class Tiles(NamedTuple):
    """Upper bounds of the sizes of a kernel; rows that are shorter take less."""

    n: int  # queries of a tile
    m: int  # keys of a tile
    q_block: int  # queries in VMEM at a time
    k_block: int  # keys in VMEM at a time
    piece_n: int  # queries of a piece
    piece_m: int  # keys of a piece
    heads: int = 1  # heads of a block, beside those that share 128 lanes anyway
    unit: int = 0  # keys; tiles begin at multiples of it, not of their own size


VMEM = 100 * 2**20
"""Bytes of a core's memory that a kernel may use."""

LONGEST = 40 * 2**20
"""Bytes of VMEM for the queries of a head and their gradients: the smallest core has 64 MiB."""

HELD = 2**24
"""The same for the heads of a block together, where there are several."""

WIDEST = 2048
"""Bytes of a place in the heads of a block, where there are several: 8 of 128 in bfloat16."""


class Generation(NamedTuple):
    """Forward and backward, where whole tiles are looked at and where segments cut them up."""

    dense: tuple[Tiles, Tiles]
    packed: tuple[Tiles, Tiles]


# The best of those tried, for rows of 2,048 in bfloat16 and heads of 64 and of 128, by the
# compiler's estimates for v5e, v5p and v6e (benchmarks/tune_tpu.py). Pieces fit the matrix unit:
# 128 x 128 up to v5, 256 x 256 since. Heads of a block are independent work for the units of a
# core. Packed sentences are short: a tile of keys begins where they do, and one of 256 mostly is
# enough.
NARROW = Generation(
    dense=(
        Tiles(1024, 1024, 1024, 4096, 128, 128, heads=2),
        Tiles(1024, 1024, 4096, 1024, 256, 128),
    ),
    packed=(
        Tiles(128, 256, 1024, 2048, 128, 128, heads=8, unit=32),
        Tiles(128, 256, 1024, 1024, 128, 256, heads=8, unit=32),
    ),
)
WIDE = Generation(
    dense=(
        Tiles(1024, 1024, 1024, 4096, 256, 128, heads=2),
        Tiles(1024, 1024, 4096, 1024, 256, 256),
    ),
    packed=(
        Tiles(128, 256, 1024, 2048, 128, 256, heads=8, unit=32),
        Tiles(128, 256, 1024, 1024, 128, 256, heads=8, unit=32),
    ),
)
GENERATIONS = {
    "TPU v4": NARROW,  # not profiled: the matrix unit of v5
    "TPU v5 lite": NARROW,
    "TPU v5e": NARROW,
    "TPU v5": NARROW,
    "TPU v5p": NARROW,
    "TPU v6 lite": WIDE,
    "TPU v6e": WIDE,
    "TPU7x": WIDE,  # the row of v6e, not tuned
}
OTHER = WIDE
"""For devices that are not in the table, and the interpreter."""

BIASED = Tiles(512, 512, 512, 512, 256, 128), Tiles(512, 512, 512, 512, 256, 128)


def tiles(kind: str, *, segments: bool, bias: bool) -> tuple[Tiles, Tiles]:
    """The sizes, forward and backward, for a kind of device as `jax.Device.device_kind` has it."""
    if bias:
        return BIASED
    generation = GENERATIONS.get(kind, OTHER)
    return generation.packed if segments else generation.dense

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


VMEM = 100 * 2**20
"""Bytes of a core's memory that a kernel may use."""

LONGEST = 40 * 2**20
"""Bytes of VMEM for the queries of a head and their gradients: the smallest core has 64 MiB."""

HELD = 2**14
"""Queries of the heads of a block together, where there are several; the backward pass keeps them.
"""

# The best of the pieces tried for causal rows of 2,048 in bfloat16, heads of 64 and of 128, by the
# compiler's estimates for v5e, v5p and v6e (benchmarks/tune_tpu.py). They fit the matrix unit:
# 128 x 128 up to v5, 256 x 256 since.
NARROW = Tiles(1024, 1024, 1024, 4096, 128, 128), Tiles(1024, 1024, 4096, 1024, 256, 128)
WIDE = Tiles(1024, 1024, 1024, 4096, 256, 128), Tiles(1024, 1024, 4096, 1024, 256, 256)
DENSE = {
    "TPU v4": NARROW,  # not profiled: the matrix unit of v5
    "TPU v5 lite": NARROW,
    "TPU v5e": NARROW,
    "TPU v5": NARROW,
    "TPU v5p": NARROW,
    "TPU v6 lite": WIDE,
    "TPU v6e": WIDE,
    "TPU7x": WIDE,  # the row of v6e, not tuned: it compiles, and has an estimate
}
OTHER = WIDE
"""For devices that are not in the table, and the interpreter."""

# Packed sentences are short: tiles are small, so that most of them are left out, and the heads of a
# block are independent work for the units of the core.
PACKED = (
    Tiles(128, 64, 1024, 2048, 128, 64, heads=4),
    Tiles(128, 64, 1024, 1024, 128, 64, heads=4),
)
BIASED = Tiles(512, 512, 512, 512, 256, 128), Tiles(512, 512, 512, 512, 256, 128)


def tiles(kind: str, *, segments: bool, bias: bool) -> tuple[Tiles, Tiles]:
    """The sizes, forward and backward, for a kind of device as `jax.Device.device_kind` has it."""
    return BIASED if bias else PACKED if segments else DENSE.get(kind, OTHER)

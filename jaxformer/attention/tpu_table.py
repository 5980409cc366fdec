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


VMEM = 100 * 2**20
"""Bytes of a core's memory that a kernel may use."""

DENSE = Tiles(1024, 1024, 1024, 4096, 256, 128), Tiles(1024, 1024, 4096, 1024, 256, 128)
PACKED = Tiles(128, 128, 1024, 2048, 128, 128), Tiles(128, 128, 2048, 1024, 128, 128)
BIASED = Tiles(512, 512, 512, 512, 256, 128), Tiles(512, 512, 512, 512, 256, 128)


def tiles(kind: str, *, segments: bool, bias: bool) -> tuple[Tiles, Tiles]:
    """The sizes, forward and backward, for a kind of device as `jax.Device.device_kind` has it."""
    return BIASED if bias else PACKED if segments else DENSE

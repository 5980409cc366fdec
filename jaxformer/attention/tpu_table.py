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


DENSE_FORWARD = Tiles(1024, 1024, 1024, 4096, 512, 256)
DENSE_BACKWARD = Tiles(512, 512, 4096, 512, 512, 256)
PACKED = Tiles(128, 64, 1024, 2048, 128, 64)
BIASED = Tiles(512, 512, 512, 512, 512, 256)


def tiles(kind: str, backward: bool, *, segments: bool, bias: bool) -> Tiles:
    """The sizes for a kind of device, as `jax.Device.device_kind` names it."""
    if bias:
        return BIASED
    if segments:
        return PACKED
    return DENSE_BACKWARD if backward else DENSE_FORWARD

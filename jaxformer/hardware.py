"""Chips: what they can do at most, by their makers' public figures, per JAX device.

A v5p chip is one device; a tpu7x chip is two. Ahead-of-time estimates and plans use these; nothing
that trains does.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peaks of one JAX device."""

    topology: str
    """The smallest topology of it that can be compiled for."""
    bf16_flops: float
    """Floating-point operations a second in bfloat16 products."""
    memory: float
    """Bytes of its memory."""
    bandwidth: float
    """Bytes a second between that memory and the chip."""
    clock: float
    """Cycles a second, as the compiler's estimates count them."""
    link: float
    """Bytes a second it sends along one axis of the torus, both ways round together; of a GPU, to
    the other GPUs of its host."""
    network: float
    """Bytes a second it sends beyond its slice (TPU) or its host (GPU), its share of the NICs."""
    devices: int = 1
    """JAX devices that the maker sells as one chip."""


CHIPS = {
    "v5e": Chip("v5e:2x2", 197e12, 16e9, 819e9, 1.5e9, 100e9, 3.1e9),
    "v5p": Chip("v5p:2x2x1", 459e12, 95e9, 2765e9, 1.75e9, 200e9, 6.2e9),
    "v6e": Chip("v6e:2x2", 918e12, 32e9, 1640e9, 1.75e9, 200e9, 12.5e9),
    "tpu7x": Chip("tpu7x:2x2x1", 1153e12, 96e9, 3690e9, 2.2e9, 100e9, 6.2e9, devices=2),
    "h100": Chip("1x1x1", 989e12, 80e9, 3350e9, 1.755e9, 450e9, 50e9),
}

"""For which kind of machine a program is being made."""

from __future__ import annotations

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh, which need not be a machine that is here.

    Ahead-of-time compilation sets a mesh of devices that are only described; without a mesh it is
    the machine at hand.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The model of the machine, as JAX names it: "TPU v5 lite", "TPU7x", "NVIDIA H100"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind

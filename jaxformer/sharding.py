"""The device mesh and the one table that lays logical axes on it.

Parameters and activations name their axes by what they mean ("heads", "batch"); `RULES` says which
mesh axis splits each. The mesh has explicit axes: shardings are part of every array's type, so a
wrong layout is an error where it arises and not a silent copy of the array to every device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.config import MeshConfig
from jaxformer.errors import UserError

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # rows of the global batch
    "embed": "fsdp",  # D of a parameter; gathered just before use
    "heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    None: None,
}


def spec(*axes: str | None) -> P | None:
    """The PartitionSpec of an array with these logical axes; None where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return P(*(RULES[axis] for axis in axes))


def gathered(weight: Array) -> Array:
    """The weight with its fsdp shards brought together (an all-gather; its gradient scatters)."""
    sharding = jax.typeof(weight).sharding
    if sharding.mesh.empty or "fsdp" not in sharding.spec:
        return weight
    return jax.sharding.reshard(weight, P(*(a if a != "fsdp" else None for a in sharding.spec)))


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of the config over all devices, with explicit axes.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(config)
    devices = jax.device_count()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if devices % fixed or (not free and fixed != devices):
        raise UserError(
            f"config.mesh={sizes} does not fit {devices} devices; set one axis to -1 to take all "
            "that are left, or make the product equal to the number of devices."
        )
    if free:
        sizes[free[0]] = devices // fixed
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Explicit,) * len(sizes))


def own_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """int64: which of the rows of a global batch the devices of this process hold, ascending."""
    sharding = NamedSharding(mesh, P(RULES["batch"]))
    spans = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[span] for span in spans]))


def place(batch: Mapping[str, np.ndarray], mesh: Mesh, rows: int | None = None) -> dict[str, Array]:
    """Host arrays [B, ...] as global arrays with their rows split over (data, fsdp).

    Each process brings its own rows (`own_rows`) of the `rows` of the global batch; None: all.
    """
    return {
        name: jax.make_array_from_process_local_data(
            NamedSharding(mesh, P(RULES["batch"], *(None,) * (own.ndim - 1))),
            own,
            (len(own) if rows is None else rows, *own.shape[1:]),
        )
        for name, own in batch.items()
    }


def check_rows(rows: int, mesh: Mesh) -> None:
    """Refuses batches whose rows cannot be dealt out evenly.

    Raises:
      UserError: names the fields, and what would be right.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shares:
        raise UserError(
            f"A (micro-)batch has {rows} rows, but config.mesh splits rows over {shares} devices "
            "(data x fsdp); raise config.data.tokens_per_batch so that tokens_per_batch / "
            f"target_length / accumulate is a multiple of {shares}, or use fewer devices."
        )

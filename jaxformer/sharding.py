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
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.config import MeshConfig
from jaxformer.errors import UserError

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # rows of the global batch
    "length": "context",  # positions of a row
    "tokens": ("context", "data", "fsdp"),  # rows and positions as one axis, see `flat_tokens`
    "embed": "fsdp",  # D of a parameter; gathered just before use
    "heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    None: None,
}

WHOLE_ROWS = {RULES["length"]: None, RULES["tokens"]: RULES["batch"]}
"""What to write instead where the mesh has no `context` to speak of."""


def spec(*axes: str | None) -> P | None:
    """The PartitionSpec of an array with these logical axes; None where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else layout(mesh, *axes)


def layout(mesh: Mesh | AbstractMesh, *axes: str | None) -> P:
    """`spec` on the given mesh. Rows that `context` does not cut have the type of whole rows."""
    cut = mesh.shape.get("context", 1) > 1
    mesh_axes = (RULES[axis] for axis in axes)
    return P(*(split if cut else WHOLE_ROWS.get(split, split) for split in mesh_axes))


def gathered(weight: Array) -> Array:
    """The weight with its fsdp shards brought together (an all-gather; its gradient scatters)."""
    sharding = jax.typeof(weight).sharding
    if sharding.mesh.empty or "fsdp" not in sharding.spec:
        return weight
    return jax.sharding.reshard(weight, P(*(a if a != "fsdp" else None for a in sharding.spec)))


def flat_tokens(x_BTI: Array) -> Array:
    """Rows and positions as one axis: [B, T, ...] to [B T, ...], laid out as "tokens".

    The parts into which `context` cuts the rows come first, so that no token leaves its device.
    """
    (B, T, *I), c, inner = x_BTI.shape, context_size(), _features(x_BTI, 2)
    cut = spec("batch", "length", None, *inner)
    x_cBtI = jnp.moveaxis(x_BTI.reshape(B, c, T // c, *I, out_sharding=cut), 1, 0)
    return x_cBtI.reshape(B * T, *I, out_sharding=spec("tokens", *inner))


def rows_of_tokens(x_nI: Array, B: int) -> Array:
    """The inverse of `flat_tokens`: [B T, ...] to [B, T, ...]."""
    (n, *I), c, inner = x_nI.shape, context_size(), _features(x_nI, 1)
    cut = spec("length", "batch", None, *inner)
    x_BctI = jnp.moveaxis(x_nI.reshape(c, B, n // B // c, *I, out_sharding=cut), 0, 1)
    return x_BctI.reshape(B, n // B, *I, out_sharding=spec("batch", "length", *inner))


def context_size() -> int:
    """Into how many parts the mesh cuts each row."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def _features(x: Array, first: int) -> tuple[str | None, ...]:
    """The logical axes of the features, from axis `first` on: over `tensor`, or whole."""
    split = tuple(jax.typeof(x).sharding.spec)
    split += (None,) * (x.ndim - len(split))
    return tuple("heads" if axis == RULES["heads"] else None for axis in split[first:])


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


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Host arrays [B, T] as global arrays: rows split over (data, fsdp), positions over context.

    Each process brings its own rows of the global batch.
    """
    return {
        name: jax.make_array_from_process_local_data(
            NamedSharding(mesh, layout(mesh, "batch", "length")), rows
        )
        for name, rows in batch.items()
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

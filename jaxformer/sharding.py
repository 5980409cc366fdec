"""The device mesh and the one table that lays logical axes on it.

Parameters and activations name their axes by what they mean ("heads", "batch"); `RULES` says which
mesh axis splits each. The mesh has explicit axes: shardings are part of every array's type, so a
wrong layout is an error where it arises and not a silent copy of the array to every device.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.config import Config, MeshConfig, kv_heads
from jaxformer.errors import UserError

AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))

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
    shape = mesh_shape(config, jax.device_count())
    return jax.make_mesh(tuple(shape.values()), tuple(shape), (AxisType.Explicit,) * len(shape))


def own_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """int64: which of the rows of a global batch the devices of this process hold, ascending."""
    sharding = NamedSharding(mesh, P(RULES["batch"]))
    spans = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[span] for span in spans]))


def place(batch: Mapping[str, np.ndarray], mesh: Mesh, rows: int | None = None) -> dict[str, Array]:
    """Host arrays [B, T] as global arrays: rows split over (data, fsdp), positions over context.

    Each process brings its own rows (`own_rows`) of the `rows` of the global batch; None: all.
    """
    return {
        name: jax.make_array_from_process_local_data(
            NamedSharding(mesh, layout(mesh, "batch", "length")),
            own,
            (len(own) if rows is None else rows, *own.shape[1:]),
        )
        for name, own in batch.items()
    }


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each axis, with -1 filled so that all devices are used.

    Raises:
      UserError: the sizes do not multiply to the number of devices; the nearest that do are named.
    """
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    filled = sizes | {name: max(devices // fixed, 1) for name in free}
    if math.prod(filled.values()) != devices:
        near = nearest(filled, devices)
        raise UserError(
            f"config.mesh={sizes} does not fit {devices} devices; set one axis to -1 to take all "
            f"that are left, or take {written(near)}."
        )
    return filled


class Split(NamedTuple):
    """Something that mesh axes cut into equal parts."""

    axes: tuple[str, ...]
    name: str
    size: int


def splits(config: Config, vocab_size: int = 0, source_length: int = 0) -> list[Split]:
    """What the mesh has to divide evenly; vocabulary and source length as far as they are known."""
    model, data = config.model, config.data
    rows = data.tokens_per_batch // data.target_length // config.optimizer.accumulate
    source_length = source_length or data.source_length
    wanted = [
        Split(("data", "fsdp"), "the rows of a (micro-)batch", rows),
        Split(("fsdp",), "config.model.d_model", model.d_model),
        Split(("tensor",), "config.model.num_heads", model.num_heads),
        Split(("tensor",), "the number of key heads", kv_heads(model)),
        Split(("tensor",), "config.model.d_ff", model.d_ff),
        Split(("tensor",), "the vocabulary", vocab_size),
        Split(("context",), "config.data.target_length", data.target_length),
        Split(("context",), "config.data.source_length", source_length),
    ]
    return [split for split in wanted if split.size]


def broken(shape: Mapping[str, int], wanted: list[Split]) -> Split | None:
    """The first split that a mesh of this shape cannot make."""
    return next((s for s in wanted if s.size % math.prod(shape[a] for a in s.axes)), None)


def check_mesh(
    config: Config, shape: Mapping[str, int], vocab_size: int = 0, source_length: int = 0
) -> None:
    """Refuses a mesh that cannot deal out parameters and batches evenly.

    Raises:
      UserError: names what is to be split, over how many devices, and the nearest mesh that can.
    """
    wanted = splits(config, vocab_size, source_length)
    split = broken(shape, wanted)
    if split is None:
        return
    asked = " x ".join(f"config.mesh.{axis}={shape[axis]}" for axis in split.axes)
    near = nearest(shape, math.prod(shape.values()), wanted)
    cure = f"take {written(near)}" if near else "use fewer devices"
    if "data" in split.axes:
        parts = shape["data"] * shape["fsdp"]
        cure += (
            ", or raise config.data.tokens_per_batch so that tokens_per_batch / target_length / "
            f"accumulate is a multiple of {parts}"
        )
    raise UserError(f"{asked} does not divide {split.name}={split.size}; {cure}.")


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to spread so many devices over the axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(AXES) - 1):
        if devices % math.prod(sizes) == 0:
            yield dict(zip(AXES, (devices // math.prod(sizes), *sizes), strict=True))


def nearest(
    asked: Mapping[str, int], devices: int, wanted: Sequence[Split] = ()
) -> dict[str, int] | None:
    """The mesh that can make the splits and is the fewest doublings and halvings away.

    Of equally near ones the one that talks least: data before fsdp before context before tensor.
    """

    def price(shape: Mapping[str, int]) -> tuple[float, ...]:
        away = sum(abs(math.log2(shape[axis] / asked[axis])) for axis in AXES)
        return round(away, 6), shape["tensor"], shape["context"], shape["fsdp"]

    return min((m for m in meshes(devices) if not broken(m, list(wanted))), key=price, default=None)


def written(shape: Mapping[str, int] | None) -> str:
    """data=2,fsdp=4: a mesh as `--mesh` takes it, without the axes of size 1."""
    axes = {axis: size for axis, size in (shape or {}).items() if size > 1} or {"data": 1}
    return ",".join(f"{axis}={size}" for axis, size in axes.items())

"""Attention on many devices: each computes its own rows, heads and part of the queries."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxformer.attention.context import TRAVEL, Implementation
from jaxformer.attention.extras import Extras
from jaxformer.attention.mask import Mask


def sharded(
    implementation: Implementation,
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: Mask,
    extras: Extras,
    context_keys: str,
) -> tuple[Array, Array]:
    """`implementation` on each device's rows and heads, as the layout of the queries deals them.

    Rows of the batch and heads do not meet in attention, so no device needs what another has. Where
    rows are cut along their length, `context_keys` ("ring" or "gather") says how keys travel.

    Raises:
      NotImplementedError: the queries are split within a head, or over several axes along their
        length; or a bias goes round the ring.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or AxisType.Explicit not in mesh.axis_types:
        return implementation(q_BTHK, k_BSGK, v_BSGK, mask, extras)
    rows, length, heads, within = _spec(q_BTHK)
    if _size(mesh, within) > 1 or len(_names(length)) > 1:
        raise NotImplementedError(
            f"attention is split over rows, length and heads, not as {q_BTHK.sharding}"
        )
    if _size(mesh, length) > 1:
        (axis,) = _names(length)
        implementation = functools.partial(TRAVEL[context_keys], implementation, axis)

    def part(q_BTHK, k_BSGK, v_BSGK, mask, extras):
        row = _index(mesh, rows) * q_BTHK.shape[0]
        head = _index(mesh, heads) * q_BTHK.shape[2]
        here_4 = jnp.stack([row, head, jnp.zeros_like(row), jnp.zeros_like(row)])
        extras = dataclasses.replace(extras, origin_4=extras.first + here_4)
        return implementation(q_BTHK, k_BSGK, v_BSGK, mask, extras)

    array = P(rows, length, heads, None)
    mask_specs = jax.tree.map(lambda _: P(rows, length), mask)
    bias = extras.bias_BHTS
    shared = bias is not None and bias.shape[0] == 1
    layouts: dict[str, Any] = {
        "bias_BHTS": P(None if shared else rows, heads, length, None),
        "slopes_H": P(heads),
        "words_2": P(),
        "origin_4": P(),
    }
    given = {name: layouts[name] for name in layouts if getattr(extras, name) is not None}
    extras_specs = dataclasses.replace(extras, **given)
    specs = (array, array, array, mask_specs, extras_specs)
    inputs = (q_BTHK, k_BSGK, v_BSGK, mask, extras)
    inputs = jax.tree.map(jax.sharding.reshard, inputs, specs)
    return jax.shard_map(
        part, in_specs=specs, out_specs=(array, P(rows, heads, length)), check_vma=False
    )(*inputs)


def _spec(x: Array) -> tuple:
    spec = jax.typeof(x).sharding.spec
    return tuple(spec) + (None,) * (x.ndim - len(spec))


def _names(axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _size(mesh, axes) -> int:
    size = 1
    for name in _names(axes):
        size *= mesh.shape[name]
    return size


def _index(mesh, axes) -> Array:
    """This device's number along axes of the mesh, the first varying slowest."""
    index = jnp.int32(0)
    for name in _names(axes):
        index = index * mesh.shape[name] + jax.lax.axis_index(name).astype(jnp.int32)
    return index

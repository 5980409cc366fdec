"""Attention over rows that are cut over devices: keys come by in a ring, or all at once.

Liu et al. (2023), "Ring attention with blockwise transformers". Every function here runs inside
`shard_map`: arrays are one device's parts, T / c queries and S / c keys of c devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.attention.extras import NOTHING, Extras
from jaxformer.attention.mask import Mask

Implementation = Callable[[Array, Array, Array, Mask, Extras], tuple[Array, Array]]
Keys = tuple[Array, Array, Array | None]
"""Keys, values and segments of keys of one part of the rows."""


def gather(
    implementation: Implementation,
    axis: str,
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: Mask,
    extras: Extras,
) -> tuple[Array, Array]:
    """Each device brings the keys and values of whole rows together for its own queries.

    One message of all keys; they are kept for the backward pass, whole rows of them.
    """
    keys = _present((k_BSGK, v_BSGK, mask.kv_segments_BS))
    whole = [jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in keys]
    k_BSGK, v_BSGK, *segments = whole
    mask = dataclasses.replace(mask, kv_segments_BS=segments[0] if segments else None)
    here = jax.lax.axis_index(axis).astype(jnp.int32)
    extras = _moved(extras, here * q_BTHK.shape[1], jnp.int32(0))
    extras = dataclasses.replace(extras, shifted=True)
    return implementation(q_BTHK, k_BSGK, v_BSGK, mask, extras)


def ring(
    implementation: Implementation,
    axis: str,
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: Mask,
    extras: Extras,
) -> tuple[Array, Array]:
    """Parts of keys and values travel round; results over each part are put together.

    A device never holds more than two parts, forward or backward. With a causal mask, parts that
    come later in the rows are passed on and not looked at.
    """
    extras.refuse("ring", "a bias")
    return _ring(q_BTHK, k_BSGK, v_BSGK, mask, extras, implementation, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ring(q_BTHK, k_BSGK, v_BSGK, mask, extras, implementation, axis):
    return _forward(q_BTHK, k_BSGK, v_BSGK, mask, extras, implementation, axis)[0]


def _forward(q_BTHK, k_BSGK, v_BSGK, mask, extras, implementation, axis):
    def add_part(step, carry):
        (k, v, segments), out_BTHK, lse_BHT = carry

        def look(mask, extras):
            return implementation(q_BTHK, k, v, mask, extras)

        arguments = (step, axis, q_BTHK, k, segments, mask, extras)
        more_BTHK, more_lse_BHT = _of_part(
            look, (nothing[0].astype(v.dtype), nothing[1]), *arguments
        )
        total_BHT = jnp.logaddexp(lse_BHT, more_lse_BHT)
        out_BTHK = _share(lse_BHT, total_BHT) * out_BTHK
        out_BTHK += _share(more_lse_BHT, total_BHT) * more_BTHK.astype(jnp.float32)
        return _passed_on((k, v, segments), axis), out_BTHK, total_BHT

    B, T, H, _ = q_BTHK.shape
    nothing = jnp.zeros(q_BTHK.shape, jnp.float32), jnp.full((B, H, T), NOTHING, jnp.float32)
    keys = (k_BSGK, v_BSGK, mask.kv_segments_BS)
    _, out_BTHK, lse_BHT = jax.lax.fori_loop(0, jax.lax.axis_size(axis), add_part, (keys, *nothing))
    lse_BHT = jnp.where(lse_BHT > NOTHING / 4, lse_BHT, NOTHING)
    out_BTHK = out_BTHK.astype(v_BSGK.dtype)
    return (out_BTHK, lse_BHT), (q_BTHK, k_BSGK, v_BSGK, mask, extras, out_BTHK, lse_BHT)


def _backward(implementation, axis, saved, gradients):
    """Once more round the ring; gradients of keys travel with them and are home at the end.

    With out = sum over parts of share_i out_i and share_i = exp(lse_i - lse), the gradients for
    out_i and lse_i are known from out and lse alone, so that parts need not wait for each other.
    """
    q_BTHK, k_BSGK, v_BSGK, mask, extras, out_BTHK, lse_BHT = saved
    out_grad_BTHK, lse_grad_BHT = gradients
    out_grad_BTHK = out_grad_BTHK.astype(jnp.float32)

    def add_part(step, carry):
        (k, v, segments), (k_grad, v_grad), q_grad_BTHK = carry

        def look(mask, extras):
            (part_BTHK, part_lse_BHT), pull = jax.vjp(
                lambda q, k, v: implementation(q, k, v, mask, extras), q_BTHK, k, v
            )
            share_BTH1 = _share(part_lse_BHT, lse_BHT)
            beyond_BTHK = part_BTHK.astype(jnp.float32) - out_BTHK.astype(jnp.float32)
            part_lse_grad_BTH1 = (out_grad_BTHK * beyond_BTHK).sum(-1, keepdims=True)
            part_lse_grad_BTH1 += lse_grad_BHT.swapaxes(1, 2)[..., None]
            part_lse_grad_BHT = (share_BTH1 * part_lse_grad_BTH1)[..., 0].swapaxes(1, 2)
            part_grad_BTHK = (share_BTH1 * out_grad_BTHK).astype(part_BTHK.dtype)
            return pull((part_grad_BTHK, part_lse_grad_BHT))

        nothing = jax.tree.map(jnp.zeros_like, (q_BTHK, k, v))
        arguments = (step, axis, q_BTHK, k, segments, mask, extras)
        q_more, k_more, v_more = _of_part(look, nothing, *arguments)
        grads = (k_grad + k_more.astype(jnp.float32), v_grad + v_more.astype(jnp.float32))
        passed_on = _passed_on((k, v, segments), axis), _passed_on(grads, axis)
        return *passed_on, q_grad_BTHK + q_more.astype(jnp.float32)

    zeros = jnp.zeros(k_BSGK.shape, jnp.float32)
    start = (k_BSGK, v_BSGK, mask.kv_segments_BS), (zeros, zeros), jnp.zeros(q_BTHK.shape)
    _, (k_grad, v_grad), q_grad = jax.lax.fori_loop(0, jax.lax.axis_size(axis), add_part, start)
    q_grad, k_grad, v_grad = (
        grad.astype(x.dtype) for grad, x in ((q_grad, q_BTHK), (k_grad, k_BSGK), (v_grad, v_BSGK))
    )
    return q_grad, k_grad, v_grad, None, None


_ring.defvjp(_forward, _backward)


def _of_part(look, nothing, step, axis, q_BTHK, k_BSGK, segments, mask, extras):
    """`look(mask, extras)` at the part that is here after `step` hand-overs, or `nothing`."""
    here, devices = jax.lax.axis_index(axis).astype(jnp.int32), jax.lax.axis_size(axis)
    owner = (here - step.astype(jnp.int32)) % devices
    extras = _moved(extras, here * q_BTHK.shape[1], owner * k_BSGK.shape[1])
    mask = dataclasses.replace(mask, kv_segments_BS=segments)
    if not mask.causal or mask.window is not None or q_BTHK.shape[1] != k_BSGK.shape[1]:
        return look(mask, dataclasses.replace(extras, shifted=True))
    # Of equal parts a later one is unseen, an earlier one seen by all, and one's own is causal as
    # if rows began here.
    seen = dataclasses.replace(mask, causal=False)
    branches = [lambda: nothing, lambda: look(mask, extras), lambda: look(seen, extras)]
    return jax.lax.switch(jnp.sign(here - owner) + 1, branches)


def _moved(extras: Extras, query: Array, key: Array) -> Extras:
    zero = jnp.zeros_like(query)
    return dataclasses.replace(extras, origin_4=extras.first + jnp.stack([zero, zero, query, key]))


def _passed_on(parts, axis: str):
    """What the neighbour before held; with every step the parts move on by one."""
    devices = jax.lax.axis_size(axis)
    to_next = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to_next), parts)


def _share(part_lse_BHT: Array, lse_BHT: Array) -> Array:
    """The share of a part in the sum of the exponentials, [B, T, H, 1]."""
    return jnp.exp(part_lse_BHT - lse_BHT).swapaxes(1, 2)[..., None]


def _present(arrays):
    return [x for x in arrays if x is not None]


TRAVEL = {"ring": ring, "gather": gather}

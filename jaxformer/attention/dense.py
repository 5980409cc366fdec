"""The formula with its gradient written by hand: the fast form for short rows on the CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.attention.dropout import dropout as drop
from jaxformer.attention.mask import Mask

MASKED = -1e30


def dense(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    mask: Mask,
    *,
    bias: Array | None = None,
    dropout: tuple[float, Array] | None = None,
) -> Array:
    """Attention over the whole T x S picture, heads in front so that every product is of matrices.

    XLA:CPU spends 55 ms on the gradient of `reference` at [32, 128, 4, 64], 19 ms on this one (2
    cores): autodiff leaves products over axes that are not neighbours.
    """
    if bias is not None:
        raise NotImplementedError("dense attention has no gradient for a bias")
    if q_BTHK.shape[2] != k_BSHK.shape[2]:
        raise NotImplementedError("dense attention has as many heads of keys as of queries")
    rate, key = dropout if dropout is not None else (0.0, None)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    allowed_BTS = mask.allowed_BTS(q.shape[2], k.shape[2])
    return jnp.swapaxes(_attend(q, k, v, allowed_BTS, key, rate), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BHTK, k_BHSK, v_BHSK, allowed_BTS, key, rate):
    return _attend_fwd(q_BHTK, k_BHSK, v_BHSK, allowed_BTS, key, rate)[0]


def _attend_fwd(q_BHTK, k_BHSK, v_BHSK, allowed_BTS, key, rate):
    scaled_BHTK = q_BHTK * jnp.asarray(q_BHTK.shape[-1] ** -0.5, q_BHTK.dtype)
    scores_BHTS = jnp.einsum(
        "bhtk,bhsk->bhts", scaled_BHTK, k_BHSK, preferred_element_type=jnp.float32
    )
    if allowed_BTS is not None:
        scores_BHTS = jnp.where(allowed_BTS[:, None], scores_BHTS, MASKED)
    # Against a floor above MASKED, a row with nothing to look at sums to zero instead of S.
    top_BHT1 = jnp.maximum(scores_BHTS.max(-1, keepdims=True), MASKED / 2)
    exp_BHTS = jnp.exp(scores_BHTS - top_BHT1)
    weights_BHTS = exp_BHTS / jnp.maximum(exp_BHTS.sum(-1, keepdims=True), 1e-30)
    weights_BHTS = weights_BHTS.astype(v_BHSK.dtype)
    out_BHTK = jnp.einsum("bhts,bhsk->bhtk", drop(weights_BHTS, rate, key), v_BHSK)
    return out_BHTK, (q_BHTK, k_BHSK, v_BHSK, weights_BHTS, key)


def _attend_bwd(rate, saved, out_grad_BHTK):
    q_BHTK, k_BHSK, v_BHSK, weights_BHTS, key = saved
    v_grad_BHSK = jnp.einsum("bhts,bhtk->bhsk", drop(weights_BHTS, rate, key), out_grad_BHTK)
    # Dropout is linear and its bits depend on the key only, so it is its own transpose.
    weight_grad_BHTS = drop(jnp.einsum("bhtk,bhsk->bhts", out_grad_BHTK, v_BHSK), rate, key)
    inner_BHT1 = (weights_BHTS * weight_grad_BHTS).sum(-1, keepdims=True)
    scale = jnp.asarray(q_BHTK.shape[-1] ** -0.5, q_BHTK.dtype)
    score_grad_BHTS = weights_BHTS * (weight_grad_BHTS - inner_BHT1) * scale
    q_grad_BHTK = jnp.einsum("bhts,bhsk->bhtk", score_grad_BHTS, k_BHSK)
    k_grad_BHSK = jnp.einsum("bhts,bhtk->bhsk", score_grad_BHTS, q_BHTK)
    return q_grad_BHTK, k_grad_BHSK, v_grad_BHSK, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)

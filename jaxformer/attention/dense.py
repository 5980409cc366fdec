"""The formula with its gradient written by hand: the fast form for short rows on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.attention.extras import Extras
from jaxformer.attention.mask import Mask
from jaxformer.attention.reference import softmax


def dense(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, mask: Mask, extras: Extras
) -> tuple[Array, Array]:
    """Attention over the whole T x S picture, heads in front so that every product is of matrices.

    XLA:CPU spends 55 ms on the gradient of `reference` at [32, 128, 4, 64], 19 ms on this one (2
    cores): autodiff leaves products over axes that are not neighbours.
    """
    extras.refuse("dense", "a bias", "ALiBi", "a soft cap")
    if q_BTHK.shape[2] != k_BSHK.shape[2]:
        raise NotImplementedError("dense attention has as many heads of keys as of queries")
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    out_BHTK, lse_BHT = _attend(q, k, v, mask, extras)
    return jnp.swapaxes(out_BHTK, 1, 2), lse_BHT


@jax.custom_vjp
def _attend(q_BHTK, k_BHSK, v_BHSK, mask, extras):
    return _attend_fwd(q_BHTK, k_BHSK, v_BHSK, mask, extras)[0]


def _attend_fwd(q_BHTK, k_BHSK, v_BHSK, mask, extras):
    scaled_BHTK = q_BHTK * jnp.asarray(q_BHTK.shape[-1] ** -0.5, q_BHTK.dtype)
    scores_BHTS = jnp.einsum(
        "bhtk,bhsk->bhts", scaled_BHTK, k_BHSK, preferred_element_type=jnp.float32
    )
    weights_BHTS, lse_BHT = softmax(scores_BHTS, mask, extras)
    weights_BHTS = weights_BHTS.astype(v_BHSK.dtype)
    out_BHTK = jnp.einsum("bhts,bhsk->bhtk", extras.dropped(weights_BHTS), v_BHSK)
    return (out_BHTK, lse_BHT), (q_BHTK, k_BHSK, v_BHSK, weights_BHTS, extras)


def _attend_bwd(saved, gradients):
    q_BHTK, k_BHSK, v_BHSK, weights_BHTS, extras = saved
    out_grad_BHTK, lse_grad_BHT = gradients
    v_grad_BHSK = jnp.einsum("bhts,bhtk->bhsk", extras.dropped(weights_BHTS), out_grad_BHTK)
    # Dropout is linear and its bits depend on the key only, so it is its own transpose.
    weight_grad_BHTS = extras.dropped(jnp.einsum("bhtk,bhsk->bhts", out_grad_BHTK, v_BHSK))
    inner_BHT1 = (weights_BHTS * weight_grad_BHTS).sum(-1, keepdims=True)
    # The gradient of log-sum-exp for a score is that score's weight.
    inner_BHT1 -= lse_grad_BHT[..., None].astype(inner_BHT1.dtype)
    scale = jnp.asarray(q_BHTK.shape[-1] ** -0.5, q_BHTK.dtype)
    score_grad_BHTS = weights_BHTS * (weight_grad_BHTS - inner_BHT1) * scale
    q_grad_BHTK = jnp.einsum("bhts,bhsk->bhtk", score_grad_BHTS, k_BHSK)
    k_grad_BHSK = jnp.einsum("bhts,bhtk->bhsk", score_grad_BHTS, q_BHTK)
    return q_grad_BHTK, k_grad_BHSK, v_grad_BHSK, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)

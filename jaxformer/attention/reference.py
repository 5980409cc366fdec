"""Scaled dot-product attention as the paper's equation 1 writes it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxformer.attention.dropout import dropout as drop
from jaxformer.attention.mask import Mask


def weights_BGRTS(q_BTGRK: Array, k_BSGK: Array, mask: Mask, bias_BHTS: Array | None) -> Array:
    """Attention weights softmax(q k^T / sqrt(K)), float32 [B, G, R, T, S].

    A query that may look at nothing has only zero weights.
    """
    _, T, G, R, K = q_BTGRK.shape
    S = k_BSGK.shape[1]
    q_BTGRK = q_BTGRK * jnp.asarray(K**-0.5, q_BTGRK.dtype)
    scores_BGRTS = jnp.einsum(
        "btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32
    )
    if bias_BHTS is not None:
        scores_BGRTS += bias_BHTS.astype(jnp.float32).reshape(-1, G, R, T, S)
    allowed_BTS = mask.allowed_BTS(T, S)
    if allowed_BTS is not None:
        scores_BGRTS = jnp.where(allowed_BTS[:, None, None], scores_BGRTS, -1e30)
    exp_BGRTS = jnp.exp(scores_BGRTS - scores_BGRTS.max(-1, keepdims=True))
    if allowed_BTS is not None:
        exp_BGRTS = jnp.where(allowed_BTS[:, None, None], exp_BGRTS, 0.0)
    return exp_BGRTS / jnp.maximum(exp_BGRTS.sum(-1, keepdims=True), 1e-30)


def reference(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: Mask,
    *,
    bias: Array | None = None,
    dropout: tuple[float, Array] | None = None,
) -> Array:
    """Attention by the formula: the whole T x S picture, in float32, left to XLA."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    weights = weights_BGRTS(q_BTHK.reshape(B, T, G, H // G, K), k_BSGK, mask, bias)
    if dropout is not None:
        weights = drop(weights, *dropout)
    out_BTGRK = jnp.einsum("bgrts,bsgk->btgrk", weights.astype(v_BSGK.dtype), v_BSGK)
    return out_BTGRK.reshape(B, T, H, K)

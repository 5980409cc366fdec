"""Scaled dot-product attention as the paper's equation 1 writes it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxformer.attention.extras import NOTHING, Extras
from jaxformer.attention.mask import Mask


def scores_BHTS(q_BTHK: Array, k_BSGK: Array, extras: Extras) -> Array:
    """How much each query asks for each key, before the mask: float32 [B, H, T, S]."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BTGRK = (q_BTHK * jnp.asarray(K**-0.5, q_BTHK.dtype)).reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    return extras.added(scores.reshape(B, H, T, S))


def reference(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Mask, extras: Extras
) -> tuple[Array, Array]:
    """Attention by the formula: the whole T x S picture, in float32, left to XLA."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    weights_BHTS, lse_BHT = softmax(scores_BHTS(q_BTHK, k_BSGK, extras), mask, extras)
    weights_BHTS = extras.dropped(weights_BHTS).astype(v_BSGK.dtype)
    weights_BGRTS = weights_BHTS.reshape(B, G, H // G, T, S)
    return jnp.einsum("bgrts,bsgk->btgrk", weights_BGRTS, v_BSGK).reshape(B, T, H, K), lse_BHT


def softmax(scores_BHTS: Array, mask: Mask, extras: Extras) -> tuple[Array, Array]:
    """Weights [B, H, T, S] over the allowed keys, and their log-sum-exp [B, H, T].

    A query that may look at nothing has only zero weights, and `NOTHING` as log-sum-exp.
    """
    _, _, query, key = extras.first
    allowed_BTS = mask.allowed_BTS(scores_BHTS.shape[2], scores_BHTS.shape[3], query, key)
    if allowed_BTS is not None:
        scores_BHTS = jnp.where(allowed_BTS[:, None], scores_BHTS, NOTHING)
    # Against a floor above NOTHING, a row with nothing to look at sums to zero instead of S.
    top_BHT1 = jnp.maximum(scores_BHTS.max(-1, keepdims=True), NOTHING / 2)
    exp_BHTS = jnp.exp(scores_BHTS - top_BHT1)
    total_BHT1 = exp_BHTS.sum(-1, keepdims=True)
    safe_BHT1 = jnp.maximum(total_BHT1, 1e-30)
    lse_BHT1 = jnp.where(total_BHT1 > 0, top_BHT1 + jnp.log(safe_BHT1), NOTHING)
    return exp_BHTS / safe_BHT1, lse_BHT1[..., 0]

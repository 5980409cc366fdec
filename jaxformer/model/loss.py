"""Label-smoothed cross entropy that never holds the logits of a whole batch."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.model.layers import weight
from jaxformer.model.transformer import Transformer, output_table
from jaxformer.sharding import spec

CHUNK_POSITIONS = 16
"""Target positions (of all rows) whose logits exist at one time."""

Sums = dict[str, Array]
"""Scalars summed over tokens: loss (smoothed), nll (not), correct, count. Never means."""


def cross_entropy(
    model: Transformer, x_BTD: Array, targets_BT: Array, weights_BT: Array, smoothing: float
) -> Sums:
    """Sums over tokens of the label-smoothed loss, in nats, and its companions; float32 scalars.

    The target distribution gives 1 - smoothing to the right token and spreads the rest evenly over
    the vocabulary (Vaswani et al. 2017, section 5.4). Only "loss" has a gradient.
    """
    table_VD = weight(output_table(model), x_BTD.dtype)
    loss, nll, correct = _sums(
        x_BTD, table_VD, targets_BT, weights_BT.astype(jnp.float32), smoothing
    )
    count = weights_BT.astype(jnp.float32).sum()
    return {"loss": loss, "nll": nll, "correct": correct, "count": count}


# The gradient of a sum of losses with respect to the logits is known as soon as the logits are.
# So the forward pass of the vjp computes, chunk by chunk, the gradients for x and for the table
# too, and throws the logits away: the same number of matrix products as plain autodiff, with one
# chunk of logits alive instead of two full arrays of B x T x V.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(x_BTD, table_VD, targets_BT, weights_BT, smoothing):
    def chunk(sums, chunk_inputs):
        x_BtD, targets_Bt, weights_Bt = chunk_inputs
        more, _ = _chunk_sums(x_BtD, targets_Bt, weights_Bt, table_VD, smoothing)
        return _add(sums, more), None

    return jax.lax.scan(chunk, _zeros(), _chunks(x_BTD, targets_BT, weights_BT))[0]


def _sums_fwd(x_BTD, table_VD, targets_BT, weights_BT, smoothing):
    def chunk(carry, chunk_inputs):
        sums, table_grad_VD = carry
        x_BtD, targets_Bt, weights_Bt = chunk_inputs
        more, logit_grad_BtV = _chunk_sums(x_BtD, targets_Bt, weights_Bt, table_VD, smoothing)
        logit_grad_BtV = logit_grad_BtV.astype(x_BtD.dtype)
        x_grad_BtD = jnp.einsum(
            "btv,vd->btd", logit_grad_BtV, table_VD, out_sharding=spec("batch", None, None)
        )
        table_grad_VD += jnp.einsum(
            "btv,btd->vd",
            logit_grad_BtV,
            x_BtD,
            preferred_element_type=jnp.float32,
            out_sharding=spec("vocab", None),
        )
        return (_add(sums, more), table_grad_VD), x_grad_BtD

    zero_grad_VD = jnp.zeros(table_VD.shape, jnp.float32, out_sharding=spec("vocab", None))
    (sums, table_grad_VD), x_grads = jax.lax.scan(
        chunk, (_zeros(), zero_grad_VD), _chunks(x_BTD, targets_BT, weights_BT)
    )
    x_grad_BTD = jnp.moveaxis(x_grads, 0, 1).reshape(x_BTD.shape)
    return sums, (x_grad_BTD, table_grad_VD.astype(table_VD.dtype))


def _sums_bwd(smoothing, gradients, cotangents):
    scale = cotangents[0]
    x_grad_BTD, table_grad_VD = (g * scale.astype(g.dtype) for g in gradients)
    return x_grad_BTD, table_grad_VD, None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _chunks(x_BTD: Array, *per_token: Array) -> tuple[Array, ...]:
    """Each [B, T, ...] as [chunks, B, t, ...]: cut along time, so that rows stay where they are."""
    T = x_BTD.shape[1]
    t = math.gcd(T, CHUNK_POSITIONS)

    def cut(array: Array) -> Array:
        B = array.shape[0]
        return jnp.moveaxis(array.reshape(B, T // t, t, *array.shape[2:]), 1, 0)

    return tuple(cut(array) for array in (x_BTD, *per_token))


def _chunk_sums(x_BtD, targets_Bt, weights_Bt, table_VD, smoothing):
    """(loss, nll, correct) of one chunk, and the gradient of the loss for its logits."""
    V = table_VD.shape[0]
    logits_BtV = jnp.einsum(
        "btd,vd->btv",
        x_BtD,
        table_VD,
        preferred_element_type=jnp.float32,
        out_sharding=spec("batch", None, "vocab"),
    )
    top_Bt = logits_BtV.max(-1)
    exp_BtV = jnp.exp(logits_BtV - top_Bt[..., None])
    sum_Bt = exp_BtV.sum(-1)
    log_z_Bt = jnp.log(sum_Bt) + top_Bt
    token_V = jax.lax.broadcasted_iota(
        jnp.int32, (1, 1, V), 2, out_sharding=spec(None, None, "vocab")
    )
    hit_BtV = targets_Bt[..., None] == token_V
    right_Bt = jnp.where(hit_BtV, logits_BtV, 0.0).sum(-1)
    nll_Bt = log_z_Bt - right_Bt
    loss_Bt = log_z_Bt - (1 - smoothing) * right_Bt - smoothing * logits_BtV.mean(-1)
    correct_Bt = right_Bt >= top_Bt
    smoothed_BtV = jnp.where(hit_BtV, 1 - smoothing + smoothing / V, smoothing / V)
    grad_BtV = weights_Bt[..., None] * (exp_BtV / sum_Bt[..., None] - smoothed_BtV)
    sums = tuple(
        (weights_Bt * value_Bt).sum()
        for value_Bt in (loss_Bt, nll_Bt, correct_Bt.astype(jnp.float32))
    )
    return sums, grad_BtV


def _zeros() -> tuple[Array, Array, Array]:
    return (jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))

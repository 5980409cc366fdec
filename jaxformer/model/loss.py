"""Label-smoothed cross entropy that never holds the logits of a whole batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.model.layers import weight
from jaxformer.model.transformer import Transformer, output_table
from jaxformer.sharding import context_size, spec

CHUNK_TOKENS = 1024
"""Target tokens, per device, whose logits exist at one time.

Large enough for fast matrix products (chunks of 64 tokens double the time of a step), small enough
to be little beside the rest: at a vocabulary of 8,000 it is 32 MB.
"""

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
# chunk of logits alive instead of two full arrays of B x T x V. Rows and positions of a chunk are
# one axis n, because products of plain matrices are twice as fast on the CPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(x_BTD, table_VD, targets_BT, weights_BT, smoothing):
    def chunk(sums, inputs):
        x_nD, targets_n, weights_n = inputs
        logits_nV = _logits(x_nD, table_VD)
        return _add(sums, _chunk_sums(logits_nV, targets_n, weights_n, smoothing)), None

    return jax.lax.scan(chunk, _zeros(), _chunks(x_BTD, targets_BT, weights_BT))[0]


def _sums_fwd(x_BTD, table_VD, targets_BT, weights_BT, smoothing):
    def chunk(carry, inputs):
        sums, table_grad_VD = carry
        x_nD, targets_n, weights_n = inputs
        logits_nV = _logits(x_nD, table_VD)
        sums = _add(sums, _chunk_sums(logits_nV, targets_n, weights_n, smoothing))
        grad_nV = _logit_gradient(logits_nV, targets_n, weights_n, smoothing).astype(x_nD.dtype)
        x_grad_nD = jnp.einsum("nv,vd->nd", grad_nV, table_VD, out_sharding=spec("tokens", None))
        table_grad_VD += jnp.einsum(
            "nv,nd->vd",
            grad_nV,
            x_nD,
            preferred_element_type=jnp.float32,
            out_sharding=spec("vocab", None),
        )
        return (sums, table_grad_VD), x_grad_nD

    zero_grad_VD = jnp.zeros(table_VD.shape, jnp.float32, out_sharding=spec("vocab", None))
    (sums, table_grad_VD), x_grad_CnD = jax.lax.scan(
        chunk, (_zeros(), zero_grad_VD), _chunks(x_BTD, targets_BT, weights_BT)
    )
    x_grad_BTD = _joined(x_grad_CnD, *x_BTD.shape[:2])
    return sums, (x_grad_BTD, table_grad_VD.astype(table_VD.dtype))


def _sums_bwd(smoothing, gradients, cotangents):
    scale = cotangents[0]
    x_grad_BTD, table_grad_VD = (g * scale.astype(g.dtype) for g in gradients)
    return x_grad_BTD, table_grad_VD, None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _chunks(*arrays: Array) -> tuple[Array, ...]:
    """Each [B, T, ...] as [C, n, ...]: cut along time, so that tokens stay on their devices.

    Where the mesh cuts rows into c parts of P positions, each chunk has t of every part. Where C
    does not divide P, the last chunk is filled up with zeros: tokens of weight 0.
    """
    B, T = arrays[0].shape[:2]
    c = context_size()
    P = T // c
    most = CHUNK_TOKENS * max(jax.sharding.get_abstract_mesh().size, 1)
    C = -(-P // max(most // (B * c), 1))
    t = -(-P // C)

    def cut(array: Array) -> Array:
        whole = (None,) * (array.ndim - 2)
        features = array.shape[2:]
        parts = spec("batch", "length", None, *whole)
        array_BcP = jax.lax.reshape(array, (B, c, P, *features), out_sharding=parts)
        if C * t > P:
            padding = [(0, 0), (0, 0), (0, C * t - P), *((0, 0) for _ in features)]
            array_BcP = jnp.pad(array_BcP, padding)
        chunks = spec("batch", "length", None, None, *whole)
        array_BcCt = array_BcP.reshape(B, c, C, t, *features, out_sharding=chunks)
        array_CcBt = jnp.moveaxis(array_BcCt, (2, 1), (0, 1))
        tokens = spec(None, "tokens", *whole)
        return array_CcBt.reshape(C, c * B * t, *features, out_sharding=tokens)

    return tuple(cut(array) for array in arrays)


def _joined(x_CnD: Array, B: int, T: int) -> Array:
    """The inverse of `_chunks`: [B, T, D]."""
    C, n, D = x_CnD.shape
    c = context_size()
    chunks = spec(None, "length", "batch", None, None)
    x_CcBtD = x_CnD.reshape(C, c, B, n // (B * c), D, out_sharding=chunks)
    x_BcCtD = jnp.moveaxis(x_CcBtD, (0, 1), (2, 1))
    parts = spec("batch", "length", None, None)
    x_BcPD = x_BcCtD.reshape(B, c, -1, D, out_sharding=parts)[:, :, : T // c]
    return x_BcPD.reshape(B, T, D, out_sharding=spec("batch", "length", None))


def _logits(x_nD, table_VD):
    return jnp.einsum(
        "nd,vd->nv",
        x_nD,
        table_VD,
        preferred_element_type=jnp.float32,
        out_sharding=spec("tokens", "vocab"),
    )


def _hits(logits_nV, targets_n):
    """Where the right token stands; a comparison instead of a gather, so that V may be sharded."""
    columns = spec(None, "vocab")
    token_1V = jax.lax.broadcasted_iota(jnp.int32, (1, logits_nV.shape[1]), 1, out_sharding=columns)
    return targets_n[:, None] == token_1V


def _chunk_sums(logits_nV, targets_n, weights_n, smoothing):
    """loss, nll and correct of one chunk."""
    top_n = logits_nV.max(-1)
    log_z_n = jnp.log(jnp.exp(logits_nV - top_n[:, None]).sum(-1)) + top_n
    right_n = jnp.where(_hits(logits_nV, targets_n), logits_nV, 0.0).sum(-1)
    nll_n = log_z_n - right_n
    loss_n = log_z_n - (1 - smoothing) * right_n - smoothing * logits_nV.mean(-1)
    correct_n = (right_n >= top_n).astype(jnp.float32)
    return tuple((weights_n * value_n).sum() for value_n in (loss_n, nll_n, correct_n))


def _logit_gradient(logits_nV, targets_n, weights_n, smoothing):
    """weight * (softmax(logits) - smoothed target)."""
    rest = smoothing / logits_nV.shape[1]
    wanted_nV = jnp.where(_hits(logits_nV, targets_n), 1 - smoothing + rest, rest)
    return weights_n[:, None] * (jax.nn.softmax(logits_nV, axis=-1) - wanted_nV)


def _zeros() -> tuple[Array, Array, Array]:
    return (jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))

"""Attention: one entry, several implementations, the first that can serve is taken."""

from __future__ import annotations

import functools
import logging
from typing import Literal, overload

from jax import Array

from jaxformer.attention.blockwise import blockwise
from jaxformer.attention.context import Implementation
from jaxformer.attention.dense import dense
from jaxformer.attention.extras import Extras
from jaxformer.attention.mask import Mask
from jaxformer.attention.pallas_gpu import pallas_gpu
from jaxformer.attention.pallas_tpu import pallas_tpu
from jaxformer.attention.platform import platform
from jaxformer.attention.reference import reference
from jaxformer.attention.sharded import sharded

__all__ = ["IMPLEMENTATIONS", "Mask", "attention"]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
    "blockwise": blockwise,
    "dense": dense,
    "reference": reference,
}
"""In the order in which they are tried."""

SHORT = {"cpu": 512 * 512, "gpu": 512 * 512, "tpu": 256 * 256}
"""Of pictures (T times S) smaller than this, `dense` is faster than implementations in blocks.

Measured on a CPU; estimated for TPUs, where both meet between 128 and 256 (`docs/attention.md`).
"""
SHORT_PACKED = SHORT | {"tpu": 128 * 128}
"""The same for packed rows: there a TPU takes smaller tiles, and more heads at a time."""


@overload
def attention(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: Mask,
    *,
    bias: Array | None = ...,
    alibi: Array | None = ...,
    soft_cap: float | None = ...,
    dropout: tuple[float, Array] | None = ...,
    implementation: str | None = ...,
    context_keys: str = ...,
    return_lse: Literal[False] = ...,
) -> Array: ...
@overload
def attention(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: Mask,
    *,
    bias: Array | None = ...,
    alibi: Array | None = ...,
    soft_cap: float | None = ...,
    dropout: tuple[float, Array] | None = ...,
    implementation: str | None = ...,
    context_keys: str = ...,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...
def attention(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: Mask,
    *,
    bias: Array | None = None,
    alibi: Array | None = None,
    soft_cap: float | None = None,
    dropout: tuple[float, Array] | None = None,
    implementation: str | None = None,
    context_keys: str = "ring",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) for many heads at once.

    Args:
      q_BTHK: queries, float [B, T, H, K].
      k_BSGK: keys, float [B, S, G, K]; G divides H, and H/G neighbouring heads share one.
      v_BSGK: values, float [B, S, G, K].
      mask: the allowed (query, key) pairs.
      bias: added to the scaled (and capped) scores, [B or 1, H, T, S].
      alibi: slopes of ALiBi (Press et al. 2022), [H]: slope times distance is taken off the scores.
      soft_cap: c in c tanh(score / c), which keeps scores between -c and c (Gemma 2, 2024).
      dropout: (rate, key) of the dropout on the weights, or None.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first that can serve, and
        implementations in blocks only from `SHORT` (`SHORT_PACKED`) on.
      context_keys: how devices that share a row see each other's keys: "ring" or "gather".
      return_lse: also return the log-sum-exp of each query's scores, with which results over parts
        of the keys can be put together.

    Returns:
      [B, T, H, K] in the type of v; zeros (and zero gradients) for a query that may see nothing.
      With `return_lse` also float32 [B, H, T], there -1e30.

    Raises:
      NotImplementedError: the named implementation cannot serve this call, and why.
      ValueError: shapes that do not fit together, or a name that is not known.
    """
    _check(q_BTHK, k_BSGK, v_BSGK, bias, alibi, implementation)
    extras = Extras.of(q_BTHK.shape[2], k_BSGK.shape[1], bias, alibi, soft_cap, dropout)
    size, packed = q_BTHK.shape[1] * k_BSGK.shape[1], mask.q_segments_BT is not None
    names = (implementation,) if implementation else _order(size, packed)
    refusals = []
    for name in names:
        try:
            out = sharded(IMPLEMENTATIONS[name], q_BTHK, k_BSGK, v_BSGK, mask, extras, context_keys)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        _log_once(name)
        return out if return_lse else out[0]
    raise NotImplementedError("; ".join(refusals))


def _check(q_BTHK, k_BSGK, v_BSGK, bias, alibi, implementation) -> None:
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    if k_BSGK.shape != v_BSGK.shape or H % G or k_BSGK.shape[-1] != K:
        raise ValueError(
            f"attention got queries {q_BTHK.shape}, keys {k_BSGK.shape}, values {v_BSGK.shape}: "
            "keys and values must agree, heads of keys divide heads of queries, head sizes match."
        )
    if bias is not None and bias.shape not in ((1, H, T, S), (B, H, T, S)):
        raise ValueError(
            f"attention got a bias {bias.shape}; it must be [1 or {B}, {H}, {T}, {S}]."
        )
    if alibi is not None and alibi.shape != (H,):
        raise ValueError(f"attention got slopes {alibi.shape} for ALiBi; it must be [{H}].")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"there is no attention {implementation!r}; known: {known}")


def _order(size: int, packed: bool) -> tuple[str, ...]:
    """For pictures of this size (T times S)."""
    here = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}.get(platform(), "cpu")
    left_out = {name for name in ("pallas_tpu", "pallas_gpu") if not name.endswith(here)}
    if size < (SHORT_PACKED if packed else SHORT)[here]:
        left_out |= {"pallas_tpu", "pallas_gpu", "blockwise"}
    return tuple(name for name in IMPLEMENTATIONS if name not in left_out)


@functools.cache
def _log_once(name: str) -> None:
    logging.getLogger(__name__).info("attention is computed by %r", name)

"""Attention: one entry, several implementations, the first that can serve is taken."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
from jax import Array

from jaxformer.attention.blockwise import blockwise
from jaxformer.attention.dense import dense
from jaxformer.attention.mask import Mask
from jaxformer.attention.pallas_tpu import pallas_tpu
from jaxformer.attention.reference import reference

__all__ = ["IMPLEMENTATIONS", "Mask", "attention"]

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "pallas_tpu": pallas_tpu,
    "blockwise": blockwise,
    "dense": dense,
    "reference": reference,
}
"""In the order in which they are tried."""

SHORT = 512 * 512
"""Of pictures (T times S) smaller than this, `dense` is faster than `blockwise` on a CPU."""


def attention(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: Mask,
    *,
    bias: Array | None = None,
    dropout: tuple[float, Array] | None = None,
    implementation: str | None = None,
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) for many heads at once.

    Args:
      q_BTHK: queries, float [B, T, H, K].
      k_BSGK: keys, float [B, S, G, K]; G divides H, and H/G neighbouring heads share one.
      v_BSGK: values, float [B, S, G, K].
      mask: the allowed (query, key) pairs.
      bias: added to the scaled scores, [B or 1, H, T, S].
      dropout: (rate, key) of the dropout on the weights, or None.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first that can serve, and
        implementations in blocks only from `SHORT` on and on a single device.

    Returns:
      [B, T, H, K] in the type of v; zeros (and zero gradients) for a query that may see nothing.

    Raises:
      NotImplementedError: the named implementation cannot serve this call, and why.
      ValueError: shapes that do not fit together, or a name that is not known.
    """
    H, G = q_BTHK.shape[2], k_BSGK.shape[2]
    if k_BSGK.shape != v_BSGK.shape or H % G or q_BTHK.shape[-1] != k_BSGK.shape[-1]:
        raise ValueError(
            f"attention got queries {q_BTHK.shape}, keys {k_BSGK.shape}, values {v_BSGK.shape}: "
            "keys and values must agree, heads of keys divide heads of queries, head sizes match."
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"there is no attention {implementation!r}; known: {known}")
    names = (implementation,) if implementation else _order(q_BTHK.shape[1], k_BSGK.shape[1])
    refusals = []
    for name in names:
        try:
            out = IMPLEMENTATIONS[name](q_BTHK, k_BSGK, v_BSGK, mask, bias=bias, dropout=dropout)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        _log_once(name)
        return out
    raise NotImplementedError("; ".join(refusals))


def _order(T: int, S: int) -> tuple[str, ...]:
    left_out = {"pallas_tpu"} if jax.default_backend() != "tpu" else set()
    # The blocks of one device are not yet told where they are in the arrays of many.
    if T * S < SHORT or jax.sharding.get_abstract_mesh().size > 1:
        left_out |= {"pallas_tpu", "blockwise"}
    return tuple(name for name in IMPLEMENTATIONS if name not in left_out)


@functools.cache
def _log_once(name: str) -> None:
    logging.getLogger(__name__).info("attention is computed by %r", name)
